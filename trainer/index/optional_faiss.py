"""Imports the optional package FAISS, only where an index is built or searched."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_faiss() -> Any:  # its names are generated, without types
    """Returns the module faiss.

    Raises:
        ImportError: it is missing, or cannot be loaded; the message says how to install it.
    """
    try:
        return import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "an index of videos needs FAISS, the extra 'search' of tvr: pip install 'tvr[search]'"
            f" ({error})"
        ) from error
