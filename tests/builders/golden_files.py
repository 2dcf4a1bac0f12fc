"""Reads tests/golden/*.npz and says which of their arrays are results of the reference."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"

# What the reference was given, as opposed to what it answered.
INPUTS = re.compile(
    r"(text|word|video|word_raw|video_raw|thresh|margin|cotangent|word_mask|video_mask|twm_mask"
    r"|(full|ragged|twm)\.(word|video)_mask"
    r"|(\w+\.)?param\..*"
    r"|\w+\.sim|linear_\w+\.(q|k|cotangent)|attention_\w+\.(q|k|cotangent)"
    r"|selector0\.\d\.(x|weight|cotangent))"
)
# `loss.npz` names its input matrices `<case>.sim`; level3.npz its similarity results `<I>.sim`.
RESULTS_NAMED_LIKE_INPUTS = {"level3.npz": re.compile(r"att_w?ti\.sim")}


@cache
def golden(file: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / file) as archive:
        return {name: archive[name] for name in archive.files}


def result_names(file: str) -> set[str]:
    also = RESULTS_NAMED_LIKE_INPUTS.get(file)
    return {
        name
        for name in golden(file)
        if not INPUTS.fullmatch(name) or (also is not None and also.fullmatch(name))
    }


def tensor(file: str, name: str, *, leaf: bool = False) -> Tensor:
    """The array as a tensor, floats in float64; a leaf collects a gradient."""
    value = torch.from_numpy(golden(file)[name].copy())
    value = value.double() if value.is_floating_point() else value
    return value.requires_grad_(leaf)


def leaves(file: str, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensor(file, name, leaf=True) for name in names}


def assert_equals_golden(file: str, results: dict[str, Tensor]) -> None:
    """Every result within 1e-9 of the reference, relative; 1e-12 absolute where the truth is 0."""
    for name, value in results.items():
        expected = tensor(file, name)
        torch.testing.assert_close(
            value.detach().to(expected.dtype),
            expected,
            rtol=1e-9,
            atol=1e-12,
            msg=lambda text, name=name: f"{file} {name}: {text}",
        )
