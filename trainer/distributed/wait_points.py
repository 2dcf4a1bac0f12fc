"""The collectives that this process has entered, in the order in which all ranks enter them.

A watchdog compares these counts between ranks: a rank that has entered fewer collectives of a group
than the other members is the one that they wait for. Stack traces do not show that on a GPU, where
a collective only enqueues its work and returns. The host blocks later, at a line that reads some
result, and every rank may block at another one.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")

COLLECTIVE_FUNCTIONS = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
)
"""Functions of torch.distributed that every member of a group calls; torch has most of them."""


@dataclass(frozen=True, slots=True)
class WaitPoint:
    """A collective for which this rank may be waiting."""

    name: str
    group: str
    """Name of the process group; empty for the group of all ranks."""
    number: int
    """1 for the first collective that this rank entered in the group."""

    def text(self) -> str:
        """The wait point as messages show it."""
        return f"{self.name}, collective {self.number}" + (
            f" of group {self.group}" if self.group else ""
        )


class WaitPoints:
    """Counts the collectives that this rank has entered.

    The main thread, and autograd's thread while the main thread waits for it, report to it; another
    thread may read it at any time.
    """

    def __init__(self) -> None:
        self._entered: Counter[str] = Counter()
        self._members: dict[str, tuple[int, ...]] = {}
        self._waiting: WaitPoint | None = None

    @property
    def entered(self) -> dict[str, int]:
        """Number of collectives that this rank has entered, by the name of their group."""
        return dict(self._entered)

    @property
    def members(self) -> dict[str, tuple[int, ...]]:
        """The ranks of these groups."""
        return dict(self._members)

    @property
    def waiting(self) -> WaitPoint | None:
        """The last collective whose result this rank may still wait for.

        A call that returns before its result exists stays the wait point until `synchronised`,
        because the host blocks at a later line, for example in `Tensor.tolist`.
        """
        return self._waiting

    def synchronised(self) -> None:
        """Reports that the host has waited for the device, so that no result is outstanding."""
        self._waiting = None

    def counting(
        self, name: str, function: Callable[..., T], members_of: Callable[[Any], Sequence[int]]
    ) -> Callable[..., T]:
        """Returns `function`, a collective of torch.distributed, with a count of its calls.

        Args:
            name: Name of the function in messages.
            members_of: (group) -> its ranks; empty if this rank is not a member.
        """
        places = {place: i for i, place in enumerate(inspect.signature(function).parameters)}
        takes_tensors = "object" not in name
        always_async = name == "batch_isend_irecv"

        def argument(args: Sequence[Any], kwargs: dict[str, Any], wanted: str) -> Any:
            place = places.get(wanted, len(args))
            return args[place] if place < len(args) else kwargs.get(wanted)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> T:
            group = argument(args, kwargs, "group")
            key = getattr(group, "group_name", "")
            if key not in self._members:
                self._members[key] = tuple(members_of(group))
            if not self._members[key]:
                return function(*args, **kwargs)
            self._entered[key] += 1
            before, self._waiting = self._waiting, WaitPoint(name, key, self._entered[key])
            result = function(*args, **kwargs)
            on_device = takes_tensors and (_use_device(args) or _use_device([*kwargs.values()]))
            in_background = always_async or argument(args, kwargs, "async_op")
            if not on_device and not in_background:
                self._waiting = before
            return result

        return counted


def _use_device(values: Sequence[Any]) -> bool:
    """True if arguments of a collective hold a tensor that does not lie on the host."""
    for value in values:
        if isinstance(value, (list, tuple)):
            if _use_device(value):
                return True
        else:
            tensor = getattr(value, "tensor", value)  # an argument may be a dist.P2POp
            if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
                return True
    return False
