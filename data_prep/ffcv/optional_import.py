"""Imports the optional package FFCV, only where a beton is written or used for training."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def import_ffcv(purpose: str) -> None:
    """Imports FFCV in this process.

    Args:
        purpose: Feature that needs FFCV, for the error message.

    Raises:
        ImportError: FFCV or one of its system libraries is missing; the message says how to
            install it.
    """
    try:
        # Importing FFCV starts numba's threads. Of numba's threading layers, TBB warns at every
        # fork, and "workqueue" serves one caller at a time.
        _numba_settings().THREADING_LAYER = "omp"
        with _passive_openmp_threads():
            import ffcv  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a system library is missing
        raise ImportError(
            f"{purpose} needs FFCV, the extra 'ffcv' of tvr ({type(error).__name__}: {error});"
            " FFCV is compiled against libturbojpeg and OpenCV: `make ffcv` installs it, and"
            " data_prep/README.md lists the system packages it needs"
        ) from error


def max_threads() -> int:
    """Returns the number of numba's threads."""
    return _numba_settings().NUMBA_NUM_THREADS


def _numba_settings() -> Any:  # numba defines these names at runtime
    return import_module("numba.core.config")


@contextmanager
def _passive_openmp_threads() -> Iterator[None]:
    """Lets idle OpenMP threads sleep; the library reads this setting when it is loaded.

    Spinning threads doubled the processor time of a batch of 8 clips.
    """
    name = "OMP_WAIT_POLICY"
    is_set = name in os.environ
    os.environ.setdefault(name, "PASSIVE")
    try:
        yield
    finally:
        if not is_set:
            del os.environ[name]
