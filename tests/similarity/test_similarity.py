"""The similarity beyond the golden arrays: tiles, padding, order, precision, memory, refusals."""

import pytest
import torch
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
FEATURES = ("sentence", "words", "frames", "word_logits", "frame_logits")


def example(
    texts: int = 5,
    videos: int = 4,
    words: int = 6,
    frames: int = 4,
    *,
    width: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Random arguments with ragged masks; texts and videos of every length from 1 slot on."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def ragged(rows: int, slots: int) -> Tensor:
        lengths = torch.randint(1, slots + 1, (rows, 1), generator=draw)
        return (torch.arange(slots) < lengths).long()

    doubled = (torch.rand(texts, words, generator=draw) < 0.3).long()
    doubled[:, 0] = 0
    word_mask = ragged(texts, words)
    features = {
        "sentence": unit(normal(texts, width)),
        "words": unit(normal(texts, words, width)),
        "frames": unit(normal(videos, frames, width)),
        "word_logits": normal(texts, words),
        "frame_logits": normal(videos, frames),
    }
    masks = {"word_mask": word_mask * (1 + doubled), "frame_mask": ragged(videos, frames)}
    return {name: x.to(dtype) for name, x in features.items()} | masks


def with_gradients(
    door, arguments: dict[str, Tensor], *, autocast: bool = False, **options
) -> dict[str, Tensor]:
    """The similarity and the gradients of a fixed random weighting of it."""
    leaves = {n: x.clone().requires_grad_(n in FEATURES) for n, x in arguments.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scores = door(**leaves, **options)
    draw = torch.Generator().manual_seed(1)
    weighting = torch.randn(scores.shape, generator=draw, dtype=torch.float64).to(scores.device)
    (scores * weighting.to(scores.dtype)).sum().backward()
    gradients = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
    return {"similarity": scores.detach()} | {n: gradients[n] for n in FEATURES}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerances) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerances
        )


def pair_in_loops(x: Tensor, v: Tensor, neighbours: bool) -> tuple[Tensor, Tensor]:
    """p and q of one text's tokens and one video's frames, straight from the formulas."""
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
    arguments = example(texts=1, videos=1)
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
    found = dmae_similarity(**arguments, neighbour_frames=neighbours)
    assert found.item() == pytest.approx((sum(parts) / 2).item(), rel=1e-12)


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
    arguments = example(texts, videos)
    options = {"interaction": interaction, "neighbour_frames": neighbours}
    expected = with_gradients(reference.dmae_similarity, arguments, **options)
    found = with_gradients(dmae_similarity, arguments, chunk=chunk, **options)
    assert_same(found, expected, rtol=1e-10, atol=1e-13)


@EXAMPLES
@given(st.sampled_from(INTERACTIONS), st.integers(0, 99))
def test_permuting_texts_and_videos_permutes_the_similarity(interaction: str, seed: int) -> None:
    arguments = example(seed=seed)
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
    # One padded slot sets the floor of every maximum to 0 (verdict: match); more of them do not.
    def padded(arguments: dict[str, Tensor], words: int, frames: int) -> dict[str, Tensor]:
        out = dict(arguments)
        for name, x in arguments.items():
            extra = frames if name.startswith("frame") else words
            if name != "sentence":
                # Garbage, not zeros: what stands in a masked slot must not matter.
                filling = 0 if name.endswith("mask") else torch.nan
                tail = x.new_full((x.shape[0], extra, *x.shape[2:]), filling)
                out[name] = torch.cat([x, tail], dim=1)
        return out

    once = padded(example(seed=seed), 1, 1)
    more = padded(once, more_words, more_frames)
    found = with_gradients(dmae_similarity, more, interaction=interaction)
    expected = with_gradients(dmae_similarity, once, interaction=interaction)
    for name in ("words", "word_logits"):
        assert found[name][:, 7:].count_nonzero() == 0
        found[name] = found[name][:, :7]
    for name in ("frames", "frame_logits"):
        assert found[name][:, 5:].count_nonzero() == 0
        found[name] = found[name][:, :5]
    assert_same(found, expected, rtol=1e-10, atol=1e-13)


