"""Runs with several training sets: settings, checks, budgets, metrics, resume."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import jobs
from builders.clip_files import make_dataset
from builders.scraping import parse_samples
from builders.tiny import damaged_data, tiny_config, with_ranks
from builders.worlds import SINGLE_RANK

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.mixture import Mixture
from tvr.data_prep.reading.order import SampleOrder, window_shards
from tvr.data_prep.records import TooManyBadSamples
from tvr.trainer.cli import show_config
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, from_json, merged, to_json
from tvr.trainer.data import training_sets, validate_data_sets
from tvr.trainer.loop import train
from tvr.trainer.pages.dashboard import write_dashboard
from tvr.trainer.pages.report import write_report
from tvr.trainer.recipes.recipes import recipe
from tvr.trainer.run_dir import claim

GLOBAL_BATCH, STEPS, NUM_TRAIN = 8, 6, 48
WEIGHTS = {"films": 2.0, "web": 1.0}
MIXTURE = Mixture(WEIGHTS, 0)
ALONE = {"train": None, "test": None, "test_exchanged": None}


def config_of(data: Path, films: str, web: str, **changes: Any) -> Config:
    """Settings with two training sets; `changes` are further settings."""
    sets = {
        "films": {"url": films, "weight": WEIGHTS["films"]},
        "web": {"url": web, "weight": WEIGHTS["web"], "max_bad": 2},
    }
    base = tiny_config(data, data={**ALONE, "max_bad": 0, "train_sets": sets})
    return merged(base, {"metrics": {"endpoint": "none"}, **changes}, where="test")


def web_rows(data: Path, first: int, end: int) -> list[int]:
    """Rows of the set `web` that these stream positions read."""
    sizes = read_manifest(str(data / "train")).shard_sizes
    pairs = math.ceil(GLOBAL_BATCH * MIXTURE.share_of("web"))
    order = SampleOrder(sizes, MIXTURE.set_seed(1), window_shards(pairs, len(sizes)))
    sets, own = MIXTURE.locate_range(first, end)
    return [order.locate(int(position)).sample for position in own[sets == 1]]


# --------------------------------------------------------------- settings

TWO = {"web": {"url": "/web", "weight": 3.0}, "films": {"url": "/f", "weight": 1.0, "max_bad": 5}}


def test_sets_come_from_a_file_or_a_flag_and_round_trip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = merged(recipe("demo"), {"data": {"train": None, "train_sets": TWO}}, where="here")
    assert from_json(to_json(given), where="there") == given
    assert [(each.name, each.weight, each.max_bad) for each in training_sets(given.data)] == [
        ("films", 1.0, 5),
        ("web", 3.0, 100),
    ]
    flag = (
        '{"web": {"url": "/web", "weight": 3}, "films": {"url": "/f", "weight": 1, "max_bad": 5}}'
    )
    assert show_config(["--data.train", "None", "--data.train-sets", flag]) == 0
    shown = capsys.readouterr()
    assert from_json(shown.out, where="stdout") == given
    assert (
        "training sets, pairs of every 4,096: films 1,024 (25.00%) from /f; web 3,072 (75.00%)"
        " from /web" in shown.err
    )
    # A file changes one value of a set of another file.
    heavier = merged(given, {"data": {"train_sets": {"web": {"weight": 9}}}}, where="here")
    assert heavier.data.train_sets["web"].weight == 9.0
    assert heavier.data.train_sets["films"] == given.data.train_sets["films"]
    assert [each.name for each in training_sets(recipe("demo").data)] == [""]


def test_the_readmes_sets_are_settings() -> None:
    text = (Path(__file__).parents[2] / "trainer" / "README.md").read_text()
    (settings,) = (
        json.loads(body)
        for body in re.findall(r"^```json\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        if "train_sets" in body
    )
    config = merged(recipe("large_scale_l14_64gpu"), settings, where="README.md")
    assert [each.name for each in training_sets(config.data)] == ["films", "own", "web"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": None}, r"data: .*data\.train or data\.train_sets must name"),
        ({"train_sets": TWO}, r"data\.train=.* and data\.train_sets exclude each other.*null"),
        ({"train": None, "train_sets": {"A": TWO["web"]}}, "'A' is no name of a training set"),
        ({"train": None, "train_sets": {"a": {"url": "/a"}}}, r"train_sets\.a\.weight: Field req"),
        (
            {"train": None, "train_sets": {"a": {"url": "/a", "weight": 0}}},
            r"train_sets\.a\.weight: .*greater than 0 \(given: 0\)",
        ),
        (
            {"train": None, "train_sets": {"a": {"url": "/a", "weight": 1, "limit": 3}}},
            r"train_sets\.a\.limit: .*\(given: 3\)",
        ),
        (
            {"train": None, "train_sets": {"a": {"url": "/a", "weight": 1, "max_bad": -1}}},
            r"train_sets\.a\.max_bad: .*greater than or equal to 0",
        ),
        (
            {"train": None, "train_sets": TWO | {"rare": {"url": "/r", "weight": 1e-4}}},
            r"weight 0\.0001 of training set rare \(data\.train_sets\) is too small",
        ),
        (
            {"train": None, "train_sets": TWO | {"more": {"url": "/web/", "weight": 1.0}}},
            r"data\.train_sets: more and web have the same url /web",
        ),
        ({"train": None, "train_sets": ["/a"]}, r"data\.train_sets: .*should be an object"),
    ],
)
def test_invalid_sets_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^some-file: .*{message}") as caught:
        merged(recipe("demo"), {"data": data}, where="some-file")
    assert len(str(caught.value)) < 300


# ----------------------------------------------------------------- checks


def test_sets_are_checked_before_a_run(data: Path, tmp_path: Path) -> None:
    films, web = str(data / "train"), str(data / "test")
    config = config_of(data, films, web)
    found = validate_data_sets(config.data, config.train, SINGLE_RANK)
    assert found.num_samples == {"films": 48, "web": 10}

    def refused(message: str, **changes: Any) -> None:
        wrong = merged(config, changes, where="test")
        with pytest.raises((ValueError, OSError), match=message):
            validate_data_sets(wrong.data, wrong.train, SINGLE_RANK)

    refused(
        r"data\.train_sets\.web: .*test holds 10 samples, fewer than its 10\.7 pairs of a global"
        r" batch \(33\.33% of train\.global_batch=32\)",
        train={"global_batch": 32},
    )
    refused(r"data\.content_words needs the words", data={"content_words": True})
    refused(r"data\.word_drop needs the words", data={"word_drop": True})
    words = make_dataset(tmp_path, 12, words=True)
    sets = {"films": {"url": words}}
    refused(rf"data\.word_drop .*, and {web}", data={"word_drop": True, "train_sets": sets})
    sets = {"films": {"url": str(tmp_path / "none")}}
    refused("none/manifest.json does not exist", data={"train_sets": sets})


def test_a_dry_run_shows_shares_and_epochs(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("tvr.trainer.dry_run.dry_run.free_bytes", lambda: 0)  # without a step
    config = config_of(data, str(data / "train"), str(data / "test"), train={"steps": 90})
    line = ["--run-dir", str(tmp_path / "run"), "--dry-run", "--config"]

    def rows(config: Config, *flags: str) -> dict[str, list[str]]:
        (tmp_path / "settings.json").write_text(to_json(config))
        assert tvr_train([*line, str(tmp_path / "settings.json"), *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        parts = [re.split(r"\s{2,}", text.strip()) for text in lines]
        return {part[0]: part[1:] for part in parts}

    found = rows(config)
    assert found[f"data.train_sets.films: {data}/train"] == ["48", "144", "5"]
    assert found["training sets"][-1] == "epochs of the run"
    # 720 pairs in all.
    assert found["films"] == ["66.67%", "5.3", "9.00", "10.00"]
    assert found["web"] == ["33.33%", "2.7", "3.75", "24.00"]
    assert found["steps per epoch"] == ["7.25 (58 samples)"]
    absent = {"train_sets": {"web": {"url": str(tmp_path / "nowhere")}}}
    found = rows(merged(config, {"data": absent}, where="test"))
    assert found["web"] == ["33.33%", "2.7", "unknown", "unknown"]
    assert found["steps per epoch"] == ["unknown without the training set"]
    assert tvr_train([*line, str(tmp_path / "settings.json"), "--samples", "9"]) == 2
    assert "--samples 9 is the size of data.train" in capsys.readouterr().err


# -------------------------------------------------------------------- runs


def test_a_run_counts_each_set_and_resumes(data: Path, tmp_path: Path) -> None:
    # Steps 2 and 5 read a bad sample of `web`; the other set holds the same keys.
    rows = [web_rows(data, first, first + GLOBAL_BATCH)[0] for first in (8, 32)]
    folder, bad = damaged_data(data, tmp_path / "damaged", rows=rows)
    config = config_of(
        data,
        str(data / "train"),
        str(folder),
        train={"steps": STEPS, "log_keys": True},
        checkpoint={"every": 1, "keep_last": STEPS},
    )
    whole, resumed, spent, other = (tmp_path / n for n in ("whole", "resumed", "spent", "other"))
    train(config, whole)
    steps = jobs.events(whole, "step")
    drawn = [MIXTURE.drawn(GLOBAL_BATCH * number) for number in range(STEPS + 1)]
    for number, step in enumerate(steps, start=1):
        assert step["set_epochs"] == {name: drawn[number][name] / NUM_TRAIN for name in WEIGHTS}
        assert step["set_pairs"] == {
            name: drawn[number][name] - drawn[number - 1][name] for name in WEIGHTS
        }
        assert step["epoch"] == number * GLOBAL_BATCH / (2 * NUM_TRAIN)
        keys = jobs.global_batches(whole)[number]
        for name, count in step["set_pairs"].items():
            assert sum(key.startswith(f"{name}/") for key in keys) == count
    replaced = jobs.events(whole, "replaced")
    assert [(event["step"], event["key"]) for event in replaced] == [
        (2, f"web/{bad[0]}"),
        (5, f"web/{bad[1]}"),
    ]
    for number, count in ((1, 0), (2, 1), (5, 2), (STEPS, 2)):
        assert steps[number - 1]["set_quarantined"] == {"films": 0, "web": count}
        assert steps[number - 1]["set_skipped"] == {"films": 0, "web": count}
    (values,) = (parse_samples(path.read_text()) for path in (whole / "metrics").glob("*.prom"))
    for name in WEIGHTS:
        assert values["tvr_data_set_pairs_total", name] == drawn[-1][name]
        assert values["tvr_data_set_epoch", name] == drawn[-1][name] / NUM_TRAIN
    assert values["tvr_data_set_quarantined_samples", "web"] == 2
    assert values["tvr_data_set_skipped_samples_total", "films"] == 0
    assert values["tvr_data_set_bad_samples_limit", "web"] == 2
    assert values["tvr_data_set_bad_samples_limit", "films"] == 0
    assert ("tvr_data_bad_samples_limit",) not in values

    for run_dir in (resumed, spent, other):
        jobs.copy_run_at_step(3, whole, run_dir)
    train(config, resumed)
    assert jobs.losses(resumed) == jobs.losses(whole)
    assert jobs.global_batches(resumed) == jobs.global_batches(whole)
    assert jobs.events(resumed, "step")[-1]["set_quarantined"] == {"films": 0, "web": 2}
    assert jobs.events(resumed, "step")[-1]["set_skipped"] == {"films": 0, "web": 1}

    # A limit may change at a resume. The sample that was found before is counted.
    smaller = merged(config, {"data": {"train_sets": {"web": {"max_bad": 1}}}}, where="test")
    with pytest.raises(TooManyBadSamples, match=rf"2 bad samples in the set web, .*web/{bad[1]}"):
        train(smaller, spent)
    assert jobs.steps_logged(spent) == 4

    for changed, message in (
        ({"web": {"weight": 1.5}}, r"data\.train_sets\.web\.weight was 1\.0, is 1\.5"),
        ({"web": {"url": "/w"}}, r"data\.train_sets\.web\.url was .*damaged', is '/w'"),
        ({"new": {"url": "/n", "weight": 1.0}}, r"data\.train_sets\.new\.url was None, is '/n'"),
    ):
        wrong = merged(config, {"data": {"train_sets": changed}}, where="test")
        with pytest.raises(ValueError, match=f"another configuration: {message}"):
            claim(other, wrong, SINGLE_RANK)
    single = merged(tiny_config(data), {"data": ALONE | {"train": "/w"}}, where="test")
    with pytest.raises(ValueError, match=r"data\.train was None, is '/w'"):
        claim(other, single, SINGLE_RANK)

    # The pages show the sets.
    assert write_dashboard([whole], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "tvr_data_set_epoch" in page
    assert "tvr_data_set_pairs_total" in page
    report = write_report(whole).read_text()
    assert "epochs of web" in report
    assert f"web/{bad[0]}" in report


def test_two_ranks_train_on_the_batches_of_one(data: Path, tmp_path: Path) -> None:
    config = config_of(
        data,
        str(data / "train"),
        str(data / "test"),
        train={"steps": 6, "log_keys": True},
        checkpoint={"every": 2},
    )
    batches = []
    for ranks in (1, 2):
        file, run_dir = tmp_path / f"{ranks}.json", tmp_path / str(ranks)
        file.write_text(to_json(with_ranks(config, ranks)))
        assert jobs.run_forked(file, run_dir, ranks) == [0] * ranks
        batches.append({n: sorted(keys) for n, keys in jobs.global_batches(run_dir).items()})
    assert batches[0] == batches[1]
    assert set(batches[0]) == set(range(1, 7))
    both = [jobs.losses(tmp_path / str(ranks)) for ranks in (1, 2)]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-5)
