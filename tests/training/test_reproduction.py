"""`tvr reproduce`: plans of all four benchmarks, a small real run, its resume, and its verdict."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders.benchmark_files import SPLITS, write_benchmark
from builders.clip_files import numbered_video
from builders.pretrained import save_clip

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.launchers import cli
from tvr.launchers.exit_codes import EXIT_DONE, EXIT_NOT_REACHED, EXIT_PREEMPTED, EXIT_USAGE
from tvr.trainer.comparison.statistics import bootstrap_interval
from tvr.trainer.config import Config, merged, to_json
from tvr.trainer.model.tokenizer import train_tokenizer
from tvr.trainer.reproduction.cli import DOCUMENT, TABLE, reproduce
from tvr.trainer.reproduction.interval import recall_interval, student_t
from tvr.trainer.reproduction.packs import PACKS, other_towers
from tvr.trainer.reproduction.plan import ReproductionOptions, plan_reproduction
from tvr.trainer.reproduction.steps import run_as_child, run_steps
from tvr.trainer.reproduction.table import read_table

CLIPS = 12
WORDS = ("dog", "cat", "car", "ball", "tree", "bird")
SETTINGS = {
    "data": {"num_frames": 2, "max_words": 16, "workers": 0},
    "model": {"sequence_header_layers": 0},
    "train": {
        "steps": 2,
        "global_batch": 4,
        "warmup_steps": 0,
        "eval_every": 0,
        "precision": "fp32",
    },
    "checkpoint": {"every": 0},
}


def captions() -> list[list[str]]:
    return [
        [f"a {WORDS[n % 6]} runs {n} times", f"one {WORDS[n % 6]} jumps {n} times"]
        for n in range(CLIPS)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a tiny CLIP, settings, and the files of all four benchmarks."""
    folder = tmp_path_factory.mktemp("inputs")
    files = []
    for number in range(CLIPS):
        files.append(folder / f"clip-{number}.mp4")
        files[-1].write_bytes(numbered_video(4, first=8 * number, bframes=0))
    for benchmark in SPLITS:
        write_benchmark(folder / benchmark, benchmark, files, captions())
    texts = [text for own in captions() for text in own]
    tokenizer = train_tokenizer(texts, folder / "words", vocab_size=560, max_words=16)
    save_clip(folder / "clip", tokenizer, width=16, image_size=16)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return folder


def flags(inputs: Path, benchmark: str, out: Path, *more: str) -> list[str]:
    own = inputs / benchmark
    return [
        *(benchmark, "--annotations", str(own / "annotations"), "--videos", str(own / "videos")),
        *("--pretrained", str(inputs / "clip"), "--config", str(inputs / "settings.json")),
        *("--out", str(out), "--short-side", "16", "--ranks", "1", "--seeds", "2", *more),
    ]


