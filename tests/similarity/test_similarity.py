"""The similarity beyond the golden arrays: tiles, padding, order, precision and memory."""

import pytest
import torch
from builders.similarity_inputs import (
    FEATURES,
    assert_all_close,
    scores_and_gradients,
    similarity_inputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvr.kernels import reference
from tvr.kernels.backends.torch_tiles import SCORES_PER_TILE, texts_per_tile
from tvr.kernels.checks import INTERACTIONS
from tvr.kernels.numerics import unit
from tvr.kernels.similarity import BACKENDS, dmae_similarity
from tvr.kernels.token_sets import prepare

EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True)


def pair_in_loops(x: Tensor, v: Tensor, neighbours: bool) -> tuple[Tensor, Tensor]:
    """p and q of one text's tokens and one video's frames, in loops over the formulas."""
    scores = x @ v.T
    p = []
    for row in scores:
        best = int(row.argmax())
        value = row[best]
        if neighbours:
            related = [v[best] @ v[g] if g != best else v.new_zeros(()) for g in range(len(v))]
            other = int(torch.stack(related).argmax())
            value = value + 0.5 * related[other] * row[other]
        p.append(value)
    return torch.stack(p), scores.max(dim=0).values


@pytest.mark.parametrize("neighbours", [False, True])
def test_one_pair_equals_the_formulas_in_loops(neighbours: bool) -> None:
    arguments = similarity_inputs(texts=1, videos=1)
    arguments["word_mask"], arguments["frame_mask"] = (
        torch.ones(1, 6).long(),
        torch.ones(1, 4).long(),
    )
    x, v = arguments["words"][0], arguments["frames"][0]
    alpha, beta = (arguments[n][0].softmax(0) for n in ("word_logits", "frame_logits"))
    parts = []
    for tokens, weights in ((arguments["sentence"], torch.ones(1).double()), (x, alpha)):
        p, q = pair_in_loops(tokens, v, neighbours)
        parts.append((weights @ p + beta @ q) / 2)
    actual = dmae_similarity(**arguments, neighbour_frames=neighbours)
    assert actual.item() == pytest.approx((sum(parts) / 2).item(), rel=1e-12)


