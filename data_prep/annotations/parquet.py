"""Reads rows of a Parquet file with pyarrow, an optional dependency."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec


def parquet_rows(url: str) -> Iterator[dict[str, Any]]:
    """Yields the rows as dicts without null fields; one batch is in memory at a time.

    Raises:
        FileNotFoundError: the file does not exist.
        ImportError: pyarrow is not installed.
        ValueError: the file is not a Parquet file.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(
            f"{url}: reading Parquet needs pyarrow, which is not installed; install it with"
            " pip install -e '.[parquet]'"
        ) from error
    try:
        with fsspec.open(url, "rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    yield {name: value for name, value in row.items() if value is not None}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"annotation file {url} does not exist") from error
    except (ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{url}: not Parquet: {error}") from error
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise  # of the disk or the store
        raise ValueError(f"{url}: not Parquet: {error}") from error  # so pyarrow calls damage
