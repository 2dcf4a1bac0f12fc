"""The matching `words_to_frames`: every backend and the streamed loss equal the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders.partial_inputs import partial_inputs, weight_layer
from builders.ranks_in_threads import ThreadCollectives, on_ranks
from builders.similarity_inputs import (
    FEATURES,
    assert_all_close,
    scores_and_gradients,
    similarity_inputs,
)
from test_similarity_backends import VARIANTS, masks
from test_streamed_loss import (
    RULES,
    ThreadExchange,
    assert_equal,
    loss_of_reference,
    loss_of_tiles,
)
from torch import Tensor

from tvr.kernels import reference
from tvr.kernels.checks import INTERACTIONS, MATCHINGS
from tvr.kernels.losses import LossTerms
from tvr.kernels.partial import tpm_cl
from tvr.kernels.row_loss.streamed_loss import streamed_loss
from tvr.kernels.similarity import BACKENDS, dmae_similarity

ONE_WAY: dict[str, Any] = {"matching": "words_to_frames"}
# One slot each; one frame; several groups of 16 videos; several tiles in both directions.
SIZES = [(1, 1, 1, 1, 1), (3, 16, 2, 1, 129), (7, 21, 9, 5, 16), (70, 70, 9, 7, 24)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_every_backend_equals_the_reference(
    interaction: str, neighbours: bool, variant: str
) -> None:
    options = ONE_WAY | {"interaction": interaction, "neighbour_frames": neighbours}
    small_tiles = VARIANTS[variant].get("chunk", 100) < 100
    for size in SIZES[:-1] if small_tiles else SIZES:
        for kind, dtype in (("full", torch.float32), ("doubled", torch.float64)):
            arguments = similarity_inputs(*size[:4], width=size[4], dtype=dtype)
            arguments |= masks(kind, arguments)
            if kind == "doubled":
                arguments["word_mask"][::3, 0] = 2  # a sentence of mask 2
            expected = scores_and_gradients(reference.dmae_similarity, arguments, **options)
            actual = scores_and_gradients(
                dmae_similarity, arguments, **VARIANTS[variant], **options
            )
            tolerance = 1e-5 if dtype == torch.float32 else 1e-10
            assert_all_close(actual, expected, rtol=tolerance, atol=tolerance)
            assert not actual["frame_logits"].any()


def test_equals_loops_over_tokens() -> None:
    arguments = similarity_inputs(3, 4, 5, 3)
    words, frames = arguments["words"], arguments["frames"]
    word_mask, frame_mask = arguments["word_mask"], arguments["frame_mask"]
    scores = dmae_similarity(**arguments, interaction="att_ti", neighbour_frames=False, **ONE_WAY)

    def best(token: Tensor, video: int) -> float:
        shown = frames[video] * frame_mask[video][:, None]
        return max(float(token @ frame) for frame in shown)

    for text in range(3):
        for video in range(4):
            of_words = [
                int(word_mask[text, t]) * best(words[text, t], video)
                for t in range(5)
                if word_mask[text, t]
            ]
            mean = sum(of_words) / int(word_mask[text].sum())
            expected = (best(arguments["sentence"][text], video) + mean) / 2
            assert scores[text, video].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interaction", ["wti", "att_wti"])
def test_gradients_pass_gradcheck(interaction: str, backend: str) -> None:
    arguments = similarity_inputs(3, 2, 3, 3, width=4, seed=5)
    features = [arguments[name].clone().requires_grad_() for name in FEATURES[:-1]]

    def scores(*inputs: Tensor) -> Tensor:
        named = arguments | dict(zip(FEATURES, inputs, strict=False))
        return dmae_similarity(**named, interaction=interaction, backend=backend, **ONE_WAY)

    assert torch.autograd.gradcheck(scores, features)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_streamed_rows_equal_the_square(interaction: str, neighbours: bool, rule: str) -> None:
    arguments = similarity_inputs(7, 7)
    ids = torch.tensor([0, 1, 2, 1, 3, 4, 0])
    options = ONE_WAY | {"interaction": interaction, "neighbour_frames": neighbours}
    expected = loss_of_reference(arguments, RULES[rule], ids, **options)
    options |= {"video_ids": ids, "caption_ids": torch.tensor([5, 6, 5, 7, 8, 7, 5])}
    for chunk, keep_scores, backend in ((1, False, "torch"), (3, True, "dense"), (None,) * 3):
        options |= {"chunk": chunk, "keep_scores": bool(keep_scores), "backend": backend}
        assert_equal(loss_of_tiles(arguments, RULES[rule], **options), expected)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("counts", [[7], [4, 3], [3, 1, 3]], ids=str)
def test_ranks_share_the_loss_of_one(counts: list[int], neighbours: bool) -> None:
    arguments = similarity_inputs(7, 7)
    options = ONE_WAY | {"neighbour_frames": neighbours}
    expected, whole = loss_of_reference(arguments, RULES["log"], **options)
    shards = {name: x.split(counts) for name, x in arguments.items()}

    def work(collectives: ThreadCollectives, rank: int) -> tuple[LossTerms, dict[str, Tensor]]:
        return loss_of_tiles(
            {name: parts[rank] for name, parts in shards.items()},
            RULES["log"],
            row_offset=sum(counts[:rank]),
            num_pairs=7,
            collectives=collectives,
            exchange=ThreadExchange(collectives, counts),
            chunk=2,
            **options,
        )

    results = on_ranks(work, len(counts))
    total = torch.stack([terms.loss.detach() for terms, _ in results]).sum()
    torch.testing.assert_close(total, expected.loss.detach(), rtol=1e-10, atol=1e-13)
    joined = {name: torch.cat([grads[name] for _, grads in results]) for name in whole}
    assert_all_close(joined, whole, rtol=1e-9, atol=1e-12)


def test_frames_need_no_weights_and_save_no_maxima() -> None:
    arguments = similarity_inputs(6, 20)
    expected = dmae_similarity(**arguments, **ONE_WAY)
    without = arguments | {"frame_logits": None}
    for function in (reference.dmae_similarity, dmae_similarity):
        torch.testing.assert_close(function(**without, **ONE_WAY), expected)
        with pytest.raises(ValueError, match="needs frame_logits"):
            function(**without)
        with pytest.raises(ValueError, match="matching='frames_to_words' is unknown"):
            function(**arguments, matching="frames_to_words")
    with pytest.raises(ValueError, match="unknown"):
        streamed_loss(**similarity_inputs(3, 3), rule=RULES["log"], matching="one_way")

    def saved_bytes(matching: str, backend: str) -> int:
        leaves = {n: x.clone().requires_grad_(n in FEATURES) for n, x in arguments.items()}
        seen: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.dtype == torch.uint8:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            scores = dmae_similarity(**leaves, matching=matching, backend=backend)
        assert scores.requires_grad
        return sum(seen.values())

    for backend in ("compiled", "torch"):
        two_way, one_way = (saved_bytes(matching, backend) for matching in MATCHINGS)
        assert two_way - one_way == 6 * 20 * 4  # a byte for each text, video and frame


@pytest.mark.parametrize("learned", [False, True])
def test_tpm_cl_compares_a_token_with_its_best_frame(learned: bool) -> None:
    arguments = partial_inputs() | {"frame_weight_layer": weight_layer() if learned else None}
    found = tpm_cl(**arguments, **ONE_WAY)
    masks = torch.ones(3, 1, dtype=torch.long), arguments["frame_mask"]
    options = ONE_WAY | {"interaction": "ti", "neighbour_frames": False}
    whole = reference.dmae_similarity(
        arguments["sentence"], None, arguments["frames"], *masks, **options
    )
    torch.testing.assert_close(found.sentence_frames, whole.diagonal())
    assert (found.sentence_partial_frames <= found.sentence_frames.clamp(min=0) + 1e-12).all()
    assert not torch.allclose(found.hinge, tpm_cl(**arguments).hinge)
    plain = tpm_cl(**arguments | {"frame_weight_layer": None}, **ONE_WAY)
    assert torch.equal(found.hinge, plain.hinge)  # the layer has no part
    names = ("sentence", "words", "frames", "word_weights")
    small = partial_inputs(2, 3, 3, 4)
    leaves = [small[name].clone().requires_grad_() for name in names]

    def hinge(*given: Tensor) -> Tensor:
        return tpm_cl(**small | dict(zip(names, given, strict=True)), chunk=1, **ONE_WAY).hinge

    assert torch.autograd.gradcheck(hinge, leaves)
    with pytest.raises(ValueError, match="matching='x' is unknown"):
        tpm_cl(**arguments, matching="x")
