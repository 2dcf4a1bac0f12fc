"""Rows of a Parquet file, read with pyarrow where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec


def parquet_rows(url: str) -> Iterator[dict[str, Any]]:
    """The rows as dicts without their null fields, a batch in memory at a time.

    Raises:
        FileNotFoundError: no such file.
        ImportError: pyarrow is not installed.
        ValueError: not a Parquet file.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(
            f"{url}: Parquet is read with pyarrow, which is not installed; the extra is called"
            " parquet: pip install -e '.[parquet]'"
        ) from error
    try:
        with fsspec.open(url, "rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    yield {name: value for name, value in row.items() if value is not None}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"annotation file {url} does not exist") from error
    except ArrowException as error:
        raise ValueError(f"{url}: not Parquet: {error}") from error
