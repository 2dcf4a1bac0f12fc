"""Part "parity": every backend, and the streamed loss, against the reference in float64.

Inputs in float32 or bfloat16; the reference gets the same numbers in float64. An error is the
largest difference over the largest number of the reference's tensor, and over 1 at least for
scores. Outputs are poisoned: what a
backend leaves unwritten is NaN, and NaN is beyond every bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from builders.similarity_inputs import FEATURES, similarity_inputs
from gpu_kit.child import Recorder
from gpu_kit.clock import PoisonedOutputs, poison_free_memory
from gpu_kit.separation import clear_pairs
from gpu_kit.sizes import sizes_of
from torch import Tensor

from tvr.kernels import reference
from tvr.kernels.losses import neg_nce
from tvr.kernels.row_loss.row_loss import LossRule
from tvr.kernels.row_loss.streamed_loss import streamed_loss
from tvr.kernels.similarity import BACKENDS, dmae_similarity

# The suite's bounds on the CPU. bfloat16 features get their gradients rounded once, to 8 bits.
BOUNDS = {
    "float32": {"similarity": 1e-5, "gradients": 1e-5},
    "bfloat16": {"similarity": 1e-5, "gradients": 2**-8},
    "fast": {"similarity": 2**-6, "gradients": 2**-6},
    # At temperature 0.01 a rounding of the scores counts 100 times.
    "streamed float32": {"similarity": 1e-4, "gradients": 1e-4},
    "streamed bfloat16": {"similarity": 1e-4, "gradients": 2**-8},
}
# Rounding may move two entries of a maximum towards each other by this much.
GAP, FAST_GAP = 1e-4, 2**-7
STREAMED_PAIRS = 10
DTYPES = ("float32", "bfloat16")
Arguments = dict[str, Tensor]


def parity(settings: dict[str, Any], recorder: Recorder) -> None:
    """Records the largest error of every tensor, one case for each backend and dtype."""
    sizes, device = sizes_of(settings), settings["device"]
    small, everything = sizes.parity[:2], sizes.parity
    kinds = [(f"{name} {dtype}", name, dtype, False) for name in BACKENDS for dtype in DTYPES]
    kinds += [(f"{name} fast", name, "float32", True) for name in BACKENDS]
    streamed = [f"streamed {dtype}" for dtype in DTYPES]
    recorder.plan([case for case, *_ in kinds] + streamed)
    for case, backend, dtype, fast in kinds:
        errors: dict[str, float] = {}
        shares: list[float] = []
        try:
            for block in small if fast else everything:
                for options in _options(whole=block in small):
                    found, share = compare(
                        dmae_similarity,
                        _arguments(block, dtype, device),
                        options,
                        {"backend": backend} | ({"fast": True} if fast else {}),
                        gap=FAST_GAP if fast else GAP,
                    )
                    errors |= {n: _larger(x, errors.get(n, 0.0)) for n, x in found.items()}
                    shares.append(share)
        except ValueError as error:
            recorder.not_run(case, str(error))
            continue
        record(recorder, case, "fast" if fast else dtype, errors, pairs_compared=min(shares))
    for case, dtype in zip(streamed, DTYPES, strict=True):
        record(recorder, case, case, compare_streamed(dtype, device))


def record(
    recorder: Recorder, case: str, kind: str, errors: dict[str, float], **values: Any
) -> None:
    """Records errors beside their bounds; an error beyond its bound, or NaN, is a failure."""
    bounds = BOUNDS[kind]
    wrong = [
        f"{name} {error:.2g} > {bound:.2g}"
        for name, error in errors.items()
        if not error <= (bound := bounds.get(name, bounds["gradients"]))
    ]
    # JSON has no NaN.
    shown = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    values |= {"errors": shown, "bounds": bounds}
    if wrong:
        recorder.failed(case, ", ".join(wrong), **values)
    else:
        recorder.case(case, **values)


def compare(
    function: Callable[..., Tensor],
    arguments: Arguments,
    options: dict[str, Any],
    choice: dict[str, Any],
    *,
    gap: float,
) -> tuple[dict[str, float], float]:
    """Compares scores, and gradients of a random weighted sum of the pairs with clear maxima.

    Returns:
        The relative errors, and the share of pairs whose gradients were compared.
    """
    exact = {n: x.double() if x.is_floating_point() else x for n, x in arguments.items()}
    clear = clear_pairs(exact, **options, gap=gap)
    weighting = torch.randn(clear.shape, dtype=torch.float64, device=clear.device) * clear
    expected = _values(reference.dmae_similarity, exact, weighting, **options)
    poison_free_memory(clear.device.type)
    with PoisonedOutputs():
        actual = _values(function, arguments, weighting, **options, **choice)
    return relative_errors(actual, expected), float(clear.double().mean())


def compare_streamed(dtype: str, device: str) -> dict[str, float]:
    """Compares the streamed loss and its gradients with NegNCE of the reference's scores."""
    arguments = _clear_inputs(dtype, device)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in arguments.items()}
    ids = torch.arange(STREAMED_PAIRS, device=device)

    def expected_loss(**leaves: Tensor) -> Tensor:
        return neg_nce(reference.dmae_similarity(**leaves), mode="log", video_ids=ids)

    def actual_loss(**leaves: Tensor) -> Tensor:
        # 3 texts a tile: several tiles in both directions.
        return streamed_loss(**leaves, rule=LossRule("log"), video_ids=ids, chunk=3).loss

    weighting = torch.ones((), dtype=torch.float64, device=device)
    expected = _values(expected_loss, exact, weighting)
    with PoisonedOutputs():
        actual = _values(actual_loss, arguments, weighting)
    return relative_errors(actual, expected)


