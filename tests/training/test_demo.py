"""A small `tvr demo`: it runs every stage once, resumes, and refuses another demo's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.trainer.cli import demo
from tvr.trainer.config import from_json

STAGES = [
    f"{stage}/{split}" for split in ("train", "test", "exchanged") for stage in ("clips", "data")
]
FLAGS = """
    --train-clips 24 --test-clips 8 --ranks 1 --data.num-frames 3 --data.max-words 20
    --model.towers.width 32 --model.towers.layers 1 --model.towers.heads 2
    --model.towers.embed-width 16 --model.towers.image-size 16 --model.towers.patch-size 8
    --model.sequence-header-layers 1
    --train.steps 2 --train.global-batch 8 --train.eval-every 0 --checkpoint.every 0
""".split()


@pytest.fixture(scope="module")
def first_call(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo(["--out", str(out), *FLAGS])


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns inode and change time of every file, which differ if the file is written again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_first_call_runs_every_stage(first_call: tuple[Path, int]) -> None:
    out, code = first_call
    assert code == 0
    for split, count in (("train", 24), ("test", 8), ("exchanged", 8)):
        assert len(list((out / "clips" / split).glob("*.mp4"))) == count
        manifest = read_manifest(str(out / "data" / split))
        assert (manifest.num_samples, manifest.num_frames, manifest.short_side) == (count, 3, 16)
    keys = [list(read_manifest(str(out / "data" / x)).samples.key) for x in ("test", "exchanged")]
    assert keys[0] == keys[1]

    run_dir = out / "run"
    events = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2]
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert (evaluation["step"], evaluation["videos"], evaluation["captions"]) == (2, 8, 8)
    assert 0 <= evaluation["binding_accuracy"] <= 100
    assert len(evaluation["queries"]) == 8
    page = (run_dir / "report.html").read_text()
    assert evaluation["queries"][0]["caption"] in page
    assert "data:image/" in page  # the clips themselves

    config = from_json((run_dir / "config.json").read_text(), where="config.json")
    assert config.data.train == str(out / "data" / "train")
    assert config.data.test_exchanged == str(out / "data" / "exchanged")
    assert config.model.tokenizer == str(out / "tokenizer")
    assert (config.train.steps, config.train.micro_batch) == (2, 8)
    assert config.model.towers.width == 32


def test_a_second_call_repeats_nothing(
    first_call: tuple[Path, int], capfd: pytest.CaptureFixture[str]
) -> None:
    out, _ = first_call
    before = files(out)
    evaluation = (out / "run" / "evaluation.json").read_text()
    capfd.readouterr()
    assert demo(["--out", str(out), *FLAGS]) == 0
    printed = capfd.readouterr().out
    for stage in (*STAGES, "tokenizer", "run"):
        assert f"{stage}: complete" in printed
    assert "rendered" not in printed
    assert "8 captions, 8 videos" in printed
    assert "text to video" in printed
    assert "binding accuracy" in printed
    assert f"report: {out / 'run' / 'report.html'}" in printed
    after = files(out)
    reused = {name for name in before if name.startswith(("clips/", "data/", "tokenizer/"))}
    assert len(reused) > 40
    assert {name for name in reused if after[name] != before[name]} == set()
    checkpoint = [name for name in before if "step-00000002/" in name]
    assert checkpoint
    assert all(after[name] == before[name] for name in checkpoint)
    assert set(after) == set(before)
    assert (out / "run" / "evaluation.json").read_text() == evaluation


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train-clips", "25"), "demo of other sizes (train_clips was 24, is 25)"),
        (("--test-clips", "9"), "demo of other sizes (test_clips was 8, is 9)"),
        (("--data.num-frames", "4"), "demo of other sizes (num_frames was 3, is 4)"),
        (("--ranks", "3"), "--ranks 3 must be at least 1 and divide train.global_batch=8"),
        (("--ranks", "0"), "--ranks 0 must be at least 1"),
        (("--data.train", "elsewhere"), "data.train: the demo makes its own"),
        (("--model.tokenizer", "elsewhere"), "model.tokenizer: the demo makes its own"),
    ],
)
def test_other_sizes_or_data_are_refused(
    first_call: tuple[Path, int],
    capfd: pytest.CaptureFixture[str],
    flags: tuple[str, str],
    message: str,
) -> None:
    out, _ = first_call
    before = files(out)
    assert demo(["--out", str(out), *FLAGS, *flags]) == 2
    error = capfd.readouterr().err
    assert error.startswith("tvr demo: error: ")
    assert message in error
    after = files(out)
    changed = {name for name in {*before, *after} if after.get(name) != before.get(name)}
    assert changed <= {"settings.json"}  # rewritten by every call
