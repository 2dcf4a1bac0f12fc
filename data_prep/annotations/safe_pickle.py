"""Reads pickles of lists, dicts and text, and nothing that could run code."""

from __future__ import annotations

import io
import pickle
from typing import Any, NoReturn


class _Refused(pickle.UnpicklingError):
    """The pickle asks for more than containers and text."""


class _PlainUnpickler(pickle.Unpickler):
    # Every class and function that a pickle names comes through here before it could be called.
    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise _Refused(f"it asks for {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refused(f"it asks for the outside object {pid!r}")


def load_plain_pickle(content: bytes, url: str) -> Any:
    """The containers, numbers and texts of a pickle; Python 2's texts come as bytes.

    Raises:
        ValueError: damaged, or it holds anything else, which is named and not loaded.
    """
    try:
        # Decoding is left to the reader: Python 2 stored whatever bytes its program held.
        return _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _Refused as error:
        raise ValueError(
            f"{url}: refused: {error}; only lists, tuples, dicts and text are read from a pickle"
        ) from error
    # The machine behind a pickle answers damage with whatever its operations raise.
    except Exception as error:
        raise ValueError(f"{url}: damaged pickle: {error!r}") from error


def plain_text(value: Any, where: str) -> str:
    """A text of a pickle; bytes are UTF-8 or else Latin-1.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")
    raise ValueError(f"{where}: expected text, found {type(value).__name__}")
