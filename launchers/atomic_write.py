"""Atomic replacement of small local files.

It needs the standard library only, so every package may import it.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a local file in one step: readers see the old content or the new, never a part.

    The folder is created if it does not exist. The content first goes to a hidden file beside
    `path`, named after this process, so that two processes never write the same temporary file.

    Raises:
        OSError: the file system refuses the write; `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    if isinstance(content, str):
        content = content.encode()
    temporary.write_bytes(content)
    os.replace(temporary, path)