def test_masked_slot_wins_over_negative_similarity() -> None:
    # Verdict (match): valid similarity -1 beside one masked frame scores 0, not -1.
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
    # Verdict (match). A still video: both frames are the same, and here both words too.
    twice = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    masks = (torch.ones(1, 2).long(), torch.ones(1, 2).long())
    for chunk in (None, 1):
        words, frames = twice.clone().requires_grad_(), twice.clone().requires_grad_()
        options = {"interaction": "att_ti", "neighbour_frames": False, "chunk": chunk}
        dmae_similarity(None, words, frames, *masks, **options).sum().backward()
        # 1/2 (mean_t p + mean_f q): each of the two means sends a half to every token of its own
        # side, and 1 in all to the first of the other.
        assert words.grad[0, :, 0].tolist() == pytest.approx([(0.5 + 1) / 2, 0.5 / 2])
        assert frames.grad[0, :, 0].tolist() == pytest.approx([(0.5 + 1) / 2, 0.5 / 2])


def test_word_of_mask_2_counts_twice_and_only_the_ti_family_renormalises() -> None:
    # Verdict (match). Three words with p = 0.9, 0.5, 0.1 at the only frame; q = 0.9 either way.
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
def test_a_score_is_no_cosine_and_has_its_own_range(
    interaction: str, neighbours: bool, mask: int, largest: float
) -> None:
    # All words and frames alike, or opposite; all weight on words of that mask but the first.
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

    # 1/2 x 0.5 r S: the neighbour of video 0 has r = 0.96 and S = 0.6, that of video 1 none.
    assert gain([1, 1]) == pytest.approx([0.5 * 0.5 * 0.96 * 0.6, 0], abs=1e-7)
    assert gain([1, 0]) == [0, 0]


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_gradients_pass_gradcheck(interaction: str) -> None:
    arguments = example(3, 2, 3, 3, width=4, seed=5)
    features = [arguments[name].clone().requires_grad_() for name in FEATURES]

    def scores(*inputs: Tensor) -> Tensor:
        named = arguments | dict(zip(FEATURES, inputs, strict=True))
        return dmae_similarity(**named, interaction=interaction, chunk=1)

    assert torch.autograd.gradcheck(scores, features)


def test_sentence_interactions_do_not_read_the_words() -> None:
    arguments = example()
    for interaction in ("ti", "wti"):
        without = arguments | {"words": None, "word_logits": None}
        found = dmae_similarity(**without, interaction=interaction)
        assert torch.equal(found, dmae_similarity(**arguments, interaction=interaction))


@pytest.mark.parametrize("family", ["ti", "wti"])
def test_word_part_alone_and_sentence_part_average_to_the_whole(family: str) -> None:
    arguments = example()
    words = dmae_similarity(**arguments | {"sentence": None}, interaction=f"att_{family}")
    sentence = dmae_similarity(**arguments, interaction=family)
    whole = dmae_similarity(**arguments, interaction=f"att_{family}")
    torch.testing.assert_close((words + sentence) / 2, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_scored_in_float32_even_under_autocast(
    dtype: torch.dtype,
) -> None:
    # Verdict (differ): float32 scores, so that a logit at scale 100 is not rounded by 0.2.
    low = example(9, 9, dtype=dtype)
    exact = {n: x.float() if x.is_floating_point() else x for n, x in low.items()}
    expected = with_gradients(dmae_similarity, exact)
    found = with_gradients(dmae_similarity, low, autocast=True, chunk=2)
    plain = with_gradients(reference.dmae_similarity, low, autocast=True)["similarity"]
    assert found["similarity"].dtype == plain.dtype == torch.float32
    torch.testing.assert_close(found["similarity"], expected["similarity"])
    torch.testing.assert_close(plain, expected["similarity"])
    # Only the last step, into the leaf's own dtype, rounds.
    step = torch.finfo(dtype).eps
    for name in FEATURES:
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].float(), expected[name], rtol=step, atol=step)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_tensor_of_all_token_frame_scores_ever_exists() -> None:
    texts, videos, words, frames, chunk = 32, 48, 6, 4, 3
    arguments = example(texts, videos, words, frames)
    with LargestTensor() as tiled:
        with_gradients(dmae_similarity, arguments, chunk=chunk)
    with LargestTensor() as naive:
        with_gradients(reference.dmae_similarity, arguments)
    tile = chunk * 4 * chunk * words * frames
    assert tiled.elements == max(tile, texts * words * 8, texts * videos)
    assert naive.elements >= texts * videos * words * frames


