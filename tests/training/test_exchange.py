"""Exchange between ranks with unequal numbers of pairs: rows, gradients and loss are exact."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders import plain_model as plain
from builders.exhaustive import principal_and_further
from builders.plain_model import (
    CAPTION_IDS,
    PAIRS,
    VIDEO_IDS,
    Gradients,
    plain_batch,
    plain_model,
)
from builders.spawn import spawn
from builders.worlds import world_of
from torch import Tensor

from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.distributed.collectives import loss_collectives
from tvr.trainer.distributed.exchange import AllGatherExchange, RingExchange
from tvr.trainer.distributed.world import World
from tvr.trainer.loss.gradient_cache import FeatureCache
from tvr.trainer.loss.objective import objective

# Pairs of each rank, and the micro-batches of a rank with that many under the gradient cache.
COUNTS = {1: (14,), 2: (8, 6), 3: (5, 3, 6), 4: (5, 3, 4, 2)}
MICRO_BATCHES = {14: (5, 1, 8), 8: (3, 5), 6: (1, 2, 3), 5: (2, 3), 4: (3, 1), 3: (3,), 2: (1, 1)}
LOSSES = {
    "info_nce": LossConfig(similarity="info_nce", mask_equal_captions=True),
    "reference": LossConfig(neg_nce_mode="reference"),
    "log": LossConfig(neg_nce_mode="log"),
    "set": LossConfig(neg_nce_mode="set", hardness=0.5, drop_above=0.1),
    "sigmoid": LossConfig(similarity="sigmoid", sigmoid_bias=-30.0),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PATHS = list(product(("gather", "ring"), ("keep", "stream"), (False, True)))
CASES = [(*path, loss, dtype) for path in PATHS for loss in LOSSES for dtype in TOLERANCE]
ONE_WAY_CASES = [(*path, "log", torch.float64, "words_to_frames") for path in PATHS]
EXCHANGES = {"gather": AllGatherExchange, "ring": RingExchange}
# Rows of each rank: unequal, equal, and none on one rank.
ROW_COUNTS = {
    "unequal": lambda rank: (5, 3, 4, 2)[rank],
    "equal": lambda rank: 3,
    "empty": lambda rank: 2 * rank,
}


def loss_and_gradients(
    world: World,
    exchange: Any,
    scores: Any,
    cached: bool,
    loss: LossConfig,
    dtype: torch.dtype,
    matching: plain.Matching = "two_way",
) -> tuple[float, Gradients]:
    """Computes loss and gradients of the whole batch from this rank's part, as the trainer does."""
    counts = COUNTS[world.world_size]
    mine = plain.split(plain_batch(dtype), counts)[world.rank]
    ids, caption_ids = (
        of_all.split(list(counts))[world.rank] for of_all in (VIDEO_IDS, CAPTION_IDS)
    )
    model = plain_model(dtype, matching=matching)

    def compute(features: Any) -> Any:
        return objective(
            features,
            ids,
            ModelConfig(matching=matching),
            loss,
            world,
            caption_ids=caption_ids,
            exchange=exchange,
            scores=scores,
        )

    if cached:
        micro_batches = plain.split(mine, MICRO_BATCHES[len(ids)])
        cache = FeatureCache(model, micro_batches, world.device)
        found = compute(cache.features)
        found.for_backward.backward()
        cache.replay(lambda part: part.backward())
    else:
        found = compute(model(mine))
        found.for_backward.backward()
    gradients = plain.gradients_of(model)
    # One collective for all gradients: starting one costs more than the transfer.
    mine = [found.shares[0] * world.world_size, *(x.flatten() for x in gradients.values())]
    mean = loss_collectives(world).sum(torch.hstack(mine)) / world.world_size
    loss_value, *parts = mean.split([1, *(x.numel() for x in gradients.values())])
    named = zip(gradients.items(), parts, strict=True)
    return float(loss_value), {name: part.view_as(x) for (name, x), part in named}


