"""Reads the golden arrays of tests/golden, and separates results from inputs."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN_DIR = Path(__file__).parents[2] / "golden"

# Names of the arrays that are inputs of the authors' code, not results.
INPUTS = re.compile(
    r"(text|word|video|word_raw|video_raw|thresh|margin|cotangent|word_mask|video_mask|twm_mask"
    r"|(full|ragged|twm)\.(word|video)_mask"
    r"|(\w+\.)?param\..*"
    r"|\w+\.sim|linear_\w+\.(q|k|cotangent)|attention_\w+\.(q|k|cotangent)"
    r"|selector0\.\d\.(x|weight|cotangent))"
)
# `<case>.sim` is an input in loss.npz, but `<interaction>.sim` is a result in level3.npz.
RESULTS_NAMED_LIKE_INPUTS = {"level3.npz": re.compile(r"att_w?ti\.sim")}

# Results that no test compares, each with its reason.
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


@cache
def golden(file: str) -> dict[str, np.ndarray]:
    """All arrays of a golden file by name."""
    with np.load(GOLDEN_DIR / file) as archive:
        return {name: archive[name] for name in archive.files}


def result_names(file: str) -> set[str]:
    """Names of the arrays that are results of the authors' code."""
    exceptions = RESULTS_NAMED_LIKE_INPUTS.get(file)
    return {
        name
        for name in golden(file)
        if not INPUTS.fullmatch(name) or (exceptions is not None and exceptions.fullmatch(name))
    }


def tensor(file: str, name: str, *, leaf: bool = False) -> Tensor:
    """An array as a tensor, floats in float64; a leaf requires a gradient."""
    value = torch.from_numpy(golden(file)[name].copy())
    value = value.double() if value.is_floating_point() else value
    return value.requires_grad_(leaf)


def leaves(file: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Several arrays as tensors that require a gradient."""
    return {name: tensor(file, name, leaf=True) for name in names}


def assert_equals_golden(file: str, results: dict[str, Tensor]) -> None:
    """Asserts equality with the golden arrays: 1e-9 relative, 1e-12 absolute near 0."""
    for name, value in results.items():
        expected = tensor(file, name)
        torch.testing.assert_close(
            value.detach().to(expected.dtype),
            expected,
            rtol=1e-9,
            atol=1e-12,
            msg=lambda text, name=name: f"{file} {name}: {text}",
        )


def assert_all_compared(file: str, compared: Iterable[str]) -> None:
    """Asserts that every result of the file is compared, or is in `LEFT_OUT` with a reason."""
    reasons = [re.compile(pattern) for pattern in LEFT_OUT.get(file, [])]
    left_out = {n for n in result_names(file) if any(r.fullmatch(n) for r in reasons)}
    assert result_names(file) - left_out == set(compared)
    assert all(any(r.fullmatch(n) for n in left_out) for r in reasons)
