"""Wrong arguments of the similarity raise ValueErrors that name the argument and its value."""

import pytest
import torch
from builders.similarity_inputs import similarity_inputs
from torch import Tensor

from tvr.kernels import reference
from tvr.kernels.similarity import dmae_similarity


def inputs_with(**replaced: Tensor | None) -> dict[str, Tensor | None]:
    return similarity_inputs() | replaced


def mask_with(name: str, row: int, slot: slice | int, value: int) -> dict[str, Tensor | None]:
    mask = torch.ones_like(similarity_inputs()[name])
    mask[row, slot] = value
    return inputs_with(**{name: mask})


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        (inputs_with(), {"interaction": "mean"}, "interaction='mean'.*att_wti"),
        (inputs_with(sentence=None), {"interaction": "wti"}, "'wti' needs sentence"),
        (inputs_with(words=None), {}, "'att_wti' needs words"),
        (inputs_with(word_logits=None), {}, "'att_wti' needs word_logits"),
        (inputs_with(frame_logits=None), {"interaction": "wti"}, "'wti' needs frame_logits"),
        (inputs_with(sentence=torch.ones(4, 8)), {}, r"sentence has shape \(4, 8\).*\(5, 8\)"),
        (inputs_with(frame_mask=torch.ones(4, 3).long()), {}, r"frame_mask .*\(4, 3\).*\(4, 4\)"),
        (inputs_with(frames=torch.ones(4, 8)), {}, r"frames must be \(C, F, D\)"),
        (mask_with("word_mask", 3, slice(None), 0), {}, r"word_mask\[3\] has no valid slot"),
        (mask_with("frame_mask", 2, slice(None), 0), {}, r"frame_mask\[2\] has no valid slot"),
        (mask_with("word_mask", 1, 0, 0), {}, r"word_mask\[1, 0\] is 0.*right"),
        (mask_with("word_mask", 1, 2, 3), {}, r"word_mask\[1, 2\] is 3"),
        (mask_with("frame_mask", 1, 2, 2), {}, r"frame_mask\[1, 2\] is 2"),
        (mask_with("frame_mask", 1, 2, -1), {}, r"frame_mask\[1, 2\] is -1"),
    ],
)
def test_errors_name_the_argument(arguments: dict, options: dict, named: str) -> None:
    # __wrapped__ skips the shape checks that the tests add and a user does not have.
    for function in (dmae_similarity, reference.dmae_similarity):
        with pytest.raises(ValueError, match=named):
            function.__wrapped__(**arguments, **options)


def test_chunk_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        dmae_similarity(**similarity_inputs(), chunk=0)
