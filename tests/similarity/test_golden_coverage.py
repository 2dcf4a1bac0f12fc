"""Every golden result is compared by a test, or is on a list with the reason why not."""

import re
from collections.abc import Callable, Iterable

import pytest
from builders.golden import level3, losses, partial, similarity
from builders.golden.archives import GOLDEN_DIR, result_names

LEFT_OUT = {
    "tpmcl.npz": [
        # The authors sum frame weights over the block: the tests assert a difference.
        r"att_wti\.type\d\.ref\..*",
        r"att_wti\.blockmatrix\..*",
        # Compared on the diagonal; off the diagonal, the index does not name the pair.
        r"ti\.blockmatrix\..*",
    ],
    # The authors mismatch pairs in batches above 8: the tests assert a difference.
    "tpmcl_blockbug.npz": [r"ti\.type\d\.ref\..*"],
    "tpmcl_blockbug2.npz": [r"ti\.type\d\.ref\..*"],
    # The margin with learned frame weights has the same fault, and so has the total.
    "level3.npz": [r"att_wti\.(negnce|crossen)\.(margin(\.grad\..*)?|total)"],
}


def compared(file: str) -> set[str]:
    """Names of all results that the tests compare, from the functions and cases that they use."""
    if file in similarity.FILES:
        return names(similarity.results, cases_of(similarity.CASES, file))
    if file.startswith("tpmcl"):
        return names(partial.tpm_results, cases_of(partial.TPM_CASES, file))
    if file == "predictors.npz":
        weights = names(partial.predictor_results, partial.PREDICTORS)
        return weights | names(partial.selector_results, partial.SELECTORS)
    if file == "loss.npz":
        return names(losses.results, losses.CASES)
    if file == "level3.npz":
        return names(level3.results, level3.INTERACTIONS)
    assert file == "seqtransf.npz", f"{file} is compared by no test"
    return set(similarity.header_results())


def cases_of(cases: list[tuple[str, str]], file: str) -> list[tuple[str, str]]:
    return [case for case in cases if case[0] == file]


def names(results: Callable[..., dict], cases: Iterable[str | tuple[str, str]]) -> set[str]:
    arguments = [(case,) if isinstance(case, str) else case for case in cases]
    return {name for args in arguments for name in results(*args)}


@pytest.mark.parametrize("file", sorted(path.name for path in GOLDEN_DIR.glob("*.npz")))
def test_every_golden_result_is_compared(file: str) -> None:
    reasons = [re.compile(pattern) for pattern in LEFT_OUT.get(file, [])]
    left_out = {n for n in result_names(file) if any(r.fullmatch(n) for r in reasons)}
    assert result_names(file) - left_out == compared(file)
    assert all(any(r.fullmatch(n) for n in left_out) for r in reasons)


def test_all_golden_files_exist() -> None:
    assert len(list(GOLDEN_DIR.glob("*.npz"))) == 12
