"""A folder of files as people have them, packed with the real command and compared with `odd_list`.

    PYTHONPATH=tests python -m builders.odd_files FOLDER

makes the files in FOLDER/files, packs them in both layouts, and writes FOLDER/table.txt.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builders.odd_list import FILES, OddFile
from builders.shown_videos import read_number, undo

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.dataset.sample_codec import decode_members, parse_meta
from tvr.data_prep.reading.sample_reader import SampleReader

STORED_FRAMES = 8
ALL_FRAMES = 100
LIMIT_S = 300
LAYOUTS = {
    "frames": ("--layout", "frames", "--num-frames", str(STORED_FRAMES)),
    "video": ("--layout", "video", "--reencode"),
}


def make_folder(folder: Path, files: Sequence[OddFile] = FILES) -> Path:
    """Writes the files and `odd.jsonl`, which names each of them; returns the annotation file."""
    lines = []
    for number, each in enumerate(files):
        path = folder / each.name
        path.parent.mkdir(parents=True, exist_ok=True)
        each.make(path)
        row = {"video": each.name, "caption": f"clip {number}", "video_id": f"odd {number}"}
        lines.append(json.dumps(row))
    (folder / "odd.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "odd.jsonl"


def pack_command(annotations: Path, out: Path, layout: str, max_bad: int) -> list[str]:
    """Returns the command line that packs the folder."""
    files = ["--annotations", str(annotations), "--out", str(out), "--max-bad", str(max_bad)]
    more = [*LAYOUTS[layout], "--processes", "2", "--no-words"]
    return [sys.executable, "-m", "tvr.launchers.cli", "pack", *files, *more]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What packing made of a file."""

    file: OddFile
    found: str
    """In the words of `OddFile.expected`."""
    detail: str
    """Numbers on the frames, or the refusal's detail."""
    key: str
    is_right: bool


def read_outcomes(out: Path, files: Sequence[OddFile] = FILES) -> list[Outcome]:
    """Returns what became of each file, by the packed data set and its bad.jsonl."""
    packed_rows: dict[int, int] = {}
    reader = SampleReader(str(out), num_frames=1, image_size=16)
    for row, video_id in enumerate(read_manifest(str(out)).samples.video_id):
        packed_rows[int(video_id.split()[1])] = row
    bad: dict[int, dict[str, str]] = {}
    for line in (out / "bad.jsonl").read_text().splitlines():
        entry = json.loads(line)
        place = re.search(r"odd\.jsonl:(\d+)\b", entry["detail"])
        assert place is not None, f"the refusal names no line: {entry}"
        bad[int(place[1]) - 1] = entry
    return [
        _refusal(each, bad[number])
        if number in bad
        else _packed(each, reader, packed_rows.get(number))
        for number, each in enumerate(files)
    ]


def _refusal(each: OddFile, entry: dict[str, str]) -> Outcome:
    is_right = entry["reason"] == each.reason and each.detail in entry["detail"]
    found = f"refused: {entry['reason']}"
    return Outcome(
        file=each, found=found, detail=entry["detail"], key=entry["key"], is_right=is_right
    )


def _packed(each: OddFile, reader: SampleReader, row: int | None) -> Outcome:
    if row is None:
        return Outcome(file=each, found="lost", detail="", key="", is_right=False)
    key, members = reader.key(row), reader.members(row)
    frames, _ = decode_members(key, members, parse_meta(key, members), ALL_FRAMES)
    numbers: list[int] = []
    if each.numbers is not None:
        try:
            numbers = [read_number(undo(each.turn, frame)) for frame in frames]
        except AssertionError as error:
            return Outcome(file=each, found=str(error), detail="", key=key, is_right=False)
    expected = each.count if each.numbers is None else len(each.numbers)
    is_right = not each.reason and len(frames) == expected
    is_right &= each.numbers is None or tuple(numbers) == each.numbers
    found = f"{len(frames)} frames"
    return Outcome(file=each, found=found, detail=f"{numbers or ''}", key=key, is_right=is_right)


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns a line a file: right or not, file, expectation, what was found, key, detail."""
    rows = [("", "file", "expected", "found", "key", "numbers on the frames, or the refusal")]
    for each in outcomes:
        name = ascii(each.file.name)[1:-1]
        mark = "ok" if each.is_right else "NO"
        rows.append(
            (mark, name, each.file.expected, each.found, each.key, ascii(each.detail)[1:-1])
        )
    widths = [min(44, max(len(row[column]) for row in rows)) for column in range(5)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)]
        lines.append("  ".join([*cells, row[5][:200]]).rstrip())
    return "\n".join(lines) + "\n"


def pack_folder(folder: Path, layout: str) -> list[Outcome]:
    """Packs folder/files with the real command, and returns the outcomes.

    Raises:
        ChildProcessError: the command failed; the message holds what it printed.
    """
    out = folder / f"packed {layout}"
    annotations = folder / "files" / "odd.jsonl"
    max_bad = sum(bool(each.reason) for each in FILES)
    done = subprocess.run(
        pack_command(annotations, out, layout, max_bad + 40),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if done.returncode:
        raise ChildProcessError(f"exit code {done.returncode}: {done.stdout}{done.stderr[-3000:]}")
    return read_outcomes(out)


def main(folder: Path) -> int:
    """Makes and packs the files, and writes the table; returns 1 if an outcome is not right."""
    (folder / "files").mkdir(parents=True)
    make_folder(folder / "files")
    text, is_right = "", True
    for layout in LAYOUTS:
        outcomes = pack_folder(folder, layout)
        is_right &= all(each.is_right for each in outcomes)
        text += f"layout {layout}\n{table(outcomes)}\n"
    (folder / "table.txt").write_text(text)
    print(text)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