@EXAMPLES
@given(
    st.sampled_from(INTERACTIONS),
    st.booleans(),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_result_does_not_depend_on_the_chunk(
    interaction: str, neighbours: bool, texts: int, videos: int, chunk: int
) -> None:
    arguments = similarity_inputs(texts, videos)
    options = {"interaction": interaction, "neighbour_frames": neighbours}
    expected = scores_and_gradients(reference.dmae_similarity, arguments, **options)
    actual = scores_and_gradients(dmae_similarity, arguments, chunk=chunk, **options)
    assert_all_close(actual, expected, rtol=1e-10, atol=1e-13)


@EXAMPLES
@given(st.sampled_from(INTERACTIONS), st.integers(0, 99))
def test_permuting_texts_and_videos_permutes_the_similarity(interaction: str, seed: int) -> None:
    arguments = similarity_inputs(seed=seed)
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(5, generator=draw), torch.randperm(4, generator=draw)
    moved = {
        name: x[columns] if name.startswith("frame") else x[rows] for name, x in arguments.items()
    }
    scores = dmae_similarity(**arguments, interaction=interaction)
    torch.testing.assert_close(
        dmae_similarity(**moved, interaction=interaction, chunk=2), scores[rows][:, columns]
    )


@EXAMPLES
@given(st.sampled_from(INTERACTIONS), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_padding_beyond_one_slot_changes_nothing(
    interaction: str, more_words: int, more_frames: int, seed: int
) -> None:
    # One padded slot adds a similarity of 0 to every maximum; more padded slots change nothing.
    def padded(arguments: dict[str, Tensor], words: int, frames: int) -> dict[str, Tensor]:
        out = dict(arguments)
        for name, x in arguments.items():
            extra = frames if name.startswith("frame") else words
            if name != "sentence":
                # NaN instead of zeros: the content of a masked slot must not matter.
                filling = 0 if name.endswith("mask") else torch.nan
                tail = x.new_full((x.shape[0], extra, *x.shape[2:]), filling)
                out[name] = torch.cat([x, tail], dim=1)
        return out

    once = padded(similarity_inputs(seed=seed), 1, 1)
    more = padded(once, more_words, more_frames)
    actual = scores_and_gradients(dmae_similarity, more, interaction=interaction)
    expected = scores_and_gradients(dmae_similarity, once, interaction=interaction)
    for name in ("words", "word_logits"):
        assert actual[name][:, 7:].count_nonzero() == 0
        actual[name] = actual[name][:, :7]
    for name in ("frames", "frame_logits"):
        assert actual[name][:, 5:].count_nonzero() == 0
        actual[name] = actual[name][:, :5]
    assert_all_close(actual, expected, rtol=1e-10, atol=1e-13)


def test_masked_slot_wins_over_negative_similarity() -> None:
    # As published: similarity -1 beside a masked frame scores 0, not -1.
    sentence = torch.tensor([[1.0, 0.0]])
    frames = torch.tensor([[[-1.0, 0.0], [0.6, 0.8]]])
    word_mask = torch.ones(1, 3).long()

    def score(frame_mask: list[int]) -> float:
        masks = (word_mask, torch.tensor([frame_mask]))
        return dmae_similarity(sentence, None, frames, *masks, interaction="ti").item()

    assert score([1, 0]) == pytest.approx((0 - 1) / 2)
    alone = dmae_similarity(
        sentence, None, frames[:, :1], word_mask, torch.ones(1, 1).long(), interaction="ti"
    )
    assert alone.item() == pytest.approx(-1)


def test_equal_entries_give_the_gradient_to_the_first() -> None:
    # As published. Both frames are equal, and so are both words.
    twice = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    masks = (torch.ones(1, 2).long(), torch.ones(1, 2).long())
    for chunk in (None, 1):
        words, frames = twice.clone().requires_grad_(), twice.clone().requires_grad_()
        options = {"interaction": "att_ti", "neighbour_frames": False, "chunk": chunk}
        dmae_similarity(None, words, frames, *masks, **options).sum().backward()
        # SIM = 1/2 (mean_t p + mean_f q). Each mean gives every token of its own side a gradient
        # of 1/2, and the first token of the other side 1 in total.
        assert words.grad[0, :, 0].tolist() == pytest.approx([(0.5 + 1) / 2, 0.5 / 2])
        assert frames.grad[0, :, 0].tolist() == pytest.approx([(0.5 + 1) / 2, 0.5 / 2])


def test_word_of_mask_2_counts_twice_and_only_the_ti_family_renormalises() -> None:
    # As published. Three words have p = 0.9, 0.5, 0.1 at the only frame, and q = 0.9.
    frames = torch.tensor([[[1.0, 0.0]]])
    values = torch.tensor([0.9, 0.5, 0.1])
    words = torch.stack([values, (1 - values**2).sqrt()], dim=1)[None]
    options = {"word_logits": torch.zeros(1, 3), "frame_logits": torch.zeros(1, 1)}

    def words_only(interaction: str, mask: list[int]) -> float:
        masks = (torch.tensor([mask]), torch.ones(1, 1).long())
        return dmae_similarity(
            None, words, frames, *masks, interaction=interaction, **options
        ).item()

    assert words_only("att_ti", [1, 2, 1]) == pytest.approx(((0.9 + 1.0 + 0.1) / 4 + 0.9) / 2)
    assert words_only("att_wti", [1, 2, 1]) == pytest.approx(((0.9 + 1.0 + 0.1) / 3 + 0.9) / 2)
    assert words_only("att_wti", [1, 1, 1]) == pytest.approx((1.5 / 3 + 0.9) / 2)


@pytest.mark.parametrize(
    ("interaction", "neighbours", "mask", "largest"),
    [
        ("att_wti", True, 1, 1.25),
        ("att_wti", True, 2, 1.625),
        ("att_wti", False, 1, 1.0),
        ("att_wti", False, 2, 1.25),
        ("att_ti", True, 2, 1.25),
        ("wti", True, 2, 1.25),
    ],
)
def test_scores_reach_the_ends_of_their_documented_range(
    interaction: str, neighbours: bool, mask: int, largest: float
) -> None:
    # All words and frames are equal, or opposite; the first word has almost no weight.
    frames = torch.tensor([[[1.0, 0.0]] * 3, [[-1.0, 0.0]] * 3])
    similarity = dmae_similarity(
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[[1.0, 0.0]] * 3]),
        frames,
        torch.tensor([[1, mask, mask]]),
        torch.ones(2, 3).long(),
        interaction=interaction,
        neighbour_frames=neighbours,
        word_logits=torch.tensor([[-99.0, 0.0, 0.0]]),
        frame_logits=torch.zeros(2, 3),
    )
    assert similarity.tolist() == [pytest.approx([largest, -largest])]


def test_neighbour_frames_need_a_second_valid_similar_frame() -> None:
    sentence = torch.tensor([[1.0, 0.0]])
    frames = torch.tensor([[[0.8, 0.6], [0.6, 0.8]], [[0.8, 0.6], [-0.8, -0.6]]])
    word_mask = torch.ones(1, 1).long()

    def gain(frame_mask: list[int]) -> list[float]:
        masks = (word_mask, torch.tensor([frame_mask, frame_mask]))
        on, off = (
            dmae_similarity(sentence, None, frames, *masks, interaction="ti", neighbour_frames=n)
            for n in (True, False)
        )
        return (on - off).squeeze(0).tolist()

    # The gain is 1/2 x 0.5 r S. Video 0 has r = 0.96 and S = 0.6; video 1 has no neighbour.
    assert gain([1, 1]) == pytest.approx([0.5 * 0.5 * 0.96 * 0.6, 0], abs=1e-7)
    assert gain([1, 0]) == [0, 0]


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_gradients_pass_gradcheck(interaction: str) -> None:
    arguments = similarity_inputs(3, 2, 3, 3, width=4, seed=5)
    features = [arguments[name].clone().requires_grad_() for name in FEATURES]

    def scores(*inputs: Tensor) -> Tensor:
        named = arguments | dict(zip(FEATURES, inputs, strict=True))
        return dmae_similarity(**named, interaction=interaction, chunk=1)

    assert torch.autograd.gradcheck(scores, features)


