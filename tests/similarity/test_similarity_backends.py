"""Each backend equals the reference: value and every gradient, for every size, mask and chunk."""

import pytest
import torch
from test_similarity import FEATURES, assert_same, example, with_gradients
from torch import Tensor

from tvr.kernels import reference
from tvr.kernels.backends import cpu, cpu_build, matmul
from tvr.kernels.backends.matmul import uses_onednn
from tvr.kernels.checks import INTERACTIONS
from tvr.kernels.similarity import BACKENDS, dmae_similarity

# Chunks: single texts, uneven, more than there are, its own choice.
WAYS = {
    "compiled": {"backend": "compiled"},
    "torch": {"backend": "torch"},
    "tiles of 1": {"backend": "torch", "chunk": 1},
    "tiles of 3": {"backend": "torch", "chunk": 3},
    "tiles of 100": {"backend": "torch", "chunk": 100},
}

# texts, videos, words, frames, width: one of everything; 16 and 64 videos make one group and one
# tile of them, 129 numbers one row of registers and a rest; the last has several tiles each way.
SIZES = [
    (1, 1, 1, 1, 1),
    (5, 4, 6, 4, 8),
    (3, 16, 2, 1, 129),
    (7, 21, 32, 12, 16),
    (70, 70, 9, 7, 24),
]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    name, reason = cpu_build.available_backend()
    assert name == "compiled", reason


