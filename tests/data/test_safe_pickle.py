"""Pickled captions: pickles of Python 2 and 3 are read, pickles that could run code are refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from tvr.data_prep.annotations.benchmark_files import Refusals, msvd_captions


def captions_of(url: str) -> dict[str, list[str]]:
    """Reads the captions of a file in which nothing is wrong."""
    refusals = Refusals()
    found = msvd_captions(url, refusals)
    for row in [*refusals.rows, *(row for rows in refusals.by_video.values() for row in rows)]:
        raise ValueError(row.detail)
    return found


def test_msvd_reads_the_byte_texts_of_python_2(tmp_path: Path) -> None:
    # {"v_1_2": [["caf\xc3\xa9", "\xe9"]]} with the opcodes that Python 2's cPickle used for str.
    content = b"(dp1\nS'v_1_2'\n(lp2\n(lp3\nS'caf\\xc3\\xa9'\naS'\\xe9'\naas."
    (tmp_path / "raw-captions.pkl").write_bytes(content)
    url = str(tmp_path / "raw-captions.pkl")
    assert captions_of(url) == {"v_1_2": ["caf\u00e9 \u00e9"]}


class RunsCommand:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Unknown:
    pass


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_no_code(tmp_path: Path, protocol: int) -> None:
    trap = RunsCommand(f"touch {tmp_path}/ran")
    url = str(tmp_path / "raw-captions.pkl")
    Path(url).write_bytes(pickle.dumps({"v_1_2": [[trap]]}, protocol=protocol))
    with pytest.raises(ValueError, match=r"raw-captions\.pkl: refused: it asks for \w+\.system;"):
        captions_of(url)
    assert not (tmp_path / "ran").exists()
    pickle.loads(Path(url).read_bytes())  # plain pickle runs the command
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"v": [[Unknown()]]}, "refused: it asks for"),
        ({"v": [[3]]}, r"v\[0\]: expected text, found int"),
        ({"v": [{"a"}]}, "(expected text, found set|refused: it asks for)"),
        ({"v": "text"}, "v: expected a list, found str"),
        ({3: []}, "expected text, found int"),
        ([["a"]], "expected a dict, found list"),
    ],
)
def test_a_pickle_of_other_types_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    url = str(tmp_path / "raw-captions.pkl")
    Path(url).write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match=message):
        captions_of(url)


@pytest.mark.parametrize("content", [b"", b"\x80\x04}", b"version https://", b"cos\n", b"0."])
def test_the_error_names_a_damaged_pickle(tmp_path: Path, content: bytes) -> None:
    url = str(tmp_path / "raw-captions.pkl")
    Path(url).write_bytes(content)
    with pytest.raises(ValueError, match=r"raw-captions\.pkl: (damaged pickle|refused)"):
        captions_of(url)


def test_an_external_object_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "raw-captions.pkl")
    Path(url).write_bytes(b"Pthing\n.")
    with pytest.raises(ValueError, match="refused: it asks for the external object 'thing'"):
        captions_of(url)
