"""Finds video files by id in a folder that is listed once."""

from __future__ import annotations

import posixpath

from tvr.data_prep.records import REFUSED_TEXT
from tvr.data_prep.storage.storage import file_system

# Tried in this order if an id has several files.
SUFFIXES = (
    *(".mp4", ".avi", ".mkv", ".webm", ".mov"),
    *(".m4v", ".mpg", ".mpeg", ".wmv", ".3gp", ".3g2", ".mts", ".flv"),  # DiDeMo's, from Flickr
)


class VideoFiles:
    """The files of a folder (path or fsspec URL) and of its direct sub-folders."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.listings: dict[str, dict[str, list[str]]] = {}
        fs, root = file_system(url)
        if not fs.isdir(root):
            raise FileNotFoundError(f"videos={url!r}: no such folder")

    def find(self, name: str) -> str | None:
        """Returns the URL of a video's file, or None.

        Looks for `name` itself, then for `name` with each of SUFFIXES appended, then for `name`
        with its suffix replaced by each of SUFFIXES. A file in the folder takes precedence over
        files of the same name in sub-folders.

        Args:
            name: Name of the video; it may start with sub-folders.

        Raises:
            ValueError: two sub-folders hold a file of that name, or the name leaves the folder.
        """
        parts = name.split("/")
        if "" in parts or ".." in parts or "\\" in name or REFUSED_TEXT.search(name):
            raise ValueError(
                f"{name!r} must be a name in the folder {self.url}: no absolute path, URL, .. or"
                " backslash"
            )
        folder, _, base = name.rpartition("/")
        if folder not in self.listings:
            self.listings[folder] = _listing(posixpath.join(self.url, folder))
        stem, suffix = posixpath.splitext(base)
        replaced = [stem + other for other in SUFFIXES] if suffix in (".", *SUFFIXES) else []
        for file in (base, *(base + suffix for suffix in SUFFIXES), *replaced):
            found = self.listings[folder].get(file, [])
            if len(found) > 1:
                raise ValueError(
                    f"{name}: {' and '.join(found)} have the same name; keep one of them"
                )
            if found:
                return found[0]
        return None

    def expected(self, name: str) -> str:
        """Returns a URL at which a missing video's file was expected, for error messages."""
        file = name if name.endswith(SUFFIXES) else name + SUFFIXES[0]
        return posixpath.join(self.url, file)


def _listing(url: str) -> dict[str, list[str]]:
    """Returns the URLs of each file name: one in the folder, or one in each sub-folder."""
    files, folders = _entries(url)
    found: dict[str, list[str]] = {}
    for folder in folders:
        for name in _entries(posixpath.join(url, folder))[0]:
            found.setdefault(name, []).append(posixpath.join(url, folder, name))
    return found | {name: [posixpath.join(url, name)] for name in files}


def _entries(url: str) -> tuple[list[str], list[str]]:
    """Returns the names of files and folders in a folder; empty if the folder does not exist."""
    fs, root = file_system(url)
    if not fs.isdir(root):
        return [], []
    files, folders = [], []
    for entry in fs.ls(root, detail=True):
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        # Symbolic links have their own type.
        is_folder = entry["type"] != "file" and fs.isdir(entry["name"])
        (folders if is_folder else files).append(name)
    return sorted(files), sorted(folders)