def rows_of(rank: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's rows: a non-contiguous tensor, integers, bfloat16."""
    values = torch.arange(2 * count, dtype=torch.float64).view(2, count).T + 100 * rank
    return values, torch.arange(count) - rank, values[:, :1].bfloat16()


def exchange_rows(name: str, world: World, count: int) -> dict[str, Any]:
    """Returns the rows that a rank receives, and the gradients of its own rows."""
    exchange = EXCHANGES[name](world, world.all_gather_counts(count))
    mine = rows_of(world.rank, count)
    seen, places = [], set()
    for first, piece in exchange.visit(mine):
        seen.append((first, *(x.clone() for x in piece)))
        places.add(piece[0].data_ptr())

    def gradients(first: int, piece: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values, _, halves = piece
        columns = first + torch.arange(len(values), dtype=torch.float64)
        return values * (world.rank + 1) + columns[:, None], torch.ones_like(halves)

    home = exchange.visit_backward(mine, gradients)
    return {"seen": seen, "home": home, "buffers": len(places)}


def on_every_rank(rank: int, world_size: int) -> dict[Any, Any]:
    world = world_of(rank, world_size)
    results: dict[Any, Any] = {
        case: loss_and_gradients(world, *case[:3], LOSSES[case[3]], *case[4:])
        for case in CASES + ONE_WAY_CASES
    }
    for name, rows in product(EXCHANGES, ROW_COUNTS):
        results[name, rows] = exchange_rows(name, world, ROW_COUNTS[rows](rank))
    return results


@pytest.fixture(
    scope="module",
    params=principal_and_further(sorted(COUNTS), [3]),
    ids=lambda size: f"{size} ranks",
)
def by_rank(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    return spawn(on_every_rank, request.param, timeout_s=600)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_path_equals_a_single_process(
    by_rank: list[dict[Any, Any]], loss: str, dtype: torch.dtype
) -> None:
    value, gradients = plain.defined(LOSSES[loss], dtype)
    for results in by_rank:
        for path in PATHS:
            ours, of_parameters = results[*path, loss, dtype]
            assert ours == pytest.approx(value, rel=TOLERANCE[dtype]), path
            plain.assert_close(of_parameters, gradients, relative=TOLERANCE[dtype])


def test_every_path_equals_a_single_process_where_words_alone_choose(
    by_rank: list[dict[Any, Any]],
) -> None:
    value, gradients = plain.defined(LOSSES["log"], torch.float64, "words_to_frames")
    assert value != pytest.approx(plain.defined(LOSSES["log"], torch.float64)[0], rel=1e-3)
    for results in by_rank:
        for case in ONE_WAY_CASES:
            ours, of_parameters = results[case]
            assert ours == pytest.approx(value, rel=1e-10), case
            plain.assert_close(of_parameters, gradients, relative=1e-10)


def test_the_cases_have_different_losses() -> None:
    # Otherwise the comparison above would prove nothing.
    (value, gradients), *others = (plain.defined(LOSSES[loss], torch.float64) for loss in LOSSES)
    for other, of_parameters in others:
        assert abs(other - value) > 1e-3 * value
        with pytest.raises(AssertionError):
            plain.assert_close(of_parameters, gradients, relative=1e-3)
    for name in ("info_nce", "log"):
        off = replace(LOSSES[name], mask_equal_captions=False)
        masked, compared = (plain.defined(each, torch.float64)[0] for each in (LOSSES[name], off))
        assert masked < compared - 1e-3
    assert all(sum(counts) == PAIRS for counts in COUNTS.values())


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("name", EXCHANGES)
def test_pieces_have_their_columns_and_gradients_reach_their_owner(
    by_rank: list[dict[Any, Any]], name: str, rows: str
) -> None:
    size = len(by_rank)
    counts = [ROW_COUNTS[rows](rank) for rank in range(size)]
    firsts = [sum(counts[:rank]) for rank in range(size)]
    everyone = [rows_of(rank, count) for rank, count in enumerate(counts)]
    for rank, results in enumerate(by_rank):
        seen, home = results[name, rows]["seen"], results[name, rows]["home"]
        if name == "gather":
            whole = [torch.cat(column) for column in zip(*everyone, strict=True)]
            expected = [(0, *whole)]
        else:
            owners = [(rank - hop) % size for hop in range(size)]
            expected = [(firsts[owner], *everyone[owner]) for owner in owners]
        assert [first for first, *_ in seen] == [first for first, *_ in expected]
        for (_, *ours), (_, *theirs) in zip(seen, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
            assert [x.dtype for x in ours] == [x.dtype for x in theirs]
        columns = firsts[rank] + torch.arange(counts[rank], dtype=torch.float64)
        of_values = everyone[rank][0] * sum(range(1, size + 1)) + size * columns[:, None]
        assert torch.equal(home[0], of_values)
        assert torch.equal(home[1], torch.full_like(everyone[rank][2], size))
        assert len(home) == 2


def test_the_ring_never_holds_more_than_two_pieces(by_rank: list[dict[Any, Any]]) -> None:
    for results in by_rank:
        # The rank's own rows, and two alternating buffers.
        assert results["ring", "unequal"]["buffers"] == min(3, len(by_rank))


TIME_OUT = timedelta(seconds=4)


def break_off(rank: int, world_size: int, folder: Path) -> str:
    """Rank 1 fails at its first piece but keeps running; the others wait for the time-out."""
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=TIME_OUT,
    )
    exchange = RingExchange(world_of(rank, world_size), (2,) * world_size)
    raised = ""
    try:
        for _ in exchange.visit((torch.zeros(2, 3),)):
            if rank == 1:
                raise KeyError("the cause")
    except (KeyError, RuntimeError) as error:
        raised = type(error).__name__
    (folder / f"ended-{rank}").touch()
    while len(list(folder.glob("ended-*"))) < world_size:
        time.sleep(0.05)
    dist.destroy_process_group()
    return raised


def test_a_rank_that_fails_half_way_does_not_hang_the_others(tmp_path: Path) -> None:
    # Longer than the group's time-out, and much shorter than a run's.
    ended = spawn(break_off, 3, tmp_path, timeout_s=60)
    # Rank 2 waits for a piece from rank 1. Rank 0 sends to rank 1, and whether it fails depends on
    # the transport.
    assert ended[1:] == ["KeyError", "RuntimeError"]