class Recorder:
    """Runs commands in this process, and notes them; `stop_at` ends a call before a command."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.commands: list[list[str]] = []
        self._stop_at = stop_at

    def __call__(self, command: Sequence[str]) -> int:
        if len(self.commands) == self._stop_at:
            raise KeyboardInterrupt
        self.commands.append(list(command))
        assert command[0] == "tvr"
        words = list(command[1:])
        # One process is enough for four small clips, and it needs no start.
        return cli.main([*words, "--processes", "0"] if words[0] == "pack" else words)


# ------------------------------------------------------------------- plans


@pytest.mark.parametrize("benchmark", SPLITS)
def test_a_dry_run_reads_the_files_and_prints_every_command(
    benchmark: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert reproduce(flags(inputs, benchmark, out, "--dry-run"), run=Recorder(0)) == EXIT_DONE
    assert not out.exists()
    printed, packed = capsys.readouterr().out, len(SPLITS[benchmark])
    for split in SPLITS[benchmark]:
        size = CLIPS // 3 if "train" not in split else CLIPS - CLIPS // 3 * (packed - 1)
        assert f"{benchmark} {split}: {size} videos, published " in printed
        assert f"pack-{split} (to do)" in printed
    commands = [line.strip() for line in printed.splitlines() if line.startswith("    tvr ")]
    kinds = [shlex.split(line)[1] for line in commands]
    assert kinds == ["pack"] * packed + ["evaluate"] + ["train", "evaluate"] * 2
    assert f"--recipe {benchmark}_b32" in commands[packed + 1]
    goal = PACKS[benchmark].goal("b32")  # pyright: ignore[reportArgumentType]
    assert f"R@1 text to video {goal.text_to_video[1]}" in printed


@pytest.mark.parametrize("benchmark", SPLITS)
def test_the_commands_of_a_plan_are_understood(
    benchmark: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every flag of a planned command is one of that command."""
    texts = {}
    for name in ("pack", "evaluate", "train"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        texts[name] = capsys.readouterr().out
    plan = plan_reproduction(options(inputs, benchmark, tmp_path))
    for step in plan.steps:
        for flag in (word for word in step.command[2:] if word.startswith("--")):
            assert f"{flag} " in texts[step.command[1]], (step.name, flag)


def options(inputs: Path, benchmark: str, out: Path, **changes: object) -> ReproductionOptions:
    given = ReproductionOptions(
        benchmark=benchmark,  # pyright: ignore[reportArgumentType]
        annotations=str(inputs / benchmark / "annotations"),
        videos=str(inputs / benchmark / "videos"),
        pretrained=inputs / "clip",
        out=out,
        config=inputs / "settings.json",
        seeds=2,
        ranks=1,
    )
    return replace(given, **changes)  # pyright: ignore[reportArgumentType]


def test_the_batch_is_divided_among_the_ranks(inputs: Path, tmp_path: Path) -> None:
    plan = plan_reproduction(options(inputs, "msrvtt", tmp_path, ranks=2))
    train = plan.steps[3].line
    assert train.startswith("tvr launch local --ranks 2 -- tvr train --recipe msrvtt_b32")
    assert train.endswith("--train.seed 0 --train.micro-batch 2")
    with pytest.raises(ValueError, match=r"--ranks 3 must divide train\.global_batch=4"):
        plan_reproduction(options(inputs, "msrvtt", tmp_path, ranks=3))
    # Without settings of one's own: the recipe's ranks.
    plan = plan_reproduction(options(inputs, "didemo", tmp_path, ranks=None, config=None))
    assert "--ranks 8 -- tvr train --recipe didemo_b32" in plan.steps[4].line
    assert plan.steps[4].line.endswith("--train.micro-batch 16")


def test_towers_without_a_recipe_are_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_reproduction(options(inputs, "msrvtt", tmp_path, towers="b16"))
    assert "msrvtt_b16" in plan.steps[3].line
    assert plan.pack.goal("b16").video_to_text[1] == 49.6
    assert reproduce(flags(inputs, "msvd", tmp_path, "--towers", "b16")) == EXIT_USAGE
    assert "towers='b16' of msvd must be one of b32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (("--seeds", "0"), "--seeds 0 must be at least 1"),
        (("--pretrained", "nowhere"), "--pretrained nowhere has no config.json"),
        (("--annotations", "nowhere"), "msvd train: annotations='nowhere': no file"),
        (("--videos", "."), "bad clips or rows, more than --max-bad 0"),
    ],
)
def test_bad_inputs_end_before_any_work(
    flag: tuple[str, str],
    message: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Recorder(0)
    for more in ((), ("--dry-run",)):
        assert reproduce(flags(inputs, "msvd", Path("out"), *flag, *more), run=run) == EXIT_USAGE
        ended = capsys.readouterr()
        assert message in ended.out + ended.err
    assert not Path("out").exists()


# ---------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder, int]:
    """MSVD, which has three splits and several captions a video; stopped once, before seed 1."""
    out = tmp_path_factory.mktemp("reproduction") / "out"
    argv, run = flags(inputs, "msvd", out), Recorder(stop_at=6)
    with pytest.raises(KeyboardInterrupt):
        reproduce(argv, run=run)
    # The record of the last command is lost: as if the call was killed before it was written.
    (out / "steps" / "evaluate-seed-0.json").unlink()
    again = Recorder()
    code = reproduce(argv, run=again)
    run.commands += again.commands
    return out, run, code


def test_a_stopped_run_goes_on_and_writes_the_table(
    inputs: Path, finished: tuple[Path, Recorder, int]
) -> None:
    out, run, code = finished
    names = [command[1] for command in run.commands]
    first = ["pack", "pack", "pack", "evaluate", "train", "evaluate"]
    assert names == [*first, "evaluate", "train", "evaluate"]
    for split in SPLITS["msvd"]:
        manifest = read_manifest(str(out / "data" / split))
        assert (manifest.num_samples, manifest.num_captions, manifest.num_frames) == (4, 8, 2)
    # Four videos of 670, so nothing is reached whatever they score.
    assert code == EXIT_NOT_REACHED
    document = json.loads((out / DOCUMENT).read_text())
    assert (document["videos"], document["published_videos"], document["reached"]) == (
        *(4, 670),
        False,
    )
    text = (out / TABLE).read_text()
    assert "2 seeds, 4 test videos of 670 published" in text
    assert "The test split is not complete: no number can be compared." in text
    assert "| CLIP4Clip ViT-B/32 (seqTransf) | raw | 45.2 | 75.5 | 84.3 |  |  |" in text
    for seed in (0, 1):
        stored = json.loads((out / "results" / f"seed-{seed}.json").read_text())
        config = json.loads((out / "runs" / f"seed-{seed}" / "config.json").read_text())
        assert config["train"]["seed"] == seed
        assert config["data"]["test"] == str(out / "data" / "val")
        assert stored["data"] == str(out / "data" / "test")
        own = document["seeds"][str(seed)]
        assert own["raw"]["text_to_video"]["recall_at_1"] == stored["text_to_video"]["recall_at_1"]
        rescored = stored["rescored"]["dual_softmax"]["video_to_text"]
        assert own["dual_softmax"]["video_to_text"]["mean_rank"] == rescored["mean_rank"]
    (verdict,) = document["verdicts"]
    recalls = [document["seeds"][s]["raw"]["text_to_video"]["recall_at_1"] for s in "01"]
    assert verdict["found"]["mean"] == pytest.approx(np.mean(recalls))


def test_a_third_call_runs_nothing(
    inputs: Path, finished: tuple[Path, Recorder, int], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, _ = finished
    table = (out / TABLE).read_text()
    assert reproduce(flags(inputs, "msvd", out), run=Recorder(0)) == EXIT_NOT_REACHED
    assert capsys.readouterr().out.count(": complete\n") == 8
    assert (out / TABLE).read_text() == table


def test_other_settings_of_a_finished_step_are_refused(
    inputs: Path, finished: tuple[Path, Recorder, int], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, _ = finished
    argv = flags(inputs, "msvd", out, "--short-side", "32")
    assert reproduce(argv, run=Recorder(0)) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "step pack-train" in error
    assert "16 -> 32" in error
    # The number of ranks and the launcher are no part of a result.
    assert reproduce(flags(inputs, "msvd", out, "--ranks", "2"), run=Recorder(0)) == 1


def test_a_step_depends_on_the_steps_before_it(inputs: Path, tmp_path: Path) -> None:
    """A new training or data set must not meet the results of the old one."""
    given = options(inputs, "msvd", tmp_path)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**SETTINGS, "loss": {"hardness": 0.5}}))
    names = {
        name: [
            one.name
            for one, two in zip(
                plan_reproduction(given).steps,
                plan_reproduction(replace(given, **change)).steps,  # pyright: ignore[reportArgumentType]
                strict=True,
            )
            if one.identity != two.identity
        ]
        for name, change in (("config", {"config": other}), ("side", {"short_side": 32}))
    }
    assert names["config"] == [f"{kind}-seed-{n}" for n in (0, 1) for kind in ("train", "evaluate")]
    assert len(names["side"]) == 8


