"""`tvr pack` and `tvr verify`: exit codes and one-line errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.clip_files import numbered_video

from tvr.data_prep import cli
from tvr.data_prep.check import cli as check_cli


@pytest.fixture
def annotations(tmp_path: Path) -> str:
    (tmp_path / "a.mp4").write_bytes(numbered_video(5))
    (tmp_path / "b.mp4").write_bytes(b"garbage")
    path = tmp_path / "a.csv"
    path.write_text("video,caption\na.mp4,one\na.mp4,\na.mp4,two\nb.mp4,three\n")
    return str(path)


def pack(annotations: str, out: Path, *more: str) -> int:
    return cli.pack(["--annotations", annotations, "--out", str(out), "--layout", "frames", *more])


def test_pack_and_verify(
    annotations: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert pack(annotations, out, "--max-bad", "1", "--num-frames", "3", "--short-side", "16") == 0
    printed = capsys.readouterr()
    assert "packed 1 clips with 2 captions into 1 shards" in printed.out
    assert "dropped 1 empty captions" in printed.out
    assert f"left out 1 clips (1 unreadable), listed in {out}/bad.jsonl" in printed.out
    assert printed.err == ""  # no progress bar without a terminal
    assert check_cli.verify([str(out)]) == 0
    assert "1 samples in 1 shards" in capsys.readouterr().out
    shard = out / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert check_cli.verify([str(out), "--decode", "0"]) == 3
    printed = capsys.readouterr().out
    assert "2 problems" in printed
    assert "shard-000000.tar" in printed
    assert check_cli.verify([str(out), "--max-shown", "1"]) == 3
    assert "and 1 more" in capsys.readouterr().out


def test_errors_are_one_line_and_exit_code_2(
    annotations: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    codes = [
        pack(annotations, out),
        pack(str(tmp_path / "none.csv"), out),
        pack(annotations, out, "--num-frames", "0"),
        check_cli.verify([str(out)]),
        check_cli.verify(["nosuchprotocol://x"]),
    ]
    assert codes == [2] * 5
    printed = capsys.readouterr()
    expected = [
        "tvr pack: error: 1 bad samples while packing",
        "tvr pack: error: annotation file",
        "tvr pack: error: num_frames=0 must be from 1",
        f"tvr verify: error: {out}/manifest.json does not exist",
        "tvr verify: error: Protocol not known",
    ]
    for line, start in zip(printed.err.splitlines(), expected, strict=True):
        assert line.startswith(start)
    assert printed.out == ""


@pytest.mark.parametrize(
    "argv", [[], ["--annotations", "a.csv", "--out", "o", "--layout", "tar"], ["--nonsense"]]
)
def test_bad_usage_is_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.pack(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err
