"""The similarity equals the authors' implementation, value and every gradient, in float64.

Properties that these arrays pin: a masked slot counts as similarity 0; neighbour frames enter the
text-to-video part only, with zero diagonal; a word of mask 2 counts twice, renormalised in the ti
family and not in the wti family; the sentence uses the mask of the first word slot; a maximum
passes its gradient to the first of equal entries.
"""

import pytest
import torch
from builders.golden.archives import GOLDEN_DIR, assert_all_compared, assert_equals_golden, tensor
from builders.golden.similarity import CASES, FILES, WAYS, header_results, results, weight_layer

from tvr.kernels import similarity


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("file", "case"), CASES)
def test_similarity_equals_the_golden_arrays(file: str, case: str, way: str) -> None:
    assert_equals_golden(file, results(file, case, way))


def test_sequence_header_equals_the_golden_arrays() -> None:
    assert_equals_golden("seqtransf.npz", header_results())


@pytest.mark.parametrize("case", ["twm.att_wti.nfc1", "ragged.att_ti.nfc1"])
def test_float32_scores_are_within_1e5_of_the_golden_arrays(case: str) -> None:
    file = "sim_rect.npz"
    masks, interaction, _ = case.split(".")
    single = {name: tensor(file, name).float() for name in ("text", "word", "video")}
    logits = {}
    if interaction.endswith("wti"):
        for kind, prefix in (("word", "text"), ("frame", "video")):
            layer = weight_layer(file, f"param.{prefix}_weight_fc.").float()
            logits[f"{kind}_logits"] = layer(single["word" if kind == "word" else "video"])
    scores = similarity.dmae_similarity(
        single["text"].squeeze(1),
        single["word"],
        single["video"],
        tensor(file, f"{masks}.word_mask"),
        tensor(file, f"{masks}.video_mask"),
        interaction=interaction,
        **logits,
    )
    assert scores.dtype == torch.float32
    expected = tensor(file, f"{case}.sim").float()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("file", FILES)
def test_every_result_of_the_similarity_is_compared(file: str) -> None:
    cases = [case for case in CASES if case[0] == file]
    assert_all_compared(file, [name for case in cases for name in results(*case)])


def test_every_result_of_the_sequence_header_is_compared() -> None:
    assert_all_compared("seqtransf.npz", header_results())


def test_all_golden_files_exist() -> None:
    assert len(list(GOLDEN_DIR.glob("*.npz"))) == 12
