"""Finds video files by id, with one listing of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tvr.data_prep.annotations.video_lookup import VideoFiles


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a", "a.mp4"),  # before a.avi
        ("b", "sub/b.webm"),
        ("c", "c.mkv"),  # before the one in the sub-folder
        ("1@N_d.mov", "1@N_d.mov"),
        ("1@N_e.mov", "1@N_e.mp4"),  # converted
        ("1@N_f.mov", "1@N_f.mov.mp4"),
        ("1@N_g.", "1@N_g.mp4"),  # DiDeMo has names that end with a dot
        ("h.i", None),  # ".i" is not a video suffix
        ("sub/b", "sub/b.webm"),
        ("none/b", None),
        ("sub", None),
        ("j", "link/j.mp4"),
        ("deep", None),
    ],
)
def test_find(tmp_path: Path, name: str, found: str | None) -> None:
    videos = tmp_path / "videos"
    touch(videos, "a.avi", "a.mp4", "sub/b.webm", "sub/c.mkv", "c.mkv")
    touch(videos, "1@N_d.mov", "1@N_d.mp4", "1@N_e.mp4", "1@N_f.mov.mp4", "1@N_g.mp4", "h.mp4")
    touch(videos, "sub/sub/deep.mp4")
    touch(tmp_path, "elsewhere/j.mp4")
    (videos / "link").symlink_to(tmp_path / "elsewhere")
    expected = None if found is None else f"{videos}/{found}"
    assert VideoFiles(str(videos)).find(name) == expected


def test_a_name_in_two_sub_folders_is_refused_when_it_is_looked_up(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.mp4", "y/a.mp4", "y/b.mp4")
    files = VideoFiles(str(tmp_path))
    assert files.find("b") == f"{tmp_path}/y/b.mp4"
    with pytest.raises(ValueError, match=r"a: .*x/a\.mp4 and .*y/a\.mp4 have the same name"):
        files.find("a")


def test_expected_names_a_file(tmp_path: Path) -> None:
    files = VideoFiles(str(tmp_path))
    assert files.expected("a") == f"{tmp_path}/a.mp4"
    assert files.expected("a.mov") == f"{tmp_path}/a.mov"
    with pytest.raises(FileNotFoundError, match=r"none': no such folder"):
        VideoFiles(str(tmp_path / "none"))


def test_a_folder_is_listed_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    files = VideoFiles(str(tmp_path))
    assert files.find("b") is None
    touch(tmp_path, "b.mp4")
    assert files.find("b") is None


def test_names_of_another_normal_form_are_found(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    touch(tmp_path, f"{decomposed}.mp4", "sub/caf\u00e8.mp4")
    files = VideoFiles(str(tmp_path))
    assert files.find(composed) == files.find(decomposed) == f"{tmp_path}/{decomposed}.mp4"
    assert files.find("cafe\u0300.avi") == f"{tmp_path}/sub/caf\u00e8.mp4"
    touch(tmp_path, f"{composed}.mp4")
    files = VideoFiles(str(tmp_path))
    assert files.find(composed) == f"{tmp_path}/{composed}.mp4"
    assert files.find(decomposed) == f"{tmp_path}/{decomposed}.mp4"