def test_sentence_interactions_do_not_read_the_words() -> None:
    arguments = similarity_inputs()
    for interaction in ("ti", "wti"):
        without = arguments | {"words": None, "word_logits": None}
        actual = dmae_similarity(**without, interaction=interaction)
        assert torch.equal(actual, dmae_similarity(**arguments, interaction=interaction))


@pytest.mark.parametrize("family", ["ti", "wti"])
def test_word_part_alone_and_sentence_part_average_to_the_whole(family: str) -> None:
    arguments = similarity_inputs()
    words = dmae_similarity(**arguments | {"sentence": None}, interaction=f"att_{family}")
    sentence = dmae_similarity(**arguments, interaction=family)
    whole = dmae_similarity(**arguments, interaction=f"att_{family}")
    torch.testing.assert_close((words + sentence) / 2, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_scored_in_float32_even_under_autocast(
    dtype: torch.dtype,
) -> None:
    # Float32 scores: rounding to bfloat16 would change a logit at scale 100 by 0.2.
    low = similarity_inputs(9, 9, dtype=dtype)
    exact = {n: x.float() if x.is_floating_point() else x for n, x in low.items()}
    expected = scores_and_gradients(dmae_similarity, exact)
    actual = scores_and_gradients(dmae_similarity, low, autocast=True, chunk=2)
    plain = scores_and_gradients(reference.dmae_similarity, low, autocast=True)["similarity"]
    assert actual["similarity"].dtype == plain.dtype == torch.float32
    torch.testing.assert_close(actual["similarity"], expected["similarity"])
    torch.testing.assert_close(plain, expected["similarity"])
    # Gradients are rounded once, to the dtype of the input.
    step = torch.finfo(dtype).eps
    for name in FEATURES:
        assert actual[name].dtype == dtype
        torch.testing.assert_close(actual[name].float(), expected[name], rtol=step, atol=step)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_no_tensor_of_all_token_frame_scores_ever_exists(backend: str) -> None:
    texts, videos, words, frames, chunk = 32, 48, 6, 4, 3
    arguments = similarity_inputs(texts, videos, words, frames)
    with LargestTensor() as tiled:
        scores_and_gradients(dmae_similarity, arguments, chunk=chunk, backend=backend)
    with LargestTensor() as naive:
        scores_and_gradients(reference.dmae_similarity, arguments)
    tile = chunk * 4 * chunk * words * frames
    assert tiled.elements == max(tile, texts * words * 8, texts * videos)
    assert naive.elements >= texts * videos * words * frames


def saved_bytes(pairs: int, words: int, frames: int, valid: int, **options) -> int:
    """Bytes saved for the backward, for texts with `valid` words each."""
    given = similarity_inputs(pairs, pairs, words, frames, dtype=torch.float32)
    given["word_mask"] = (torch.arange(words) < valid).long().repeat(pairs, 1)
    arguments = {n: x.requires_grad_(n in FEATURES) for n, x in given.items()}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scores = dmae_similarity(**arguments, **options)
    assert scores.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("valid", [8, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_saves_one_byte_per_maximum_and_none_for_padding(backend: str, valid: int) -> None:
    words, frames = 8, 4
    small, large = (saved_bytes(n, words, frames, valid, backend=backend) for n in (64, 128))
    # The saved bytes are linear + quadratic in the pairs; the difference isolates the second part.
    quadratic = (large - 2 * small) / (128**2 - 2 * 64**2)
    # The torch tiles save one padded slot, which counts as 0. The sentence saves its best frame.
    # The dense tiles find the maxima again.
    slots = min(words, valid + (backend == "torch"))
    of_maxima = 0 if backend == "dense" else slots + frames + 1
    assert quadratic == pytest.approx(of_maxima, abs=0.1)


def test_chosen_chunk_fills_but_does_not_exceed_a_tile() -> None:
    arguments = similarity_inputs(texts=2, videos=2, words=32, frames=12)
    texts, videos = prepare(**arguments, interaction="att_wti", neighbour_frames=True)
    chunk = texts_per_tile(texts, videos)
    assert 4 * chunk**2 * 32 * 12 <= SCORES_PER_TILE < 4 * (chunk + 1) ** 2 * 32 * 12


def test_unit_vectors_have_length_one_and_zero_vectors_no_gradient() -> None:
    # The authors' code divides by 0 here.
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], requires_grad=True)
    actual = unit(x)
    assert actual.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0], [0, 0]]
    actual.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[1:].count_nonzero() == 0
    assert unit(x.detach().half()).dtype == torch.float32
    assert torch.autograd.gradcheck(unit, torch.randn(3, 4).double().requires_grad_())
