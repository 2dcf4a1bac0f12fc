"""TPM-CL in chunks: the result and the scratch memory do not depend on the chunk or the batch."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from builders.partial_inputs import partial_inputs, weight_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvr.kernels import checkpointed_chunks
from tvr.kernels.partial import AttentionTokenWeights, LinearTokenWeights, TpmCl, tpm_cl

PAIRS = 7
CHUNKS = (1, 3, PAIRS - 1, PAIRS + 5)  # one pair, uneven (3 + 3 + 1, 6 + 1), more than B
FEATURES = ("sentence", "words", "frames", "word_weights", "frame_weights")
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def with_gradients(arguments: dict[str, Any], *, learned: bool, **options: Any) -> list[Tensor]:
    """Every field of the result, and the gradients of a random weighted sum of all fields."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in FEATURES}
    layer = weight_layer(arguments["frames"].shape[2]) if learned else None
    terms = tpm_cl(**arguments | leaves | {"frame_weight_layer": layer}, **options)
    fields = [getattr(terms, name) for name in TpmCl.__dataclass_fields__]
    mix = torch.randn(len(fields), PAIRS, generator=torch.Generator().manual_seed(1)).double()
    (torch.stack(fields) * mix).sum().backward()
    leaf_gradients = [
        torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values()
    ] + [p.grad for p in (layer.parameters() if layer else ()) if p.grad is not None]
    return [*fields, *leaf_gradients]


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("normalise_partial", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_result_and_gradients_are_the_same_for_every_chunk(
    chunk: int, learned: bool, normalise_partial: bool, straight_through: bool
) -> None:
    options = {
        "learned": learned,
        "normalise_partial": normalise_partial,
        "straight_through": straight_through,
    }
    whole = with_gradients(partial_inputs(PAIRS), **options)
    actual = with_gradients(partial_inputs(PAIRS), **options, chunk=chunk)
    assert len(actual) == 6 + len(FEATURES) + 2 * learned
    for ours, expected in zip(actual, whole, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)
    reached = [bool(x.count_nonzero()) for x in actual[6:]]
    assert reached == [True] * 4 + [straight_through] + [True, True] * learned


def predictor(kind: str) -> nn.Module:
    torch.manual_seed(0)  # so that every call makes the same parameters
    if kind == "linear":
        return LinearTokenWeights(3, 5, 16).double()
    return AttentionTokenWeights(3, 16, reduce=kind).double()


@pytest.mark.parametrize("kind", ["linear", "sum", "max"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_weights_are_the_same_for_every_chunk(chunk: int, masked: bool, kind: str) -> None:
    draw = torch.Generator().manual_seed(2)
    queries, tokens, mix = (
        torch.randn(PAIRS, *shape, generator=draw).double() for shape in ((3, 16), (5, 16), (5,))
    )
    mask = (torch.arange(5) < torch.tensor([[1], [2], [3], [4], [5], [5], [2]])).long()

    def weights_and_gradients(chunk: int | None) -> list[Tensor]:
        module, leaves = predictor(kind), [x.clone().requires_grad_() for x in (queries, tokens)]
        weights = module(*leaves, mask if masked else None, chunk=chunk)
        inputs = [*leaves, *module.parameters()]
        return [weights, *torch.autograd.grad((weights * mix).sum(), inputs)]

    for ours, expected in zip(
        weights_and_gradients(chunk), weights_and_gradients(None), strict=True
    ):
        torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("learned", [False, True])
def test_gradients_of_chunks_pass_gradcheck(learned: bool) -> None:
    arguments = partial_inputs(pairs=3, words=4, frames=3, width=4)
    layer = weight_layer(4) if learned else None
    parameters = list(layer.parameters()) if layer else []
    features = [arguments[name].clone().requires_grad_() for name in FEATURES[:4]]

    def hinge(*values: Tensor) -> Tensor:
        # gradcheck perturbs the layer's parameters in place, so they are not passed on.
        features = dict(zip(FEATURES[:4], values[:4], strict=True))
        return tpm_cl(**arguments | features | {"frame_weight_layer": layer}, chunk=2).hinge

    assert torch.autograd.gradcheck(hinge, [*features, *parameters])


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99), st.randoms(use_true_random=False))
def test_result_does_not_depend_on_order_or_chunks_of_pairs(
    pairs: int, chunk: int, seed: int, shuffler: Any
) -> None:
    arguments = partial_inputs(pairs, seed=seed)
    order = list(range(pairs))
    shuffler.shuffle(order)
    shuffled = {n: x[order] for n, x in arguments.items() if isinstance(x, Tensor)}
    layer = weight_layer()
    actual = tpm_cl(**shuffled, frame_weight_layer=layer, chunk=chunk)
    whole = tpm_cl(**arguments | {"frame_weight_layer": layer}, chunk=pairs)
    for name in TpmCl.__dataclass_fields__:
        torch.testing.assert_close(getattr(actual, name), getattr(whole, name)[order], **EXACT)


def test_chunks_are_recomputed_under_the_autocast_of_the_forward() -> None:
    # The predictor runs in bfloat16; TPM-CL never does.
    torch.manual_seed(0)
    module = LinearTokenWeights(4, 5, 8)
    features = {n: x.float() for n, x in partial_inputs(PAIRS).items() if n in FEATURES}
    features |= {name: partial_inputs(PAIRS)[name] for name in ("frame_mask", "frame_weight_layer")}

    def gradients(chunk: int) -> list[Tensor]:
        frames = features["frames"].clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            word_weights = module(frames, features["words"], chunk=chunk)
            mine = {"frames": frames, "word_weights": word_weights}
            hinge = tpm_cl(**features | mine, chunk=chunk).hinge
        return [hinge, *torch.autograd.grad(hinge.sum(), [frames, *module.parameters()])]

    whole = gradients(PAIRS)
    assert whole[0].dtype == torch.float32
    for ours, expected in zip(gradients(2), whole, strict=True):
        # Sums over the pairs of a chunk are rounded to bfloat16, 8 significant bits.
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(ours, expected, rtol=0, atol=scale / 64)


def test_chosen_chunks_have_bounded_entries() -> None:
    chunk = checkpointed_chunks.pairs_per_chunk(
        None, 44 * 512
    )  # 32 words and 12 frames of width 512
    assert chunk * 44 * 512 <= checkpointed_chunks.ENTRIES_PER_CHUNK < (chunk + 1) * 44 * 512
    assert checkpointed_chunks.pairs_per_chunk(None, 2 * checkpointed_chunks.ENTRIES_PER_CHUNK) == 1
    assert checkpointed_chunks.pairs_per_chunk(5, 2 * checkpointed_chunks.ENTRIES_PER_CHUNK) == 5


def test_only_several_chunks_are_recomputed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def layer(frames: Tensor) -> Tensor:  # called twice a chunk: all frames, and the kept ones
        calls.append(len(frames))
        return frames.sum(dim=2)

    arguments = partial_inputs(PAIRS) | {"frame_weight_layer": layer}
    arguments["frames"].requires_grad_()
    tpm_cl(**arguments).hinge.sum().backward()
    assert calls == [PAIRS, PAIRS]
    calls.clear()
    entries_per_pair = (5 + 4) * 8
    monkeypatch.setattr(checkpointed_chunks, "ENTRIES_PER_CHUNK", 3 * entries_per_pair)
    tpm_cl(**arguments).hinge.sum().backward()
    assert sorted(calls) == sorted([3, 3, 1] * 2 * 2)


class PeakBytes(TorchDispatchMode):
    """Peak bytes of the tensors that operators allocate while this mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.seen:
            self.seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, num_bytes: int) -> None:
        self.live -= num_bytes


def peak_bytes(pairs: int, chunk: int | None) -> int:
    """Peak of predictors and TPM-CL, forward and backward, above the inputs."""
    num_words, num_frames, width = 8, 6, 32
    arguments = partial_inputs(pairs, words=num_words, frames=num_frames, width=width)
    word_predictor = LinearTokenWeights(num_frames, num_words, width).double()
    frame_predictor = LinearTokenWeights(1, num_frames, width).double()
    layer = weight_layer(width)
    sentence, words, frames = (arguments[name].requires_grad_() for name in FEATURES[:3])
    with PeakBytes() as memory:
        arguments["word_weights"] = word_predictor(frames, words, chunk=chunk)
        arguments["frame_weights"] = frame_predictor(sentence[:, None], frames, chunk=chunk)
        arguments["frame_weight_layer"] = layer
        tpm_cl(**arguments, chunk=chunk, straight_through=True).hinge.mean().backward()
    assert frames.grad is not None
    return memory.peak


def test_peak_memory_grows_with_the_gradients_only() -> None:
    bytes_per_pair = 8 * (1 + 8 + 6) * 32  # of the input features
    small, middle, large = (peak_bytes(pairs, chunk=4) for pairs in (32, 64, 128))
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.02)  # linear, not quadratic
    copies = (large - middle) / 64 / bytes_per_pair
    one_chunk = (peak_bytes(128, None) - peak_bytes(64, None)) / 64 / bytes_per_pair
    # Gradients from TPM-CL and from the predictors, before and after chunks are concatenated.
    assert 1 < copies < 3.2
    assert one_chunk > 8
