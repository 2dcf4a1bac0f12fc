"""No array of the reference is forgotten: each is compared by a test or left out for a reason."""

import re
from collections.abc import Callable, Iterable

import pytest
import test_golden_level3
import test_golden_losses
import test_golden_partial
import test_golden_similarity
from builders.golden_files import FOLDER, result_names

LEFT_OUT = {
    "tpmcl.npz": [
        # Frame weights summed over the block: verdict differ, the tests demand a difference.
        r"att_wti\.type\d\.ref\..*",
        r"att_wti\.blockmatrix\..*",
        # Compared on the diagonal; its off-diagonals are not the pairs that their index says.
        r"ti\.blockmatrix\..*",
    ],
    # Pairs mismatched in batches above 8: verdict differ, the tests demand a difference.
    "tpmcl_blockbug.npz": [r"ti\.type\d\.ref\..*"],
    "tpmcl_blockbug2.npz": [r"ti\.type\d\.ref\..*"],
    # The margin with learned frame weights carries the same fault, and so does its total.
    "level3.npz": [r"att_wti\.(negnce|crossen)\.(margin(\.grad\..*)?|total)"],
}


def compared(file: str) -> set[str]:
    """Names that the comparing tests produce, from the very functions and cases they run."""
    if file in test_golden_similarity.FILES:
        return names(test_golden_similarity.results, cases_of(test_golden_similarity.CASES, file))
    if file.startswith("tpmcl"):
        return names(test_golden_partial.tpm_results, cases_of(test_golden_partial.TPM_CASES, file))
    if file == "predictors.npz":
        weights = names(test_golden_partial.predictor_results, test_golden_partial.PREDICTORS)
        return weights | names(test_golden_partial.selector_results, test_golden_partial.SELECTORS)
    if file == "loss.npz":
        return names(test_golden_losses.results, test_golden_losses.CASES)
    if file == "level3.npz":
        return names(test_golden_level3.results, test_golden_level3.INTERACTIONS)
    assert file == "seqtransf.npz", f"{file} has no comparing test"
    return set(test_golden_similarity.header_results())


def cases_of(cases: list[tuple[str, str]], file: str) -> list[tuple[str, str]]:
    return [case for case in cases if case[0] == file]


def names(results: Callable[..., dict], cases: Iterable[str | tuple[str, str]]) -> set[str]:
    arguments = [(case,) if isinstance(case, str) else case for case in cases]
    return {name for args in arguments for name in results(*args)}


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.npz")))
def test_every_result_of_the_reference_is_compared(file: str) -> None:
    reasons = [re.compile(pattern) for pattern in LEFT_OUT.get(file, [])]
    left_out = {n for n in result_names(file) if any(r.fullmatch(n) for r in reasons)}
    assert result_names(file) - left_out == compared(file)
    assert all(any(r.fullmatch(n) for n in left_out) for r in reasons)


def test_all_golden_files_are_there() -> None:
    assert len(list(FOLDER.glob("*.npz"))) == 12
