"""Each backend equals the reference: value and every gradient, for every size, mask and chunk."""

from itertools import product

import pytest
import torch
from builders.exhaustive import principal_and_further
from builders.similarity_inputs import (
    FEATURES,
    assert_all_close,
    scores_and_gradients,
    similarity_inputs,
)
from torch import Tensor

from tvr.kernels import reference
from tvr.kernels.backends import cpu, cpu_build, matmul
from tvr.kernels.backends.matmul import uses_onednn
from tvr.kernels.checks import INTERACTIONS
from tvr.kernels.similarity import BACKENDS, dmae_similarity

# Chunk sizes: the backend's choice, one text, one that divides nothing, more than there are.
VARIANTS = {
    "compiled": {"backend": "compiled"},
    "torch": {"backend": "torch"},
    "tiles of 1": {"backend": "torch", "chunk": 1},
    "dense": {"backend": "dense"},
    "dense of 3": {"backend": "dense", "chunk": 3},
    "tiles of 3": {"backend": "torch", "chunk": 3},
    "tiles of 100": {"backend": "torch", "chunk": 100},
}

# Texts, videos, words, frames, width. 16 videos are one group and 64 one tile of the compiled
# kernels; width 129 leaves a remainder; the last size has several tiles in both directions.
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
    """Replaces the ragged masks with words of mask 2 of `similarity_inputs`."""
    if kind == "doubled":
        return {}
    word_mask, frame_mask = arguments["word_mask"], arguments["frame_mask"]
    if kind == "ragged":
        return {"word_mask": word_mask.clamp(max=1)}
    return {"word_mask": torch.ones_like(word_mask), "frame_mask": torch.ones_like(frame_mask)}


@pytest.mark.parametrize(
    ("variant", "dtype", "kind", "neighbours", "interaction"),
    principal_and_further(
        product(VARIANTS, TOLERANCES, ["full", "ragged", "doubled"], [False, True], INTERACTIONS),
        # Each backend with the authors' interaction in every other respect, and each interaction.
        [
            *product(
                ["compiled", "torch", "dense"], TOLERANCES, ["doubled"], [False, True], ["att_wti"]
            ),
            *product(
                ["compiled", "tiles of 3", "dense of 3"],
                [torch.float32],
                ["ragged"],
                [True],
                INTERACTIONS,
            ),
        ],
    ),
)
def test_equals_the_reference(
    interaction: str, neighbours: bool, kind: str, dtype: torch.dtype, variant: str
) -> None:
    options = {"interaction": interaction, "neighbour_frames": neighbours}
    tolerance = TOLERANCES[dtype]
    # The last size is for tiles of the backend's own choice; small ones it only makes many.
    small_tiles = VARIANTS[variant].get("chunk", 100) < 100
    for texts, videos, words, frames, width in SIZES[:-1] if small_tiles else SIZES:
        arguments = similarity_inputs(texts, videos, words, frames, width=width, dtype=dtype)
        arguments |= masks(kind, arguments)
        expected = scores_and_gradients(reference.dmae_similarity, arguments, **options)
        actual = scores_and_gradients(dmae_similarity, arguments, **VARIANTS[variant], **options)
        assert_all_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_word_part_alone_equals_the_reference(variant: str) -> None:
    arguments = similarity_inputs(20, 20)

    def scores(function, **options) -> dict[str, Tensor]:
        return scores_and_gradients(
            lambda sentence, **rest: function(None, **rest, **options), arguments
        )

    assert_all_close(
        scores(dmae_similarity, **VARIANTS[variant]),
        scores(reference.dmae_similarity),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize(
    ("variant", "neighbours", "interaction"),
    principal_and_further(
        product(["compiled", "tiles of 1", "torch", "dense"], [False, True], INTERACTIONS),
        list(product(["compiled", "tiles of 1", "torch", "dense"], [True], ["att_wti"])),
    ),
)
def test_gradients_pass_gradcheck(interaction: str, neighbours: bool, variant: str) -> None:
    arguments = similarity_inputs(3, 2, 3, 3, width=4, seed=5)
    features = [arguments[name].clone().requires_grad_() for name in FEATURES]

    def scores(*inputs: Tensor) -> Tensor:
        named = arguments | dict(zip(FEATURES, inputs, strict=True))
        options = {"interaction": interaction, "neighbour_frames": neighbours}
        return dmae_similarity(**named, **options, **VARIANTS[variant])

    assert torch.autograd.gradcheck(scores, features)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("neighbours", [False, True])
def test_equal_entries_give_the_gradient_to_the_first(neighbours: bool, variant: str) -> None:
    # Features are small integers, so that many maxima are equal and every sum is exact.
    arguments = similarity_inputs(20, 20, 6, 5, width=4)
    draw = torch.Generator().manual_seed(0)
    for name in ("sentence", "words", "frames"):
        arguments[name] = torch.randint(-1, 2, arguments[name].shape, generator=draw).double()
    options = {"interaction": "att_wti", "neighbour_frames": neighbours}
    expected = scores_and_gradients(reference.dmae_similarity, arguments, **options)
    actual = scores_and_gradients(dmae_similarity, arguments, **VARIANTS[variant], **options)
    assert_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_without_gradient_and_strided_gradients(variant: str) -> None:
    arguments = similarity_inputs(20, 18)
    leaf = arguments["frames"].clone().requires_grad_()
    actual = dmae_similarity(**arguments | {"frames": leaf}, **VARIANTS[variant])
    expected = reference.dmae_similarity(**arguments | {"frames": leaf})
    weighting = torch.randn(18, 20, dtype=torch.float64).T
    (actual_gradient,) = torch.autograd.grad(actual, leaf, weighting)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, weighting)
    torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        without_gradient = dmae_similarity(**arguments | {"frames": leaf}, **VARIANTS[variant])
    assert torch.equal(without_gradient, actual)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_features_make_every_score_of_their_text_or_video_nan(variant: str) -> None:
    arguments = similarity_inputs(20, 20)
    arguments["words"][3, 0] = torch.nan
    arguments["frames"][17, 0] = torch.nan
    actual = dmae_similarity(**arguments, **VARIANTS[variant]).isnan()
    assert torch.equal(actual, reference.dmae_similarity(**arguments).isnan())
    assert actual.sum() == 20 + 20 - 1


