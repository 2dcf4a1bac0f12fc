"""Imports FFCV, an optional package, only where a beton is written or trained from."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def import_ffcv(what: str) -> None:
    """Imports FFCV for this process. Raises ImportError with what is to be installed."""
    try:
        # FFCV starts numba's threads when it is imported. Of the kinds there are, TBB complains at
        # every fork, and "workqueue" serves one caller at a time.
        _numba_settings().THREADING_LAYER = "omp"
        with _idle_threads_sleep():
            import ffcv  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: one of its system libraries is missing
        raise ImportError(
            f"{what} needs FFCV, the extra 'ffcv' of tvr ({type(error).__name__}: {error}); it is"
            " compiled against libturbojpeg and OpenCV: `make ffcv` installs it, README.md tells"
            " which system packages it needs"
        ) from error


def max_threads() -> int:
    """As many threads as numba has."""
    return _numba_settings().NUMBA_NUM_THREADS


def _numba_settings() -> Any:  # numba sets its names from the environment
    return import_module("numba.core.config")


@contextmanager
def _idle_threads_sleep() -> Iterator[None]:
    """OpenMP's threads spin between two batches, as its library reads when it is loaded; a batch of
    8 clips took twice the processor time."""
    name = "OMP_WAIT_POLICY"
    is_set = name in os.environ
    os.environ.setdefault(name, "PASSIVE")
    try:
        yield
    finally:
        if not is_set:
            del os.environ[name]
