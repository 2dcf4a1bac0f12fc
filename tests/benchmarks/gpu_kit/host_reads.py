"""Counts how often the host waits for the device: on CUDA observed, on a CPU foreseen.

On CUDA, torch warns of every operation that synchronises. It does not see explicit
`torch.cuda.synchronize` and waits for events. On a CPU nothing waits, so operations are counted
that would on a GPU: reading a number, results whose shape depends on values, and copies to the
host by name (`tolist`, `cpu`, `numpy`). Copies by `to` cannot be told there from other casts.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = tuple(str(ROOT / name) for name in ("data_prep", "kernels", "trainer"))
WARNING = "synchronizing CUDA operation"
TO_HOST = (Tensor.tolist, Tensor.cpu, Tensor.numpy)


@contextmanager
def count_host_reads(device: str) -> Iterator[Counter[str]]:
    """Yields a counter that fills while the block runs: "operation at file:line" -> number."""
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(_warnings(found))
        else:
            stack.enter_context(_Dispatched(found))
            stack.enter_context(_Called(found))
        yield found


@contextmanager
def _warnings(found: Counter[str]) -> Iterator[None]:
    def show(message: Any, *_: Any, **__: Any) -> None:
        if WARNING in str(message):
            found[f"synchronisation at {_place()}"] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _Dispatched(TorchDispatchMode):
    """Operations that return a number to the host, or whose shape depends on values."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _needs_host(func, args):
            self._found[f"{func.overloadpacket.__name__} at {_place()}"] += 1
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Methods that read a tensor in host memory, which the dispatcher does not see on a CPU."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TO_HOST:
            self._found[f"{func.__name__} at {_place()}"] += 1
        return func(*args, **(kwargs or {}))


def _needs_host(func: Any, args: Any) -> bool:
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func.overloadpacket is not torch.ops.aten.index:
        return True
    # Only an index of booleans has a shape that depends on values.
    indices = [x for x in args[1] if x is not None]
    return any(x.dtype in (torch.bool, torch.uint8) for x in indices)


def _place() -> str:
    """File and line of the nearest caller in the packages."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        # Through links, the same file has another path.
        path = str(Path(file).resolve()) if "/tvr/" in file else file
        if path.startswith(FOLDERS):
            return f"{Path(path).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