def test_more_slots_than_one_byte_can_index() -> None:
    # Word indices need 16 bits and frame indices 8; a tile has more rows than 16 bits can count.
    arguments = similarity_inputs(140, 30, 300, 3)
    expected = scores_and_gradients(reference.dmae_similarity, arguments)
    actual = scores_and_gradients(dmae_similarity, arguments, chunk=120)
    assert_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbours", [False, True])
def test_results_do_not_depend_on_the_matrix_library(
    backend: str, neighbours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = similarity_inputs(70, 70, 9, 7, width=24, dtype=torch.float32)
    options = {"backend": backend, "neighbour_frames": neighbours}
    assert uses_onednn(arguments["frames"])
    expected = scores_and_gradients(dmae_similarity, arguments, **options)
    assert not uses_onednn(arguments["frames"].double())
    with monkeypatch.context() as patch:
        patch.setattr(matmul, "SCHEMA", "another operation")
        assert not uses_onednn(arguments["frames"])
    for module in (cpu, matmul):
        monkeypatch.setattr(module, "uses_onednn", lambda like: False)
    actual = scores_and_gradients(dmae_similarity, arguments, **options)
    assert_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("neighbours", [False, True])
def test_on_a_gpu_the_tiles_equal_the_reference(
    interaction: str, neighbours: bool, backend: str
) -> None:
    options = {"interaction": interaction, "neighbour_frames": neighbours}
    for sizes in SIZES:
        arguments = similarity_inputs(*sizes[:4], width=sizes[4])
        on_gpu = {name: x.cuda() for name, x in arguments.items()}
        expected = scores_and_gradients(reference.dmae_similarity, arguments, **options)
        for chunk in (None, 3):
            given = {"chunk": chunk, "backend": backend, **options}
            actual = scores_and_gradients(dmae_similarity, on_gpu, **given)
            actual = {name: x.cpu() for name, x in actual.items()}
            assert_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("variant", "neighbours"),
    principal_and_further(
        product(VARIANTS, [False, True]), list(product(["compiled", "torch", "dense"], [True]))
    ),
)
def test_fast_is_off_by_default_and_within_bfloat16_rounding(
    variant: str, neighbours: bool
) -> None:
    options = {**VARIANTS[variant], "neighbour_frames": neighbours}
    arguments = similarity_inputs(40, 40, width=64, dtype=torch.float32)
    exact = scores_and_gradients(dmae_similarity, arguments, **options)
    fast = scores_and_gradients(dmae_similarity, arguments, fast=True, **options)
    expected = scores_and_gradients(
        reference.dmae_similarity, arguments, neighbour_frames=neighbours
    )
    assert_all_close(exact, expected, rtol=1e-5, atol=1e-5)
    # bfloat16 has 8 significant bits, and products reach 1. Rounding can change the best frame, and
    # with it the neighbour frame.
    difference = (fast["similarity"] - expected["similarity"]).abs()
    assert 1e-5 < difference.max() < 2**-6
    # Where rounding does not change the maxima, the gradients are exact.
    same = torch.isclose(fast["words"], expected["words"], rtol=1e-4, atol=1e-6).all(dim=2)
    assert same.float().mean() > 0.8
    arguments = {name: x for name, x in arguments.items() if name != "words"}
    whole = dmae_similarity(words=None, **arguments, interaction="wti", fast=True, **options)
    assert whole.dtype == torch.float32


def test_fast_is_the_same_for_every_chunk() -> None:
    arguments = similarity_inputs(40, 40, width=64, dtype=torch.float32)
    expected = scores_and_gradients(dmae_similarity, arguments, fast=True, backend="compiled")
    for variant in VARIANTS:
        actual = scores_and_gradients(dmae_similarity, arguments, fast=True, **VARIANTS[variant])
        assert_all_close(actual, expected, rtol=1e-4, atol=1e-5)