def masks(kind: str, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """`example` has ragged masks with words of mask 2."""
    if kind == "doubled":
        return {}
    of_words, of_frames = arguments["word_mask"], arguments["frame_mask"]
    if kind == "ragged":
        return {"word_mask": of_words.clamp(max=1)}
    return {"word_mask": torch.ones_like(of_words), "frame_mask": torch.ones_like(of_frames)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["full", "ragged", "doubled"])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_equals_the_reference(
    interaction: str, neighbours: bool, kind: str, dtype: torch.dtype, way: str
) -> None:
    options = {"interaction": interaction, "neighbour_frames": neighbours}
    tolerance = TOLERANCES[dtype]
    for texts, videos, words, frames, width in SIZES[:-1] if way == "tiles of 1" else SIZES:
        arguments = example(texts, videos, words, frames, width=width, dtype=dtype)
        arguments |= masks(kind, arguments)
        expected = with_gradients(reference.dmae_similarity, arguments, **options)
        found = with_gradients(dmae_similarity, arguments, **WAYS[way], **options)
        assert_same(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_word_part_alone_equals_the_reference(way: str) -> None:
    arguments = example(20, 20)

    def scores(door, **options) -> dict[str, Tensor]:
        return with_gradients(lambda sentence, **rest: door(None, **rest, **options), arguments)

    assert_same(
        scores(dmae_similarity, **WAYS[way]),
        scores(reference.dmae_similarity),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("way", ["compiled", "tiles of 1", "torch"])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_gradients_pass_gradcheck(interaction: str, neighbours: bool, way: str) -> None:
    arguments = example(3, 2, 3, 3, width=4, seed=5)
    features = [arguments[name].clone().requires_grad_() for name in FEATURES]

    def scores(*inputs: Tensor) -> Tensor:
        named = arguments | dict(zip(FEATURES, inputs, strict=True))
        options = {"interaction": interaction, "neighbour_frames": neighbours}
        return dmae_similarity(**named, **options, **WAYS[way])

    assert torch.autograd.gradcheck(scores, features)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("neighbours", [False, True])
def test_equal_entries_give_the_gradient_to_the_first(neighbours: bool, way: str) -> None:
    # Entries are small whole numbers, so that many maxima are equal and every sum is exact.
    arguments = example(20, 20, 6, 5, width=4)
    draw = torch.Generator().manual_seed(0)
    for name in ("sentence", "words", "frames"):
        arguments[name] = torch.randint(-1, 2, arguments[name].shape, generator=draw).double()
    options = {"interaction": "att_wti", "neighbour_frames": neighbours}
    expected = with_gradients(reference.dmae_similarity, arguments, **options)
    found = with_gradients(dmae_similarity, arguments, **WAYS[way], **options)
    assert_same(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_features_without_gradient_and_strided_gradients(way: str) -> None:
    arguments = example(20, 18)
    leaf = arguments["frames"].clone().requires_grad_()
    found = dmae_similarity(**arguments | {"frames": leaf}, **WAYS[way])
    expected = reference.dmae_similarity(**arguments | {"frames": leaf})
    weighting = torch.randn(18, 20, dtype=torch.float64).T
    (of_found,) = torch.autograd.grad(found, leaf, weighting)
    (of_expected,) = torch.autograd.grad(expected, leaf, weighting)
    torch.testing.assert_close(of_found, of_expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        again = dmae_similarity(**arguments | {"frames": leaf}, **WAYS[way])
    assert torch.equal(again, found)


@pytest.mark.parametrize("way", WAYS)
def test_not_a_number_reaches_every_pair_of_its_text_or_video(way: str) -> None:
    arguments = example(20, 20)
    arguments["words"][3, 0] = torch.nan
    arguments["frames"][17, 0] = torch.nan
    found = dmae_similarity(**arguments, **WAYS[way]).isnan()
    assert torch.equal(found, reference.dmae_similarity(**arguments).isnan())
    assert found.sum() == 20 + 20 - 1


def test_more_slots_than_a_byte_counts() -> None:
    # Words of 16 bits beside frames of 8, and more rows in a tile than 16 bits count.
    arguments = example(140, 30, 300, 3)
    expected = with_gradients(reference.dmae_similarity, arguments)
    found = with_gradients(dmae_similarity, arguments, chunk=120)
    assert_same(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbours", [False, True])
def test_another_library_of_products_gives_the_same(
    backend: str, neighbours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = example(70, 70, 9, 7, width=24, dtype=torch.float32)
    options = {"backend": backend, "neighbour_frames": neighbours}
    assert uses_onednn(arguments["frames"])
    expected = with_gradients(dmae_similarity, arguments, **options)
    assert not uses_onednn(arguments["frames"].double())
    with monkeypatch.context() as patch:
        patch.setattr(matmul, "SCHEMA", "another operation")
        assert not uses_onednn(arguments["frames"])
    for module in (cpu, matmul):
        monkeypatch.setattr(module, "uses_onednn", lambda like: False)
    found = with_gradients(dmae_similarity, arguments, **options)
    assert_same(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("neighbours", [False, True])
def test_on_a_gpu_the_tiles_equal_the_reference(interaction: str, neighbours: bool) -> None:
    options = {"interaction": interaction, "neighbour_frames": neighbours}
    for sizes in SIZES:
        arguments = example(*sizes[:4], width=sizes[4])
        there = {name: x.cuda() for name, x in arguments.items()}
        expected = with_gradients(reference.dmae_similarity, arguments, **options)
        for chunk in (None, 3):
            found = with_gradients(dmae_similarity, there, chunk=chunk, **options)
            found = {name: x.cpu() for name, x in found.items()}
            assert_same(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_fast_is_off_unless_asked_for_and_then_within_a_rounding(
    way: str, neighbours: bool
) -> None:
    options = {**WAYS[way], "neighbour_frames": neighbours}
    arguments = example(40, 40, width=64, dtype=torch.float32)
    exact = with_gradients(dmae_similarity, arguments, **options)
    fast = with_gradients(dmae_similarity, arguments, fast=True, **options)
    expected = with_gradients(reference.dmae_similarity, arguments, neighbour_frames=neighbours)
    assert_same(exact, expected, rtol=1e-5, atol=1e-5)
    # bfloat16 keeps 8 bits of products that reach 1; with neighbour frames another maximum may win,
    # whose neighbour is another one.
    difference = (fast["similarity"] - expected["similarity"]).abs()
    assert 1e-5 < difference.max() < 2**-6
    # Where the same maxima are found, the gradient is the exact one.
    same = torch.isclose(fast["words"], expected["words"], rtol=1e-4, atol=1e-6).all(dim=2)
    assert same.float().mean() > 0.8
    arguments = {name: x for name, x in arguments.items() if name != "words"}
    whole = dmae_similarity(words=None, **arguments, interaction="wti", fast=True, **options)
    assert whole.dtype == torch.float32


def test_fast_is_the_same_for_every_chunk() -> None:
    arguments = example(40, 40, width=64, dtype=torch.float32)
    expected = with_gradients(dmae_similarity, arguments, fast=True, backend="compiled")
    for way in WAYS:
        found = with_gradients(dmae_similarity, arguments, fast=True, **WAYS[way])
        assert_same(found, expected, rtol=1e-4, atol=1e-5)
