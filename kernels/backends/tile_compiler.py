"""torch.compile of the operations on a tile, for the backends in plain torch; off by default."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def tile_function(
    function: Callable[P, R], device: torch.device, *, compiled: bool
) -> Callable[P, R]:
    """The function, compiled if asked for and if this machine can compile for the device."""
    if not compiled or compile_failure(device.type) is not None:
        return function
    return _compiled(function)


@cache
def compile_failure(device: str) -> str | None:
    """Compiles and runs a small function on the device, once a process.

    Returns:
        None, or the reason why torch.compile does not work, which is also logged.
    """
    scores = torch.arange(24.0, device=device).reshape(2, 3, 4)
    try:
        actual, expected = (f(scores) for f in (_compiled(_probe), _probe))
        torch.testing.assert_close(actual, expected)
    # Compilers fail in many ways: no C++ compiler or no Triton, a wrong driver, a full disk.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        logging.getLogger(__name__).warning("tiles are not compiled: %s", reason)
        return reason
    return None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Tiles at the ends are smaller; one compilation with symbolic sizes serves all of them.
    return torch.compile(function, dynamic=True)


def _probe(scores: Tensor) -> Tensor:
    """The kinds of operations that a tile consists of: maximum, gather and scatter."""
    best, index = scores.max(2, keepdim=True)
    return torch.zeros_like(scores).scatter_(2, index, best * scores.gather(2, index))
