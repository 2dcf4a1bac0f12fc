"""`tvr pack` over a folder of more than a hundred odd files: what becomes of each is as expected.

`PYTHONPATH=tests python -m builders.odd_files FOLDER` makes the same folder, packs it, and writes
the table of what became of each file.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from builders.odd_files import LAYOUTS, make_folder, pack_folder, table
from builders.odd_list import FILES

from tvr.data_prep.dataset.manifest import read_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "files").mkdir()
    make_folder(folder / "files")
    return folder


def test_the_folder_holds_at_least_sixty_files() -> None:
    assert len(FILES) >= 60
    assert len({each.name for each in FILES}) == len(FILES)
    assert {bool(each.reason) for each in FILES} == {True, False}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_each_odd_file_is_packed_right_or_refused_by_name(folder: Path, layout: str) -> None:
    outcomes = pack_folder(folder, layout)
    path = folder / f"{layout}.txt"
    path.write_text(table(outcomes))
    wrong = [each for each in outcomes if not each.is_right]
    assert not wrong, f"{len(wrong)} files, of all in {path}:\n{table(wrong)}"
    # One run: each file once, in the data set or in bad.jsonl, with a key of its own.
    keys = [each.key for each in outcomes]
    assert len(set(keys)) == len(FILES)
    manifest = read_manifest(str(folder / f"packed {layout}"))
    assert manifest.num_samples == sum(not each.reason for each in FILES)
    assert manifest.bad == Counter(each.reason for each in FILES if each.reason)
    lines = (folder / f"packed {layout}" / "bad.jsonl").read_text().splitlines()
    assert len(lines) == sum(manifest.bad.values())
    assert all(json.loads(line).keys() >= {"key", "reason", "detail"} for line in lines)
