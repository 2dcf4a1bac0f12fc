"""Counts what makes the host wait for a GPU, on a machine without one.

A `TorchDispatchMode` sees every operation whose result is a value or has a shape that depends on
values. The methods of a tensor that copy it to the host are patched, because they are no operation
for a tensor that lies there already. Reads of tensors that never were on a device do not count:
those of the loader, of the exchange between hosts, and of what `to_host` has copied.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VALUES = {"_local_scalar_dense", "equal", "is_nonzero"}
SHAPES = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
METHODS = ("tolist", "numpy", "cpu", "__array__")
# Modules that read tensors of the host alone. Adam's step counters lie there, too, where they are
# read: on a GPU, if at all.
ON_HOST = (
    "torch.optim.",
    "tvr.data_prep.",
    "tvr.kernels.checks",
    "tvr.kernels.device_transfer",
    "tvr.kernels.text_lengths",
    "tvr.trainer.distributed.world",
    "tvr.trainer.loss.step_values",
)
OURS = ("tvr.", "transformers.", "deepspeed.")
DEEPSPEED = "DeepSpeed's update"


class HostReads(Counter[str]):
    """Number of reads by the place that asked; those of DeepSpeed's update under one name."""

    def note(self, what: str, frame: FrameType) -> None:
        """Counts a read that a frame or its callers made."""
        where = "unknown"
        innermost: FrameType | None = frame
        while innermost is not None:
            module, function = str(innermost.f_globals.get("__name__")), innermost.f_code.co_name
            if module.startswith(ON_HOST):
                return
            if where == "unknown" and module.startswith(OURS):
                where = f"{module}.{function}"
            if (module, function) == ("tvr.trainer.engine.engine", "step"):
                where, what = DEEPSPEED, ""
                break
            innermost = innermost.f_back
        self[f"{where} {what}".strip()] += 1


@contextmanager
def host_reads() -> Iterator[HostReads]:
    """Counts the host's reads in the block, in this thread."""
    found = HostReads()
    with _Mode(found), _patched_methods(found):
        yield found


class _Mode(TorchDispatchMode):
    def __init__(self, found: HostReads) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in INDEXED and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if by_mask or name in VALUES or name in SHAPES:
            self._found.note(name, sys._getframe(1))
        return func(*args, **(kwargs or {}))


@contextmanager
def _patched_methods(found: HostReads) -> Iterator[None]:
    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(x: Tensor, *args: Any, **options: Any) -> Any:
            found.note(name, sys._getframe(1))
            return original(x, *args, **options)

        return method

    changes = {name: counting(name, getattr(Tensor, name)) for name in METHODS}
    with patch.multiple(Tensor, **changes):
        yield
