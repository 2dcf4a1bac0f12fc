"""An object store without bytes: it says when a request would be answered, and counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tvr.data_prep.simulation.clock import SimulatedClock


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Speed of the store and of the nodes' links to it."""

    latency_s: float
    """From a request to the first byte of its answer."""
    node_bytes_per_s: float
    """Of all requests of a node together."""
    store_bytes_per_s: float | None = None
    """Of all nodes together; None = no limit."""
    request_bytes_per_s: float | None = None
    """Of one request; None = no limit."""


class NodeLink:
    """The link of one node: its requests share the bandwidth."""

    __slots__ = ("free_at",)

    def __init__(self) -> None:
        self.free_at = 0.0


class FakeStore:
    """Answers requests after the latency, at the bandwidth of the store, the link and the request.

    The store and each link send one answer after another, in the order of the requests. So no
    limit is ever exceeded, and a limit that is reached is used in full. Answers that truly share a
    link end together instead of in turn, which changes no sum.
    """

    def __init__(self, clock: SimulatedClock, network: Network) -> None:
        self._clock = clock
        self._network = network
        self._free_at = 0.0
        self.requests_by_second: Counter[int] = Counter()
        self.bytes_by_second: Counter[int] = Counter()

    def answered_at(self, num_bytes: int, link: NodeLink) -> float:
        """Counts a request made now; returns the time at which its last byte arrives."""
        now, network = self._clock.now, self._network
        first = now + network.latency_s
        end = first
        if network.store_bytes_per_s is not None:
            self._free_at = max(first, self._free_at) + num_bytes / network.store_bytes_per_s
            end = self._free_at
        link.free_at = max(first, link.free_at) + num_bytes / network.node_bytes_per_s
        end = max(end, link.free_at)
        if network.request_bytes_per_s is not None:
            end = max(end, first + num_bytes / network.request_bytes_per_s)
        self.requests_by_second[int(now)] += 1
        self.bytes_by_second[int(end)] += num_bytes
        return end
