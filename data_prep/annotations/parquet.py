"""Reads rows of a Parquet file with pyarrow, an optional dependency."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvr.data_prep.storage.storage import open_file


def parquet_rows(url: str) -> Iterator[dict[str, Any] | str]:
    """Yields the rows as dicts without null fields; one batch is in memory at a time.

    A row with a value that has no Python value, such as a text that is not UTF-8, is yielded as the
    text of its error.

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
        with open_file(url) as file:
            for batch in parquet.ParquetFile(file).iter_batches():
                for row in _rows(batch):
                    is_bad = isinstance(row, str)
                    yield row if is_bad else {k: v for k, v in row.items() if v is not None}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"annotation file {url} does not exist") from error
    except (ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{url}: not Parquet: {error}") from error
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise  # an error of the disk or the store
        # pyarrow raises a plain OSError without a number for a damaged file.
        raise ValueError(f"{url}: not Parquet: {error}") from error


def _rows(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        rows: list[Any] = []
        for number in range(batch.num_rows):
            try:
                rows += batch.slice(number, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                rows.append(f"{type(error).__name__}: {error}")
        return rows
