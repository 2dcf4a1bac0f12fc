"""The streamed loss equals the loss of stored scores: value and gradients, for any ranks."""

from collections.abc import Callable, Iterator

import pytest
import torch
from builders.ranks_in_threads import ThreadCollectives, on_ranks
from builders.similarity_inputs import (
    FEATURES,
    assert_all_close,
    similarity_inputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvr.kernels import reference
from tvr.kernels.backends import cpu_build
from tvr.kernels.checks import INTERACTIONS
from tvr.kernels.losses import LossTerms, row_loss
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK
from tvr.kernels.row_loss.row_loss import LossRule
from tvr.kernels.row_loss.streamed_loss import streamed_loss
from tvr.kernels.similarity import BACKENDS

RULES = {
    "info_nce": LossRule(None, scale=20.0),
    "reference": LossRule("reference", scale=20.0),
    "log": LossRule("log", scale=20.0),
}
PAIRS = 7
CAPTION_IDS = torch.tensor([5, 6, 5, 7, 8, 7, 5])
CHUNKS = (1, 3, 100, None)


def loss_of_reference(
    arguments: dict[str, Tensor], rule: LossRule, ids: Tensor | None = None, **options
) -> tuple[LossTerms, dict[str, Tensor]]:
    leaves = {n: x.clone().requires_grad_(n in FEATURES) for n, x in arguments.items()}
    scores = reference.dmae_similarity(**leaves, **options)
    captions = None if ids is None else CAPTION_IDS
    terms = row_loss(
        scores,
        rule,
        row_offset=0,
        collectives=SINGLE_RANK,
        video_ids=ids,
        caption_ids=captions,
    )
    terms.loss.backward()
    return terms, {n: x.grad for n, x in leaves.items() if x.grad is not None}


def loss_of_tiles(
    arguments: dict[str, Tensor], rule: LossRule, **options
) -> tuple[LossTerms, dict[str, Tensor]]:
    leaves = {n: x.clone().requires_grad_(n in FEATURES) for n, x in arguments.items()}
    terms = streamed_loss(**leaves, rule=rule, **options)
    terms.loss.backward()
    return terms, {n: x.grad for n, x in leaves.items() if x.grad is not None}


def assert_equal(
    actual: tuple[LossTerms, dict[str, Tensor]], expected: tuple[LossTerms, dict[str, Tensor]]
) -> None:
    for name in LossTerms.__dataclass_fields__:
        got, want = (getattr(terms, name).detach() for terms in (actual[0], expected[0]))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    assert_all_close(actual[1], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keep_scores", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_equals_the_reference(
    interaction: str, neighbours: bool, rule: str, keep_scores: bool
) -> None:
    arguments = similarity_inputs(PAIRS, PAIRS)
    ids = torch.tensor([0, 1, 2, 1, 3, 4, 0])
    options = {"interaction": interaction, "neighbour_frames": neighbours}
    expected = loss_of_reference(arguments, RULES[rule], ids, **options)
    options |= {"video_ids": ids, "caption_ids": CAPTION_IDS, "keep_scores": keep_scores}
    for chunk in CHUNKS:
        actual = loss_of_tiles(arguments, RULES[rule], chunk=chunk, **options)
        assert_equal(actual, expected)


def test_torch_tiles_are_used_without_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = similarity_inputs(PAIRS, PAIRS)
    expected = loss_of_reference(arguments, RULES["log"])
    monkeypatch.setattr(cpu_build, "available_backend", lambda: ("torch", "for this test"))
    for chunk in CHUNKS:
        assert_equal(loss_of_tiles(arguments, RULES["log"], chunk=chunk), expected)


@pytest.mark.parametrize("keep_scores", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_can_be_named(backend: str, keep_scores: bool) -> None:
    arguments = similarity_inputs(PAIRS, PAIRS)
    expected = loss_of_reference(arguments, RULES["log"])
    for chunk in CHUNKS:
        options = {"chunk": chunk, "backend": backend, "keep_scores": keep_scores}
        assert_equal(loss_of_tiles(arguments, RULES["log"], **options), expected)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_pass_gradcheck(rule: str) -> None:
    arguments = similarity_inputs(3, 3, 2, 2, width=3, seed=5)
    features = [arguments[name].clone().requires_grad_() for name in FEATURES]

    def loss(*inputs: Tensor) -> Tensor:
        named = arguments | dict(zip(FEATURES, inputs, strict=True))
        return streamed_loss(**named, rule=RULES[rule], chunk=2).loss

    assert torch.autograd.gradcheck(loss, features)


class ThreadExchange:
    """An `Exchange` between threads: one block per rank, this rank's block first."""

    def __init__(self, collectives: ThreadCollectives, counts: list[int]) -> None:
        self.collectives, self.counts = collectives, counts

    def visit(self, mine: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        gathered = [self.collectives.gather(x) for x in mine]
        ranks = range(len(self.counts))
        for rank in ((self.collectives.rank + i) % len(ranks) for i in ranks):
            yield sum(self.counts[:rank]), tuple(x[rank] for x in gathered)

    def visit_backward(
        self,
        mine: tuple[Tensor, ...],
        gradients: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        actual = {column: gradients(column, block) for column, block in self.visit(mine)}
        parts = zip(*(actual[column] for column in sorted(actual)), strict=True)
        whole = [torch.stack(self.collectives.gather(torch.cat(p))).sum(0) for p in parts]
        rank = self.collectives.rank
        return tuple(x.split(self.counts)[rank] for x in whole)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(RULES)),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 99),
    st.booleans(),
)
def test_does_not_depend_on_the_split_over_ranks(
    rule: str, counts: list[int], chunk: int, seed: int, keep_scores: bool
) -> None:
    arguments = similarity_inputs(sum(counts), sum(counts), seed=seed)
    expected, whole = loss_of_reference(arguments, RULES[rule])
    shards = {name: x.split(counts) for name, x in arguments.items()}

    def work(collectives: ThreadCollectives, rank: int) -> tuple[LossTerms, dict[str, Tensor]]:
        return loss_of_tiles(
            {name: parts[rank] for name, parts in shards.items()},
            RULES[rule],
            row_offset=sum(counts[:rank]),
            num_pairs=sum(counts),
            collectives=collectives,
            exchange=ThreadExchange(collectives, counts),
            keep_scores=keep_scores,
            chunk=chunk,
        )

    results = on_ranks(work, len(counts))
    for name in LossTerms.__dataclass_fields__:
        total = torch.stack([getattr(terms, name).detach() for terms, _ in results]).sum()
        torch.testing.assert_close(total, getattr(expected, name).detach(), rtol=1e-10, atol=1e-13)
    joined = {name: torch.cat([grads[name] for _, grads in results]) for name in whole}
    assert_all_close(joined, whole, rtol=1e-9, atol=1e-12)


def test_saved_memory_is_linear_in_the_pairs() -> None:
    def saved_bytes(pairs: int) -> int:
        arguments = similarity_inputs(pairs, pairs, 3, 2, width=4, dtype=torch.float32)
        leaves = {n: x.requires_grad_(n in FEATURES) for n, x in arguments.items()}
        seen: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            terms = streamed_loss(**leaves, rule=RULES["log"], chunk=8)
        assert terms.loss.requires_grad
        return sum(seen.values())

    small, middle, large = (saved_bytes(pairs) for pairs in (64, 128, 256))
    assert large - middle == 2 * (middle - small)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        streamed_loss(**similarity_inputs(3, 3), rule=RULES["log"], chunk=0)
    with pytest.raises(ValueError, match="row_offset=2"):
        streamed_loss(**similarity_inputs(3, 3), rule=RULES["log"], row_offset=2, num_pairs=4)
    with pytest.raises(ValueError, match="mode='plain'"):
        LossRule("plain")
