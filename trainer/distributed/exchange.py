"""Exchange of video features between ranks: all-gather, or a ring.

Both classes implement the `Exchange` protocol of `kernels.row_loss.streamed_loss`. Their results
differ only by the order in which the gradients of the ranks are added. They move tensors without
autograd; the caller computes the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

from tvr.trainer.distributed.collectives import all_gather_rows_no_grad, reduce_scatter_rows
from tvr.trainer.distributed.world import World

Tensors = tuple[Tensor, ...]
PieceBackward = Callable[[int, Tensors], Tensors]
"""(first column of a piece, its tensors) -> gradients of its floating tensors."""


class AllGatherExchange:
    """Gathers the rows of all ranks into one piece, which is freed after each visit.

    Memory beside the rank's own rows: the G rows, and in `visit_backward` also their gradients.
    Where the ranks' counts differ, padding doubles that for a short time.
    """

    def __init__(self, world: World, counts: Sequence[int]) -> None:
        self._world, self._counts = world, counts

    def visit(self, mine: Tensors) -> Iterator[tuple[int, Tensors]]:
        yield 0, self._gather(mine)

    def visit_backward(self, mine: Tensors, gradients: PieceBackward) -> Tensors:
        sums = gradients(0, self._gather(mine))
        if self._world.world_size == 1:
            return sums
        return tuple(reduce_scatter_rows(x, self._world, self._counts) for x in sums)

    def _gather(self, mine: Tensors) -> Tensors:
        if self._world.world_size == 1:
            return _detached(mine)
        return tuple(all_gather_rows_no_grad(x, self._world, self._counts) for x in _detached(mine))


class RingExchange:
    """Passes the rows of one rank at a time around a ring of ranks, this rank's own rows first.

    The next piece arrives while the caller works on the present one, so a transfer costs time only
    where it is longer than that work. In `visit_backward` the gradients of a piece travel one hop
    behind the piece. Each rank adds its own, and after one full turn they reach the owner.

    Memory beside the rank's own rows: two pieces, one in use and one arriving, each as large as the
    largest rank's rows; for the frames that is max(counts) x F x D numbers. `visit_backward` adds
    three times the gradients of a piece: leaving, arriving and computed. Neither grows with the
    number of ranks. If a rank stops half-way, the others raise after the process group's time-out.
    """

    def __init__(self, world: World, counts: Sequence[int]) -> None:
        self._world, self._counts = world, counts
        self._first = [0, *accumulate(counts)]

    def visit(self, mine: Tensors) -> Iterator[tuple[int, Tensors]]:
        piece = _detached(mine)
        lane = _Lane(piece, self._world, self._counts, first_tag=0)
        owners = self._owners()
        for owner, following in zip(owners, [*owners[1:], None], strict=True):
            if following is not None:
                lane.start(piece, following)
            yield self._first[owner], piece
            if following is not None:
                piece = lane.wait()

    def visit_backward(self, mine: Tensors, gradients: PieceBackward) -> Tensors:
        sums: Tensors = ()
        behind: _Lane | None = None
        for owner, (first, piece) in zip(self._owners(), self.visit(mine), strict=True):
            if behind is not None:
                behind.start(sums, owner)  # the piece's gradients, summed over the ranks so far
            computed = gradients(first, piece)
            if behind is None:
                sums = _detached(computed)
                behind = _Lane(sums, self._world, self._counts, first_tag=len(mine))
            else:
                sums = behind.wait()
                for total, part in zip(sums, computed, strict=True):
                    total.add_(part)
            del computed  # otherwise it stays allocated until the next piece's gradients exist
        if behind is None or self._world.world_size == 1:
            return sums
        behind.start(sums, self._world.rank)
        return behind.wait()

    def _owners(self) -> list[int]:
        """Owners of the received pieces, in order of arrival."""
        size = self._world.world_size
        return [(self._world.rank - hop) % size for hop in range(size)]


class _Lane:
    """Moves a tuple of tensors around the ring: one leaves while the next one arrives.

    Two sets of buffers alternate, because the caller may use a piece until it receives the next.
    """

    def __init__(
        self, like: Tensors, world: World, counts: Sequence[int], *, first_tag: int
    ) -> None:
        self._world, self._counts, self._first_tag = world, counts, first_tag
        self._next = (world.rank + 1) % world.world_size
        self._previous = (world.rank - 1) % world.world_size
        self._buffers = list[Tensors]()
        # New empty tensors: views would keep the first pieces allocated to the end.
        self._like = [x.new_empty(0, *x.shape[1:]) for x in like]
        self._arriving: Tensors = ()
        self._transfers: list[dist.Work] = []

    def start(self, leaving: Tensors, owner: int) -> None:
        """Sends `leaving` to the next rank, and starts receiving the tensors that `owner` owns."""
        if len(self._buffers) < 2:
            most = max(self._counts)
            fresh = tuple(x.new_empty(most, *x.shape[1:]) for x in self._like)
            self._buffers.insert(0, fresh)
        else:
            self._buffers.reverse()
        self._arriving = tuple(x[: self._counts[owner]] for x in self._buffers[0])
        self._world.received_bytes["ring"] += sum(x.nbytes for x in self._arriving)
        # One batch: NCCL runs single sends and receives in order, and if every rank sent first, no
        # rank would ever receive.
        self._transfers = dist.batch_isend_irecv(
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
        """Waits for the transfer and returns the tensors; valid until the second next `start`."""
        for transfer in self._transfers:
            transfer.wait()
        if self._transfers and self._arriving[0].device.type == "cpu":
            self._world.wait_points.synchronised()  # on a GPU only the device waits here
        self._transfers = []
        return self._arriving


def _detached(tensors: Tensors) -> Tensors:
    return tuple(x.detach().contiguous() for x in tensors)
