"""Files damaged at random: each gives a documented error or a right result, in bounded time.

`--fuzz-inputs N` and `--fuzz-seed S` run more inputs or other ones; `--fuzz-replay FILE` runs the
input in a file that a failed run left.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.fuzz.runner import TARGETS, FuzzReport, make_seeds, replay, run_fuzz

from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.records import Clip


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole files of all kinds."""
    folder = tmp_path_factory.mktemp("fuzz_seeds")
    make_seeds(folder)
    return folder


@pytest.fixture(scope="module")
def report(
    seeds: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> FuzzReport:
    """What came of all inputs; the inputs that went wrong stay in pytest's folder."""
    if request.config.getoption("--fuzz-replay"):
        pytest.skip("--fuzz-replay runs one input only")
    failures = tmp_path_factory.mktemp("fuzz") / "failures"
    failures.mkdir()
    report = run_fuzz(
        request.config.getoption("--fuzz-inputs"),
        seed=request.config.getoption("--fuzz-seed"),
        seeds=seeds,
        failures=failures,
        max_s=request.config.getoption("--fuzz-seconds"),
    )
    print(f"{report.num_inputs} damaged inputs\n{report.table()}")
    return report


@pytest.mark.parametrize("target", [target.name for target in TARGETS])
def test_damaged_files_give_documented_errors_or_right_results(
    report: FuzzReport, target: str
) -> None:
    found = [finding for finding in report.findings if finding.target == target]
    again = "pytest tests/data/test_fuzz.py --fuzz-replay"
    text = "\n".join(f"{finding}\n  {again} '{finding.path}'" for finding in found[:5])
    assert not found, f"{len(found)} inputs went wrong, among them:\n{text}"
    # Whole and harmlessly changed files are read: the checks are not passed by refusing all.
    assert report.outcomes[target]["read"] > 0


def test_a_decoder_that_crashes_costs_one_clip(report: FuzzReport, tmp_path: Path) -> None:
    """Only libav's code may end its process; packing then refuses the clip, and goes on."""
    assert [crash for crash in report.crashes if crash.target != "containers"] == []
    for crash in report.crashes:
        clips = [
            Clip(key=key, video=str(path), captions=("x",), video_id=key)
            for key, path in (
                ("bad", crash.path),
                ("good", next(iter(crash.path.parent.iterdir()))),
            )
        ]
        out = str(tmp_path / f"{crash.index}")
        manifest = pack_shards(clips, out, layout="frames", processes=2, max_bad=2)
        assert manifest is not None


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_whole_files_are_read(target: type, seeds: Path, tmp_path: Path) -> None:
    kind = target(seeds / target.name, tmp_path)
    assert {name: kind.check(name, content) for name, content in kind.seeds.items()} == {
        name: "read" for name in kind.seeds
    }


def test_replay(seeds: Path, request: pytest.FixtureRequest) -> None:
    """Runs the input in the file of `--fuzz-replay` in this process."""
    path = request.config.getoption("--fuzz-replay")
    if path is None:
        pytest.skip("--fuzz-replay names no file")
    print(replay(Path(path), seeds))