def relative_errors(actual: Arguments, expected: Arguments) -> dict[str, float]:
    """The largest difference of each tensor over the largest number that is expected.

    Scores are cosines: where all are below 1, their scale is 1.
    """
    errors = {}
    for name, value in expected.items():
        largest = float(value.abs().max())
        difference = float((actual[name].double() - value).abs().max())
        scale = max(1.0, largest) if name == "similarity" else largest
        errors[name] = difference / scale if scale else difference
    return errors


def _values(
    function: Callable[..., Tensor], arguments: Arguments, weighting: Tensor, **options: Any
) -> Arguments:
    leaves = {n: x.clone().requires_grad_(n in FEATURES) for n, x in arguments.items()}
    scores = function(**leaves, **options)
    (scores * weighting.to(scores.dtype)).sum().backward()
    gradients = {n: leaves[n].grad for n in FEATURES}
    return {"similarity": scores.detach()} | {n: g for n, g in gradients.items() if g is not None}


def _options(*, whole: bool) -> list[dict[str, Any]]:
    if not whole:
        return [{"interaction": "att_wti", "neighbour_frames": True}]
    return [
        {"interaction": interaction, "neighbour_frames": neighbours}
        for interaction in reference.INTERACTIONS
        for neighbours in (False, True)
    ]


def _arguments(
    block: tuple[int, int, int, int, int], dtype: str, device: str, seed: int = 0
) -> Arguments:
    *counts, width = block
    drawn = similarity_inputs(*counts, width=width, dtype=getattr(torch, dtype), seed=seed)
    return {name: x.to(device) for name, x in drawn.items()}


def _clear_inputs(dtype: str, device: str) -> Arguments:
    """Small inputs without near ties, among their maxima and between scores and positives."""
    for seed in range(1000):
        arguments = _arguments((STREAMED_PAIRS, STREAMED_PAIRS, 5, 4, 16), dtype, device, seed)
        exact = {n: x.double() if x.is_floating_point() else x for n, x in arguments.items()}
        scores = reference.dmae_similarity(**exact)
        positive = scores.diagonal()
        others = ~torch.eye(STREAMED_PAIRS, dtype=torch.bool, device=device)
        # A pair is a hard negative above the positive of its text or of its video.
        above = torch.stack([scores - positive[:, None], scores - positive[None]]).abs()
        is_clear = bool((above[:, others] > GAP).all())
        if is_clear and bool(clear_pairs(exact, "att_wti", True, GAP).all()):
            return arguments
    raise RuntimeError("no inputs without near ties among 1,000")


def _larger(error: float, before: float) -> float:
    """The larger of two errors; NaN is the largest."""
    return error if math.isnan(error) or error > before else before
