"""Publication beside attempts that are over, and beside files that are damaged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import BEST, Retention, best_step
from tvr.trainer.checkpoint.publication import DAMAGED, Publisher
from tvr.trainer.fencing import begin_attempt

STEP = "step-00000001"


def publisher(folder: Path) -> Publisher:
    storage = StorageFolder(str(folder / "checkpoints"))
    return Publisher(storage, begin_attempt(folder), Retention())


def written(folder: Path, attempt: int) -> Path:
    """A file of an unpublished save of an attempt."""
    file = folder / "checkpoints" / STEP / f"attempt-{attempt:06d}-0123abcd-1" / "shards" / "a.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"tensors")
    return file


def test_a_file_that_was_created_has_no_other_writer(tmp_path: Path) -> None:
    """An older attempt may hold its own file open when it is suspended."""
    with open(tmp_path / "manifest.json.partial", "wb") as late:
        storage = StorageFolder(str(tmp_path))
        storage.create("manifest.json", b"of the newer attempt")
        late.write(b"of the older one")
        late.flush()
        assert storage.read("manifest.json") == b"of the newer attempt"


def test_without_hard_links_a_file_is_still_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_links(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    storage = StorageFolder(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        storage.create("first", b"1")
        storage.create("manifest.json", b"2")
        with pytest.raises(FileExistsError):
            storage.create("manifest.json", b"3")
    assert storage.read("manifest.json") == b"2"
    assert len(caplog.messages) == 1


def test_what_a_newer_attempt_writes_during_a_removal_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = publisher(tmp_path)
    old = written(tmp_path, 1)
    listed = StorageFolder.list_names

    def then_write(self: StorageFolder, folder: str = "") -> list[str]:
        names = listed(self, folder)
        if folder == STEP and not newer:
            newer.append(written(tmp_path, 2))
        return names

    newer: list[Path] = []
    monkeypatch.setattr(StorageFolder, "list_names", then_write)
    ours.discard(1)
    assert not old.parent.parent.exists()
    assert newer[0].read_bytes() == b"tensors"


def test_leftovers_that_cannot_be_removed_end_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, 1)
    begin_attempt(tmp_path)
    ours = publisher(tmp_path)

    def busy(*_: object) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(StorageFolder, "remove", busy)
    with caplog.at_level(logging.WARNING):
        ours.begin()
    (message,) = caplog.messages
    assert "files of earlier attempts could not be removed: [Errno 39]" in message


def test_a_damaged_record_of_damage_keeps_the_files(tmp_path: Path) -> None:
    file = written(tmp_path, 1)
    (tmp_path / "checkpoints" / STEP / DAMAGED).write_text('{"errors": [')
    publisher(tmp_path).begin()
    assert file.exists()


@pytest.mark.parametrize("content", ['{"step": 1', "[]", '{"step": "x", "score": 1}'])
def test_a_damaged_record_of_the_best_step_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / BEST).write_text(content)
    assert best_step(StorageFolder(str(tmp_path))) is None
