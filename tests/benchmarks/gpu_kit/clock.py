"""Time and memory of one call: warm-up, medians, data made anew, and poisoned memory.

On a GPU the clock is CUDA's events. Outputs that a call leaves unwritten would hold numbers of an
earlier, right call; so the memory that it will get is filled with NaN before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tvr_bench.kernels_task import cpu_seconds, cuda_seconds

T = TypeVar("T")

EMPTY = tuple(
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
)
# On a CPU, where it is only to be seen that it works, C++ is not worth compiling for a minute.
COMPILERS = {"cuda": "inductor", "cpu": "aot_eager"}
# torch serves blocks of less than 1 MiB from a pool of their own.
SMALL_BLOCK = 2**19


class Wrong(Exception):
    """A call gave a wrong result; the message says which."""


class PoisonedOutputs(TorchDispatchMode):
    """Fills every tensor with NaN that Python code allocates without a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in EMPTY and result.is_floating_point():
            result.fill_(torch.nan)
        return result


def poison_free_memory(device: str) -> None:
    """Fills memory with NaN and frees it, so that the next allocations get it.

    A CPU's heap may return it to the system instead; there `PoisonedOutputs` does the work.
    """
    num_bytes = 2**22
    if device == "cuda":
        num_bytes = min(2**31, torch.cuda.mem_get_info()[0] // 2)
    blocks = [torch.full((SMALL_BLOCK // 8,), torch.nan, device=device) for _ in range(64)]
    blocks.append(torch.full((max(1, num_bytes // 4),), torch.nan, device=device))
    del blocks


def measure(
    make: Callable[[int], T],
    call: Callable[[T], object],
    check: Callable[[T, Any], None],
    device: str,
    *,
    repeats: int,
    limit_s: float,
) -> dict[str, Any]:
    """Times a call.

    Args:
        make: Makes the inputs of a call from a seed; not timed.
        call: Returns its result. It frees nothing that `check` needs.
        check: Raises `Wrong` for a wrong result of the first call, or leaves it.
        repeats: Timed calls; fewer if `limit_s` is over, but at least 3.

    Returns:
        `ms` (median), `ms_quartiles`, `repeats`, and `peak_bytes` above the inputs, which only
        CUDA can tell (else None).
    """
    clock = cuda_seconds if device == "cuda" else cpu_seconds
    inputs = make(0)
    poison_free_memory(device)
    check(inputs, call(inputs))
    del inputs
    times, peaks, before, started = [], [], 0, time.monotonic()
    for seed in range(1, repeats + 2):
        inputs = make(seed)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times.append(clock(partial(call, inputs)))
        if device == "cuda":
            peaks.append(torch.cuda.max_memory_allocated() - before)
        del inputs
        if len(times) > 3 and time.monotonic() - started > limit_s:
            break
    times = times[1:]  # the first one may still fill caches
    lower, median, upper = (1000 * x for x in statistics.quantiles(times, n=4, method="inclusive"))
    return {
        "ms": median,
        "ms_quartiles": [lower, upper],
        "repeats": len(times),
        "peak_bytes": max(peaks) if peaks else None,
    }


def check_finite(tensors: dict[str, Tensor | None]) -> None:
    """Raises `Wrong` for NaN or infinity, as an output has that nobody wrote."""
    for name, tensor in tensors.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise Wrong(f"{name} is not finite, or was not written")
