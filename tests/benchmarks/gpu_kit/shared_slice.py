"""Part "slice": the part of the similarity that other late-interaction kernels compute too.

For every text and video: the sum over words of the best frame's product, without weights,
neighbours, or maxima over words; bfloat16 features, full lengths. Published times of this slice
stand beside ours. They are other people's runs on their machines.

`one-way` calls the device's default backend through `SimilarityBackend`, with the video part left
out and equal weights 1 / words: half the mean instead of the sum, in float32. `two-way` is the
nearest call of the public API, `att_ti` without sentences and neighbours: it also takes every
frame's best word, and differentiates both. Exact calls keep float32's precision in the products;
`fast` ones multiply in bfloat16, as the published ones do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from gpu_kit.child import Recorder
from gpu_kit.clock import COMPILERS, Wrong, check_finite, measure
from gpu_kit.sizes import sizes_of
from torch import Tensor

from tvr.kernels.backends.protocol import VideoTensors
from tvr.kernels.numerics import unit
from tvr.kernels.similarity import BACKENDS, dmae_similarity, tile_backend
from tvr.kernels.text_lengths import TextLengths
from tvr.kernels.token_sets import FrameSet, TokenSet

PUBLISHED = (
    {"name": "LIK", "backward": False, "pairs": 128, "ms": 0.226},
    {"name": "eager", "backward": False, "pairs": 128, "ms": 1.539},
    {"name": "torch.compile", "backward": False, "pairs": 128, "ms": 1.540},
    {"name": "LIK", "backward": True, "pairs": 256, "ms": 2.10, "peak_bytes": 52_000_000},
)
"""H100, bfloat16, 32 words x 300 frames, width 128; not measured here."""
# Relative to the largest score; bfloat16 keeps 8 bits.
TOLERANCE = 0.02
CHECKED_TEXTS = 4


class SliceInputs(NamedTuple):
    """Unit vectors in bfloat16, and the gradient of the scores."""

    words: Tensor
    frames: Tensor
    gradient: Tensor


Implementation = Callable[[SliceInputs, bool], Tensor]
"""Returns the (B, C) scores, and leaves gradients of words and frames if asked to."""


def shared_slice(settings: dict[str, Any], recorder: Recorder) -> None:
    """Records the published numbers, then one case for each implementation and direction."""
    sizes, device = sizes_of(settings), settings["device"]
    sides = {False: sizes.slice_forward, True: sizes.slice_backward}
    functions = implementations()
    cases = [(name, backward) for backward in (False, True) for name in functions]
    recorder.plan(_name(name, sides[backward], backward) for name, backward in cases)
    for published in PUBLISHED:
        name = _name(published["name"], published["pairs"], published["backward"])
        recorder.case(f"published: {name}", published=True, **published)
    took_s = 0.0
    for name, backward in cases:
        if recorder.left_s < took_s:
            continue
        case, started = _name(name, sides[backward], backward), time.monotonic()
        try:
            timed = measure(
                partial(make_inputs, sides[backward], sizes.slice_tokens, device),
                partial(_call, functions[name], backward),
                partial(_check, name),
                device,
                repeats=2 * sizes.repeats,
                limit_s=sizes.case_s,
            )
        except Wrong as wrong:
            recorder.failed(case, str(wrong))
        except torch.OutOfMemoryError:
            recorder.not_run(case, "does not fit")
        except ValueError as error:
            recorder.not_run(case, str(error))
        else:
            words, frames, width = sizes.slice_tokens
            operations = (3 if backward else 1) * 2 * sides[backward] ** 2 * words * frames * width
            rate = operations / timed["ms"] / 1e9
            values = {"name": name, "backward": backward, "pairs": sides[backward]}
            recorder.case(case, published=False, **values, **timed, tflops_per_s=rate)
        took_s = time.monotonic() - started


def implementations() -> dict[str, Implementation]:
    """By name; every registered backend is among them."""
    found: dict[str, Implementation] = {
        "bare product": _bare_product,
        "eager": partial(_autograd, eager),
        "torch.compile": _compiled,
    }
    for fast, end in ((False, ""), (True, ", fast")):
        found[f"one-way{end}"] = partial(_one_way, fast)
        for name in BACKENDS:
            found[f"two-way {name}{end}"] = partial(_autograd, partial(_two_way, name, fast))
    return found


def make_inputs(side: int, tokens: tuple[int, int, int], device: str, seed: int) -> SliceInputs:
    """`side` texts and videos of random directions."""
    torch.manual_seed(seed)
    words, frames, width = tokens

    def directions(slots: int) -> Tensor:
        x = unit(torch.randn(side, slots, width, device=device))
        return x.bfloat16().requires_grad_()

    gradient = torch.randn(side, side, device=device)
    return SliceInputs(directions(words), directions(frames), gradient)


def eager(words: Tensor, frames: Tensor) -> Tensor:
    """The slice in four lines of torch, in the dtype of its inputs."""
    scores = torch.einsum("atd,cfd->atcf", words, frames)
    return scores.amax(dim=3).sum(dim=1)


@cache
def _compiled_eager(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(eager, dynamic=False, backend=COMPILERS[device])


def _compiled(inputs: SliceInputs, backward: bool) -> Tensor:
    return _autograd(_compiled_eager(inputs.words.device.type), inputs, backward)


def _autograd(
    function: Callable[[Tensor, Tensor], Tensor], inputs: SliceInputs, backward: bool
) -> Tensor:
    scores = function(inputs.words, inputs.frames)
    if backward:
        scores.backward(inputs.gradient.to(scores.dtype))
    return scores.detach()


def _two_way(name: str, fast: bool, words: Tensor, frames: Tensor) -> Tensor:
    masks = (torch.ones(x.shape[:2], dtype=torch.long, device=x.device) for x in (words, frames))
    return dmae_similarity(
        None,
        words,
        frames,
        *masks,
        interaction="att_ti",
        neighbour_frames=False,
        backend=name,
        fast=fast,
    )


def _one_way(fast: bool, inputs: SliceInputs, backward: bool) -> Tensor:
    words, frames = (x.detach().float() for x in (inputs.words, inputs.frames))
    weights = [x.new_full(x.shape[:2], 1 / x.shape[1]) for x in (words, frames)]
    valid = torch.ones_like(weights[0], dtype=torch.bool)
    all_slots = (words.shape[1],) * len(words)
    lengths = TextLengths(all_slots, all_slots)
    text = TokenSet(words, weights[0], valid, lengths)
    backend, _ = tile_backend((text,), FrameSet(frames, weights[1], None, None), None, fast)
    videos = VideoTensors(frames, None, None, None, None)
    scores, saved = backend.forward(text, videos, save=backward)
    if backward:
        found = backend.backward(inputs.gradient, saved, videos, lengths)
        inputs.words.grad = found.tokens.to(inputs.words.dtype)
        inputs.frames.grad = found.frames.to(inputs.frames.dtype)
    return scores


def _bare_product(inputs: SliceInputs, backward: bool) -> Tensor:
    """All products of words and frames, and for the backward two more of the same size."""
    words, frames = (x.detach().flatten(0, 1) for x in (inputs.words, inputs.frames))
    scores = words @ frames.T
    if backward:
        inputs.words.grad = (scores @ frames).view_as(inputs.words)
        inputs.frames.grad = (scores.T @ words).view_as(inputs.frames)
    return scores[:1]


def _call(function: Implementation, backward: bool, inputs: SliceInputs) -> Tensor:
    with torch.set_grad_enabled(backward):
        return function(inputs, backward)


def _check(name: str, inputs: SliceInputs, scores: Tensor) -> None:
    """Compares scores with the slice in float32; what is not the slice must be finite.

    Raises:
        Wrong: they differ, or something was not written.
    """
    grads = {"gradient of words": inputs.words.grad, "gradient of frames": inputs.frames.grad}
    check_finite({"scores": scores, **grads})
    if not name.startswith(("one-way", "eager", "torch.compile")):
        return
    few = inputs.words.detach()[:CHECKED_TEXTS].float()
    expected = eager(few, inputs.frames.detach().float())
    if name.startswith("one-way"):
        expected = expected / (2 * few.shape[1])
    difference = (scores[:CHECKED_TEXTS].float() - expected).abs().max() / expected.abs().max()
    if not float(difference) <= TOLERANCE:
        raise Wrong(f"scores differ from the definition by {float(difference):.2g}")


def _name(name: str, pairs: int, backward: bool) -> str:
    return f"{name}, {pairs} x {pairs}, {'forward + backward' if backward else 'forward'}"
