"""The dense tiles beyond parity: split products, sizes of tiles, large offsets, host reads."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.similarity_inputs import (
    FEATURES,
    assert_all_close,
    scores_and_gradients,
    similarity_inputs,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvr.kernels import reference
from tvr.kernels.backends import tile_compiler, torch_dense
from tvr.kernels.backends.matmul import parts, product_of_parts, split_inner_products
from tvr.kernels.backends.protocol import VideoTensors, mean_similarity
from tvr.kernels.backends.torch_dense import (
    MAX_ELEMENTS,
    MIN_SCORES_PER_TILE,
    DenseTiles,
    scores_per_tile,
)
from tvr.kernels.checks import INTERACTIONS
from tvr.kernels.numerics import unit
from tvr.kernels.similarity import default_backend, dmae_similarity
from tvr.kernels.text_lengths import TextLengths
from tvr.kernels.token_sets import TokenSet, prepare

GIB = 2**30


def dense(arguments: dict[str, Tensor], backend: DenseTiles, **options: Any) -> dict[str, Tensor]:
    """The similarity and its gradients from a backend of given settings."""

    def scores(
        interaction: str = "att_wti", neighbour_frames: bool = True, **leaves: Tensor
    ) -> Tensor:
        texts, videos = prepare(
            **leaves, interaction=interaction, neighbour_frames=neighbour_frames
        )
        return mean_similarity(texts, videos, backend)

    return scores_and_gradients(scores, arguments, **options)


def test_split_products_have_16_bits() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (unit(torch.randn(300, 257, generator=draw)) for _ in range(2))
    exact = x.double() @ y.double().T
    split = [parts(a, split=True) for a in (x, y)]
    assert all(part.dtype == torch.bfloat16 for a in split for part in a)
    by_parts = product_of_parts(split[0], tuple(a.T for a in split[1]))
    for actual in (by_parts, split_inner_products(*split)):
        assert actual.dtype == torch.float32
        # Cosines: single bfloat16 products would be off by 1e-3.
        assert (actual - exact).abs().max() < 2e-6
        torch.testing.assert_close(actual, by_parts, rtol=0, atol=1e-6)
    # Entries of one sign, whose errors add up.
    x, y = x.abs(), y.abs()
    actual = product_of_parts(*(parts(a, split=True) for a in (x, y.T)))
    exact = x.double() @ y.double().T
    assert ((actual - exact) / exact).abs().max() < 2e-5


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_split_products_keep_the_bounds_of_float32(interaction: str, neighbours: bool) -> None:
    options = {"interaction": interaction, "neighbour_frames": neighbours}
    for sizes in ((5, 4, 6, 4, 8), (7, 21, 32, 12, 16), (9, 16, 6, 5, 768)):
        arguments = similarity_inputs(*sizes[:4], width=sizes[4], dtype=torch.float32)
        expected = scores_and_gradients(reference.dmae_similarity, arguments, **options)
        actual = dense(arguments, DenseTiles(2**12, split=True), **options)
        assert_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_float64_is_never_split() -> None:
    arguments = similarity_inputs(20, 20)
    actual = dense(arguments, DenseTiles(2**12, split=True))
    expected = scores_and_gradients(reference.dmae_similarity, arguments)
    assert_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("split", [False, True])
def test_results_repeat_bit_for_bit(split: bool) -> None:
    arguments = similarity_inputs(70, 70, 9, 7, width=24, dtype=torch.float32)
    first, second = (dense(arguments, DenseTiles(2**12, split=split)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize(
    ("l2_bytes", "free_bytes", "expected"),
    [
        (50 * 2**20, 60 * GIB, 2**23),  # an H100
        (4 * 2**20, 10 * GIB, MIN_SCORES_PER_TILE),  # a small L2
        (50 * 2**20, GIB // 4, 2**21),  # hardly any memory
        (2**40, 2**50, 2**30),
        (50 * 2**20, 0, 1),
    ],
)
def test_tiles_fill_the_l2_cache_and_fit_the_free_memory(
    l2_bytes: int, free_bytes: int, expected: int
) -> None:
    assert scores_per_tile(l2_bytes, free_bytes) == expected
    # A run after this one finds a little less or more memory, and adds in the same order.
    assert scores_per_tile(l2_bytes, int(free_bytes * 0.97)) == expected
    assert scores_per_tile(l2_bytes, free_bytes) * 4 <= max(l2_bytes, 4 * MIN_SCORES_PER_TILE)


def test_a_gpu_is_measured_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 * 2**20

    free = [30 * GIB, GIB // 8]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free.pop(0), 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    torch_dense._cuda_scores_per_tile.cache_clear()
    try:
        sizes = [torch_dense.device_scores_per_tile(torch.device("cuda", 0)) for _ in range(2)]
    finally:
        torch_dense._cuda_scores_per_tile.cache_clear()
    assert sizes == [2**23] * 2


def test_a_tile_has_fewer_elements_than_32_bits_can_count() -> None:
    for backend in (DenseTiles(2**40), DenseTiles(2**20, chunk=10**6)):
        for slots, frames in ((1, 1), (1, 12), (32, 12), (77, 64)):
            texts = backend.texts_per_tile(slots, frames)
            assert 4 * texts**2 * slots * frames <= MAX_ELEMENTS
            assert 4 * (texts + 1) ** 2 * slots * frames > MAX_ELEMENTS
    assert DenseTiles(2**20).texts_per_tile(32, 12) == 26
    assert DenseTiles(1).texts_per_tile(32, 12) == 1


class Offsets(TorchDispatchMode):
    """Records the largest offset into a storage, and the numbers of elements of all storages."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.sizes = 0, set[int]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.offset = max(self.offset, x.storage_offset())
                self.sizes.add(x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(("slots", "split"), [(4, True), (1, False)])
def test_offsets_beyond_32_bits_and_no_host_reads(slots: int, split: bool) -> None:
    # On the device "meta" nothing is stored or computed, and a read by the host is an error.
    texts, videos, frames, width = 5_000, 2**20, 12, 256
    assert min(texts * videos, videos * frames * width) > MAX_ELEMENTS

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    mask = meta(texts, slots, dtype=torch.bool)
    lengths = TextLengths((slots,) * texts, (slots,) * texts)
    text = TokenSet(meta(texts, slots, width), meta(texts, slots), mask, lengths)
    of_frames = meta(videos, frames, dtype=torch.int64)
    weights = meta(videos, frames) if slots > 1 else None
    given = VideoTensors(
        meta(videos, frames, width), weights, None, meta(videos, frames), of_frames
    )
    backend = DenseTiles(2**30, split=split)
    with Offsets() as seen:
        scores, saved = backend.forward(text, given, save=True)
        found = backend.backward(scores, saved, given, lengths)
    assert scores.shape == (texts, videos)
    assert (found.tokens.shape, found.weights.shape) == (text.tokens.shape, text.weights.shape)
    assert found.frames.shape == given.frames.shape
    assert found.strength is not None
    assert found.strength.shape == of_frames.shape
    assert found.boosted is None
    assert seen.offset > MAX_ELEMENTS
    # Only the scores and the gradient of the frames are larger than 32 bits can count.
    large = {size for size in seen.sizes if size > MAX_ELEMENTS}
    assert large <= {texts * videos, videos * frames * width}


def test_saved_tensors_are_the_text_alone() -> None:
    texts, videos = prepare(
        **similarity_inputs(6, 6), interaction="att_wti", neighbour_frames=False
    )
    given = VideoTensors(videos.frames, videos.weights, None, None, None)
    backend = DenseTiles(2**12)
    _, saved = backend.forward(texts[1], given, save=True)
    assert all(a is b for a, b in zip(saved, texts[1].tensors, strict=True))
    assert backend.forward(texts[1], given, save=False)[1] == ()


def test_the_default_backend_of_a_device() -> None:
    assert default_backend("cuda", "not on a CPU") == "dense"
    assert default_backend("cpu", None) == "compiled"
    assert default_backend("cpu", "no compiler") == "torch"


# Runs in a subprocess: here pytest wraps every function of the package in checks of its shapes,
# which torch.compile cannot trace. The traced graphs run without inductor, whose C++ takes minutes
# to compile; `make gpu` runs the whole.
COMPILE = """
import functools, sys, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
from tvr.kernels.backends.tile_compiler import compile_failure
from tvr.kernels.similarity import dmae_similarity
arguments, weighting = torch.load(sys.argv[1])
assert compile_failure("cpu") is None, compile_failure("cpu")
results = []
for compile_tiles in (False, True):
    leaves = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in arguments.items()}
    options = {"backend": "dense", "chunk": 3, "compile_tiles": compile_tiles}
    scores = dmae_similarity(**leaves, **options)
    (scores * weighting).sum().backward()
    results.append([scores.detach(), *(x.grad for x in leaves.values() if x.grad is not None)])
for plain, compiled in zip(*results, strict=True):
    torch.testing.assert_close(compiled, plain, rtol=1e-10, atol=1e-10)
print(len(results[0]))
"""


def test_compiled_tiles_equal_the_others(tmp_path: Path) -> None:
    path = tmp_path / "arguments.pt"
    torch.save((similarity_inputs(20, 18), torch.randn(20, 18, dtype=torch.float64)), path)
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, str(path)],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["6"]  # scores and five gradients


def test_a_failing_compiler_is_named_once_and_the_tiles_still_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("\nno Triton for this device\nmore lines")

    tile_compiler.compile_failure.cache_clear()
    tile_compiler._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", fail)
    arguments = similarity_inputs(20, 18)
    try:
        with caplog.at_level(logging.WARNING):
            actual = [
                scores_and_gradients(
                    dmae_similarity, arguments, backend="dense", compile_tiles=True
                )
                for _ in range(2)
            ]
        reason = tile_compiler.compile_failure("cpu")
    finally:
        tile_compiler.compile_failure.cache_clear()
        tile_compiler._compiled.cache_clear()
    assert reason == "RuntimeError: no Triton for this device"
    assert [record.message for record in caplog.records] == [f"tiles are not compiled: {reason}"]
    expected = scores_and_gradients(reference.dmae_similarity, arguments)
    for result in actual:
        assert_all_close(result, expected, rtol=1e-10, atol=1e-10)
    assert set(expected) == {"similarity", *FEATURES}