def test_slurm_gets_the_trainings_and_the_next_call_goes_on(
    inputs: Path,
    finished: tuple[Path, Recorder, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done, _, _ = finished
    out = tmp_path / "out"
    out.mkdir()
    (out / "data").symlink_to(done / "data")
    argv = flags(inputs, "msvd", out, "--slurm=--nodes 1 --time 8:00:00")
    run = Recorder()
    assert reproduce(argv, run=run) == EXIT_PREEMPTED
    assert [command[1] for command in run.commands] == ["pack", "pack", "pack", "evaluate"]
    printed = capsys.readouterr().out
    for seed in (0, 1):
        line = "tvr launch slurm --nodes 1 --time 8:00:00 -- tvr train --recipe msvd_b32 --run-dir"
        assert f"{line} {out}/runs/seed-{seed}" in printed
    # The jobs ran.
    (out / "runs").symlink_to(done / "runs")
    run = Recorder()
    assert reproduce(argv, run=run) == EXIT_NOT_REACHED
    assert [command[1] for command in run.commands] == ["evaluate", "evaluate"]


def test_a_job_with_other_settings_is_not_taken_for_the_planned_one(
    inputs: Path, tmp_path: Path
) -> None:
    plan = plan_reproduction(options(inputs, "msvd", tmp_path / "out", slurm="--nodes 1"))
    step = next(each for each in plan.steps if each.kind == "train")

    def run(command: Sequence[str]) -> int:
        (product,) = [each.product for each in plan.steps if each.command == tuple(command)]
        product.parent.mkdir(parents=True, exist_ok=True)
        product.write_text("{}")
        return 0

    def jobs_of(config: Config) -> int:
        run(step.command)
        (step.product.parent / "config.json").write_text(to_json(config))
        return run_steps(plan, run, lambda text: None)

    submitted = merged(plan.config, {"model": {"pretrained": str(inputs / "clip")}}, where="")
    # Not evaluated to its last step; the seed, the place of the data and a logging interval differ.
    for change in ({"seed": 1}, {"log_every": 7}):
        assert jobs_of(merged(submitted, {"train": change}, where="")) == EXIT_PREEMPTED
    for change, name in (
        ({"loss": {"hardness": 0.5}}, r"loss\.hardness 0\.5 -> 0\.0"),
        ({"train": {"learning_rate": 0.5}}, r"train\.learning_rate 0\.5 -> 0\.0001"),
        ({"model": {"pretrained": "other"}}, r"model\.pretrained other -> "),
    ):
        with pytest.raises(ValueError, match=rf"was trained with other settings \({name}"):
            jobs_of(merged(submitted, change, where=""))


def test_a_failed_step_ends_the_call_with_its_code(inputs: Path, tmp_path: Path) -> None:
    plan = plan_reproduction(options(inputs, "msvd", tmp_path / "out"))
    for code, expected in ((2, 2), (3, 3), (75, 75), (-9, 3), (0, 3)):
        # 0 without the product is a failure, too.
        assert run_steps(plan, lambda command, code=code: code, lambda text: None) == expected
    assert list((tmp_path / "out" / "steps").glob("*")) == []


def test_two_calls_do_not_work_in_one_folder(inputs: Path, tmp_path: Path) -> None:
    plan = plan_reproduction(options(inputs, "msvd", tmp_path / "out"))

    def second_call(command: Sequence[str]) -> int:
        with pytest.raises(ValueError, match="another `tvr reproduce` works there"):
            run_steps(plan, Recorder(0), lambda text: None)
        return 3

    assert run_steps(plan, second_call, lambda text: None) == 3


def test_a_step_is_a_process_with_the_commands_exit_code(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_as_child(["tvr", "--version"]) == EXIT_DONE
    assert capfd.readouterr().out.startswith("tvr ")
    assert run_as_child(["tvr", "nonsense"]) == EXIT_USAGE


# ----------------------------------------------------------------- verdict


def test_the_interval_has_both_errors() -> None:
    rng = np.random.default_rng(0)
    videos = np.arange(200)
    ranks = [np.where(rng.random(200) < 0.4 + 0.02 * seed, 1, 7) for seed in range(3)]
    found = recall_interval(ranks, videos, samples=2_000)
    of_seeds = [100 * float(np.mean(own == 1)) for own in ranks]
    hits = np.mean([100.0 * (own == 1) for own in ranks], axis=0)
    low, high = bootstrap_interval(hits, clusters=videos, samples=2_000)
    assert found.mean == pytest.approx(np.mean(of_seeds))
    assert found.of_videos == (low, high)
    spread = 4.303 * np.std(of_seeds, ddof=1) / np.sqrt(3)
    assert found.high - found.mean == pytest.approx(np.hypot(high - found.mean, spread))
    assert found.mean - found.low == pytest.approx(np.hypot(found.mean - low, spread))
    alone = recall_interval(ranks[:1], videos, samples=2_000)
    assert (alone.deviation, (alone.low, alone.high)) == (None, alone.of_videos)
    with pytest.raises(ValueError, match="each seed needs those of 199"):
        recall_interval(ranks, videos[:-1])


def test_students_quantiles_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 5, 9, 10, 11, 30, 200):
        assert student_t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-3)


def test_the_interval_covers_the_truth() -> None:
    """Three seeds whose recall of 50 % varies by some points, each on 300 videos."""
    rng, inside, trials = np.random.default_rng(1), 0, 200
    for _ in range(trials):
        ease = rng.normal(0.0, 1.0, 300)
        ranks = []
        for shift in rng.normal(0.0, 0.05, 3):
            ranks.append(np.where(ease + rng.normal(0.0, 0.5, 300) + shift > 0, 1, 2))
        found = recall_interval(ranks, np.arange(300), samples=300)
        inside += found.low <= 50.0 <= found.high
    assert inside / trials >= 0.92


@pytest.mark.parametrize(("hits", "reached"), [(320, True), (230, False)])
def test_the_number_is_reached_if_the_interval_holds_it(
    hits: int, reached: bool, inputs: Path, tmp_path: Path
) -> None:
    """All 670 videos of MSVD's test split, of which `hits` have rank 1, against 45.2."""
    plan = plan_reproduction(options(inputs, "msvd", tmp_path))
    metrics = {
        f"{name}": 1.0
        for name in (*(f"recall_at_{k}" for k in (1, 5, 10, 50)), "median_rank", "mean_rank")
    }
    both = {"text_to_video": metrics, "video_to_text": metrics}
    for number, path in enumerate((plan.zero_shot, *plan.trained.values())):
        ranks = [1 if row < hits + number else 9 for row in range(670)]
        rows = [{"key": f"v{row}", "caption": "x", "rank": rank} for row, rank in enumerate(ranks)]
        stored = {
            **{"videos": 670, "step": None, "protocol": None, "queries": rows, **both},
            "rescored": {"dual_softmax": both},
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(stored))
    table = read_table(plan, samples=1_000)
    assert table.is_complete
    assert table.is_reached is reached
    word = "reaches" if reached else "does not reach"
    text = table.markdown()
    assert f"] {word} 45.2 (CLIP4Clip ViT-B/32 (seqTransf))" in text
    # A number of larger towers says nothing about that of ViT-B/32.
    note = "has towers with patches of 8 pixels, and the published ones of --towers b32 have 32"
    assert note in text


def test_towers_of_the_published_size_have_no_note(tmp_path: Path) -> None:
    for vision, towers, noted in (
        ({"patch_size": 32}, "b32", False),
        ({}, "b32", False),
        ({"patch_size": 16}, "b16", False),
        ({"patch_size": 16}, "b32", True),
        ({}, "b16", True),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision}))
        assert (other_towers(tmp_path, towers) is not None) is noted  # pyright: ignore[reportArgumentType]
