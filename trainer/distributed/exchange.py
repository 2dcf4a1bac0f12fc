"""How everyone's videos pass by a rank: gathered in one piece, or around a ring, one rank's a time.

Both are the `Exchange` that `kernels.stream` asks for, and give the same numbers up to the order in
which ranks' gradients are added. They move plain tensors: autograd is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

from tvr.trainer.distributed.collectives import all_gather_rows_no_grad, reduce_scatter_rows
from tvr.trainer.distributed.world import World

Tensors = tuple[Tensor, ...]
Gradients = Callable[[int, Tensors], Tensors]


class AllGatherExchange:
    """All ranks' rows in one piece, while it is visited and not between the visits.

    Alive at once, beside the rank's own rows: the G rows, in `visit_back` also their gradients;
    where the ranks' counts differ, for a moment twice that, for the padding.
    """

    def __init__(self, world: World, counts: Sequence[int]) -> None:
        self._world, self._counts = world, counts

    def visit(self, mine: Tensors) -> Iterator[tuple[int, Tensors]]:
        yield 0, self._everyones(mine)

    def visit_back(self, mine: Tensors, gradients: Gradients) -> Tensors:
        sums = gradients(0, self._everyones(mine))
        if self._world.world_size == 1:
            return sums
        return tuple(reduce_scatter_rows(x, self._world, self._counts) for x in sums)

    def _everyones(self, mine: Tensors) -> Tensors:
        if self._world.world_size == 1:
            return _plain(mine)
        return tuple(all_gather_rows_no_grad(x, self._world, self._counts) for x in _plain(mine))


class RingExchange:
    """One rank's rows at a time, the own ones first; each then goes on to the next rank.

    A transfer runs while the consumer works on the piece before: only what it takes longer than
    that work is waited for. In `visit_back` a piece's gradients travel one hop behind it, each rank
    adds its own, and they are home after as many hops as there are ranks.

    Alive at once, beside the rank's own rows: two pieces (one at work, one arriving), each as large
    as the largest rank's rows, for the frames alone max(counts) x F x D x (bytes of a number); in
    `visit_back` also three times their gradients (leaving, arriving, computed). Neither grows with
    the number of ranks. A rank that stops half-way leaves the others waiting for the process
    group's time-out, which raises there.
    """

    def __init__(self, world: World, counts: Sequence[int]) -> None:
        self._world, self._counts = world, counts
        self._first = [0, *accumulate(counts)]

    def visit(self, mine: Tensors) -> Iterator[tuple[int, Tensors]]:
        piece = _plain(mine)
        lane = _Lane(piece, self._world, self._counts, first_tag=0)
        owners = self._owners()
        for owner, following in zip(owners, [*owners[1:], None], strict=True):
            if following is not None:
                lane.start(piece, following)
            yield self._first[owner], piece
            if following is not None:
                piece = lane.wait()

    def visit_back(self, mine: Tensors, gradients: Gradients) -> Tensors:
        sums: Tensors = ()
        behind: _Lane | None = None
        for owner, (first, piece) in zip(self._owners(), self.visit(mine), strict=True):
            if behind is not None:
                behind.start(sums, owner)  # what ranks before this one have added up for the piece
            computed = gradients(first, piece)
            if behind is None:
                sums = _plain(computed)
                behind = _Lane(sums, self._world, self._counts, first_tag=len(mine))
            else:
                sums = behind.wait()
                for total, part in zip(sums, computed, strict=True):
                    total.add_(part)
            del computed  # or it would live until those of the next piece are there
        if behind is None or self._world.world_size == 1:
            return sums
        behind.start(sums, self._world.rank)
        return behind.wait()

    def _owners(self) -> list[int]:
        """The ranks whose pieces come by, in order."""
        size = self._world.world_size
        return [(self._world.rank - hop) % size for hop in range(size)]


class _Lane:
    """Sets of tensors around the ring: one leaves for the next rank while another one arrives.

    Two sets of buffers take turns, since a consumer may hold on to a piece until it has the next.
    """

    def __init__(
        self, like: Tensors, world: World, counts: Sequence[int], *, first_tag: int
    ) -> None:
        self._world, self._counts, self._first_tag = world, counts, first_tag
        self._next = (world.rank + 1) % world.world_size
        self._previous = (world.rank - 1) % world.world_size
        self._buffers = list[Tensors]()
        # Not views: those would keep the first set alive to the end.
        self._like = [x.new_empty(0, *x.shape[1:]) for x in like]
        self._arriving: Tensors = ()
        self._works: list[dist.Work] = []

    def start(self, leaving: Tensors, owner: int) -> None:
        """Sends `leaving` on, and receives what belongs to `owner`, of the same kind."""
        if len(self._buffers) < 2:
            most = max(self._counts)
            fresh = tuple(x.new_empty(most, *x.shape[1:]) for x in self._like)
            self._buffers.insert(0, fresh)
        else:
            self._buffers.reverse()
        self._arriving = tuple(x[: self._counts[owner]] for x in self._buffers[0])
        self._world.received_bytes["ring"] += sum(x.nbytes for x in self._arriving)
        # All in one batch: NCCL would run a send and a receive of the same two ranks one after the
        # other, and where every rank sends first, none would ever receive.
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(direction, x, peer, tag=self._first_tag + number)
                for direction, tensors, peer in (
                    (dist.isend, leaving, self._next),
                    (dist.irecv, self._arriving, self._previous),
                )
                for number, x in enumerate(tensors)
            ]
        )

    def wait(self) -> Tensors:
        """What arrived, once all that was started is done; good until the start after the next."""
        for work in self._works:
            work.wait()
        self._works = []
        return self._arriving


def _plain(tensors: Tensors) -> Tensors:
    return tuple(x.detach().contiguous() for x in tensors)