def saved_bytes(pairs: int, words: int, frames: int, valid: int, **options) -> int:
    given = example(pairs, pairs, words, frames, dtype=torch.float32)
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
def test_a_pair_keeps_one_byte_for_each_maximum_and_none_for_padding(
    backend: str, valid: int
) -> None:
    words, frames = 8, 4
    small, large = (saved_bytes(n, words, frames, valid, backend=backend) for n in (64, 128))
    # What is kept is linear + quadratic: the second difference leaves the quadratic part.
    quadratic = (large - 2 * small) / (128**2 - 2 * 64**2)
    # The torch tiles keep one slot of padding, which counts as 0. The sentence: its best frame.
    slots = min(words, valid + (backend == "torch"))
    assert quadratic == pytest.approx(slots + frames + 1, abs=0.1)


def test_chosen_chunk_fills_but_does_not_exceed_a_tile() -> None:
    arguments = example(texts=2, videos=2, words=32, frames=12)
    texts, videos = prepare(**arguments, interaction="att_wti", neighbour_frames=True)
    chunk = texts_per_tile(texts, videos)
    assert 4 * chunk**2 * 32 * 12 <= SCORES_PER_TILE < 4 * (chunk + 1) ** 2 * 32 * 12


def test_unit_has_length_one_and_leaves_a_zero_vector_without_gradient() -> None:
    # Verdict (differ): the reference divides by 0 there.
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], requires_grad=True)
    found = unit(x)
    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0], [0, 0]]
    found.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[1:].count_nonzero() == 0
    assert unit(x.detach().half()).dtype == torch.float32
    assert torch.autograd.gradcheck(unit, torch.randn(3, 4).double().requires_grad_())


def changed(**replaced: Tensor | None) -> dict[str, Tensor | None]:
    return example() | replaced


def mask_with(name: str, row: int, slot: slice | int, value: int) -> dict[str, Tensor | None]:
    mask = torch.ones_like(example()[name])
    mask[row, slot] = value
    return changed(**{name: mask})


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        (changed(), {"interaction": "mean"}, "interaction='mean'.*att_wti"),
        (changed(sentence=None), {"interaction": "wti"}, "'wti' needs sentence"),
        (changed(words=None), {}, "'att_wti' needs words"),
        (changed(word_logits=None), {}, "'att_wti' needs word_logits"),
        (changed(frame_logits=None), {"interaction": "wti"}, "'wti' needs frame_logits"),
        (changed(sentence=torch.ones(4, 8)), {}, r"sentence has shape \(4, 8\).*\(5, 8\)"),
        (changed(frame_mask=torch.ones(4, 3).long()), {}, r"frame_mask .*\(4, 3\).*\(4, 4\)"),
        (changed(frames=torch.ones(4, 8)), {}, r"frames must be \(C, F, D\)"),
        (mask_with("word_mask", 3, slice(None), 0), {}, r"word_mask\[3\] has no valid slot"),
        (mask_with("frame_mask", 2, slice(None), 0), {}, r"frame_mask\[2\] has no valid slot"),
        (mask_with("word_mask", 1, 0, 0), {}, r"word_mask\[1, 0\] is 0.*right"),
        (mask_with("word_mask", 1, 2, 3), {}, r"word_mask\[1, 2\] is 3"),
        (mask_with("frame_mask", 1, 2, 2), {}, r"frame_mask\[1, 2\] is 2"),
        (mask_with("frame_mask", 1, 2, -1), {}, r"frame_mask\[1, 2\] is -1"),
    ],
)
def test_refusals_name_what_is_wrong(arguments: dict, options: dict, named: str) -> None:
    # __wrapped__ leaves out the shape checker of the tests, which a user does not have.
    for door in (dmae_similarity, reference.dmae_similarity):
        with pytest.raises(ValueError, match=named):
            door.__wrapped__(**arguments, **options)


def test_chunk_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        dmae_similarity(**example(), chunk=0)
