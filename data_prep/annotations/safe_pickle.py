"""Reads pickles of lists, dicts and text, and refuses any content that could run code."""

from __future__ import annotations

import io
import pickle
from typing import Any, ClassVar, NoReturn


class _Refused(pickle.UnpicklingError):
    """The pickle refers to a class, a function or an external object."""


def _refuse_bytearray(unpickler: object) -> NoReturn:
    # It would be allocated in the length that its opcode states.
    raise _Refused("it asks for a bytearray")


class _PlainUnpickler(pickle._Unpickler):
    # The form in Python numbers objects in a dict. The one in C takes 16 bytes for each number up
    # to the largest, so that a file of ten bytes could ask for gigabytes.

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _refuse_bytearray,
    }

    # The unpickler looks up every class and function here before it can call it.
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _Refused(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refused(f"it asks for the external object {pid!r}")


def load_plain_pickle(content: bytes, url: str) -> Any:
    """Loads a pickle of containers, numbers and texts; Python 2's texts are returned as bytes.

    Raises:
        ValueError: the pickle is damaged, or refers to anything else. Nothing of that is loaded.
    """
    try:
        # Python 2 stored bytes of any encoding; the caller decodes them.
        return _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _Refused as error:
        raise ValueError(
            f"{url}: refused: {error}; only lists, tuples, dicts and text are read from a pickle"
        ) from error
    # Damaged pickles can raise any exception.
    except Exception as error:
        raise ValueError(f"{url}: damaged pickle: {error!r}") from error


def plain_text(value: Any, where: str) -> str:
    """Returns a text of a pickle; bytes are decoded as UTF-8, or as Latin-1 if that fails.

    Raises:
        ValueError: `value` is not a text.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")
    raise ValueError(f"{where}: expected text, found {type(value).__name__}")
