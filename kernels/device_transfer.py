"""Transfers between host and device; the only place where a value of a tensor reaches the host.

The host runs ahead of a GPU: it queues work and does not wait. When it reads a value, it waits for
all the work queued before, and the GPU then idles until new work arrives. So nothing in a training
step reads a value but `to_host`, which a step calls once. `counted_reads` counts the calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_counters: list[Counter[str]] = []


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Counts the calls of `to_host` in the block, in all threads, by their purpose."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        # By identity: two counters with equal counts are equal.
        _counters[:] = [other for other in _counters if other is not counter]


def to_host(x: Tensor, purpose: str) -> Tensor:
    """Copies a tensor to host memory and waits for the copy.

    On a GPU the host waits for an event behind the copy, not for the whole device, and
    `torch.cuda.set_sync_debug_mode("error")` lets it pass.

    Args:
        purpose: A word or two for `counted_reads`.

    Returns:
        A tensor on the CPU without gradient; `x` itself if it lies there.
    """
    for counter in _counters:
        counter[purpose] += 1
    x = x.detach()
    if x.device.type != "cuda":
        return x.cpu()
    result = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    result.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))
    copied.synchronize()
    return result


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a small host tensor to a device; the host does not wait for the copy.

    On a GPU it passes through pinned memory of torch's allocator, which stays reserved until the
    copy is done, so the caller may change or free `x` at once.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
