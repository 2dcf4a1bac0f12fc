"""`tvr compare`: runs side by side, refusals, groups of seeds, JSON and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.html_page import Page

from tvr.launchers.cli import main
from tvr.trainer.comparison.compare import compare_paths
from tvr.trainer.comparison.statistics import intervals, metrics, paired_differences
from tvr.trainer.config import to_json
from tvr.trainer.recipes.recipes import recipe

VIDEOS, CAPTIONS = 40, 2


def write_run(
    folder: Path, ranks: np.ndarray, *, seed: int | None = None, both: bool = True, **changed: Any
) -> Path:
    """A run's folder with ranks of the captions; from video to text, those of the first ones."""
    folder.mkdir(parents=True)
    queries = [
        {"caption": f"caption {place}", "key": f"v{place // CAPTIONS}", "rank": int(rank)}
        for place, rank in enumerate(ranks)
    ]
    content: dict[str, Any] = {"step": 7, "data": "set", "videos": VIDEOS, "queries": queries}
    if both:
        content["video_queries"] = [
            {"key": f"v{video}", "rank": int(rank)} for video, rank in enumerate(ranks[::CAPTIONS])
        ]
    (folder / "evaluation.json").write_text(json.dumps(content | changed))
    if seed is not None:
        settings = json.loads(to_json(recipe("demo")))
        settings["train"]["seed"] = seed
        settings["checkpoint"]["url"] = str(folder)
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def some_ranks(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VIDEOS, VIDEOS * CAPTIONS)


def test_compares_with_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = some_ranks(0), np.maximum(1, some_ranks(0) - 3)
    runs = [write_run(tmp_path / "a", one), write_run(tmp_path / "b", other)]
    report = tmp_path / "out.json"
    assert main(["compare", *map(str, runs), "--samples", "300", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["scores"] == "raw"
    assert printed.startswith("40 videos, raw ranks; ")
    assert list(found["directions"]) == ["text_to_video", "video_to_text"]
    part = found["directions"]["text_to_video"]
    assert (part["queries"], part["videos"]) == (80, 40)
    for entry, ranks in zip(part["runs"], (one, other), strict=True):
        assert entry["values"] == pytest.approx(metrics(ranks))
    contest = part["runs"][1]["against_first"]
    assert part["runs"][0]["against_first"] is None
    tied = int((one == other).sum())
    assert (contest["won"], contest["lost"], contest["tied"]) == (80 - tied, 0, tied)
    assert contest["differences"]["mean_rank"]["value"] == pytest.approx((other - one).mean())
    assert contest["differences"]["mean_rank"]["p"] == 1 / 301
    back = found["directions"]["video_to_text"]
    assert back["runs"][0]["values"] == pytest.approx(metrics(one[::CAPTIONS]))
    for wanted in ("80 queries of 40 videos", f"{80 - tied} queries won", "R@50", "2 - 1"):
        assert wanted in printed, wanted
    # The order of the captions, and of the videos in a resample, is that of the sorted keys.
    order = sorted(range(len(one)), key=lambda q: (f"v{q // CAPTIONS}", f"caption {q}"))
    keys = [f"v{q // CAPTIONS}" for q in order]
    assert [*part["runs"][0]["intervals"]["mean_rank"]] == pytest.approx(
        intervals(one[order], keys, samples=300)["mean_rank"]
    )
    expected = paired_differences(other[order], one[order], keys, samples=300)["recall_at_10"]
    assert contest["differences"]["recall_at_10"]["p"] == expected.p


def test_the_order_of_queries_does_not_matter(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", some_ranks(0))
    other = write_run(tmp_path / "b", some_ranks(0))
    content = json.loads((other / "evaluation.json").read_text())
    content["queries"].reverse()
    (other / "evaluation.json").write_text(json.dumps(content))
    found = compare_paths([first, other / "evaluation.json"], samples=50)
    assert found.directions["text_to_video"].runs[1].against_first is not None
    assert found.directions["text_to_video"].runs[1].against_first.tied == 80


def test_a_file_without_the_other_direction(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", some_ranks(0)),
        write_run(tmp_path / "b", some_ranks(1), both=False),
    ]
    found = compare_paths(runs, samples=50)
    assert list(found.directions) == ["text_to_video"]
    assert "has no ranks from video to text" in found.table()


def _changed(path: Path, **values: Any) -> Path:
    content = json.loads((path / "evaluation.json").read_text())
    (path / "evaluation.json").write_text(json.dumps(content | values))
    return path


def test_different_test_sets_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", some_ranks(0))

    def refused(name: str, ranks: np.ndarray, **values: Any) -> str:
        other = _changed(write_run(tmp_path / name, ranks), **values)
        with pytest.raises(ValueError, match="not of one test set") as error:
            compare_paths([first, other], samples=9)
        return str(error.value)

    assert "40 and 41 videos" in refused("gallery", some_ranks(0), videos=41)
    text = refused("fewer", np.delete(some_ranks(0), -1))
    assert (
        "80 and 79 queries; the first difference is 'v39: caption 79' and 'v4: caption 8'" in text
    )
    queries = json.loads((first / "evaluation.json").read_text())["queries"]
    queries[0] = queries[0] | {"caption": "another one"}
    text = refused("caption", some_ranks(0), queries=queries)
    assert "the first difference is 'v0: caption 0' and 'v0: another one'" in text
    _changed(first, protocol={"name": "single_caption", "version": 2})
    text = refused("paragraphs", some_ranks(0), protocol={"name": "paragraph", "version": 2})
    assert "protocols {'name': 'single_caption'} and {'name': 'paragraph'}" in text
    videos = [{"key": f"w{video}", "rank": 1} for video in range(VIDEOS)]
    assert "'v0' and 'w0'" in refused("back", some_ranks(0), video_queries=videos)


def test_bad_files_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "a", some_ranks(0))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["compare", str(good), str(empty)]) == 2
    assert "run `tvr evaluate --run-dir" in capsys.readouterr().err
    assert main(["compare", str(good)]) == 2
    assert "at least two" in capsys.readouterr().err
    bad = _changed(write_run(tmp_path / "b", some_ranks(0)), queries=[])
    with pytest.raises(ValueError, match="holds no ranks of queries"):
        compare_paths([good, bad])
    _changed(bad, queries=[{"caption": "c", "key": "k", "rank": 0}])
    with pytest.raises(ValueError, match=r"queries\[0\]: rank is 0, must be an integer from 1"):
        compare_paths([good, bad])
    _changed(bad, queries=[{"caption": "c", "rank": 1}])
    with pytest.raises(ValueError, match=r"queries\[0\] has no key"):
        compare_paths([good, bad])
    for text in ("{", "[" * 100_000):
        (bad / "evaluation.json").write_text(text)
        with pytest.raises(ValueError, match="is no JSON"):
            compare_paths([good, bad])
    with pytest.raises(ValueError, match="1 names for 2 runs"):
        compare_paths([good, good], groups=["x"])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"protocol": ["name"]}, "protocol is list, must be an object or null"),
        ({"step": {}}, r"step is \{\}, must be an integer or null"),
        ({"videos": True}, "videos is True, must be the number of videos"),
        ({"videos": 9}, r"queries\[\d+\]: rank is \d+, must be an integer from 1 to 9"),
        (
            {"video_queries": [{"key": "v", "rank": 10**30}]},
            r"video_queries\[0\]: rank is 10{30}, must be an integer from 1 to 80",
        ),
    ],
)
def test_bad_values_are_refused_by_name(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    good = write_run(tmp_path / "a", some_ranks(0))
    bad = write_run(tmp_path / "b", some_ranks(0), **changed)
    with pytest.raises(ValueError, match=rf"b/evaluation.json: {named}"):
        compare_paths([good, bad])


def test_groups_of_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [some_ranks(seed) for seed in range(4)]
    runs = [write_run(tmp_path / f"r{n}", ranks[n], seed=n) for n in range(4)]
    settings = json.loads((runs[3] / "config.json").read_text())
    settings["loss"]["margin"] = 0.1
    settings["train"]["log_every"] = 77
    (runs[3] / "config.json").write_text(json.dumps(settings))
    settings = json.loads((runs[2] / "config.json").read_text())
    settings["train"]["log_every"] = 3  # no result depends on it
    (runs[2] / "config.json").write_text(json.dumps(settings))
    found = compare_paths(runs, by_seed=True, samples=50)
    one, other = found.directions["text_to_video"].groups
    assert one.name == str(runs[0])
    assert one.runs == tuple(map(str, runs[:3]))
    assert other.runs == (str(runs[3]),)
    means = np.array([each.mean() for each in ranks[:3]])
    spread = one.spreads["mean_rank"]
    assert (spread.mean, spread.deviation) == pytest.approx((means.mean(), means.std(ddof=1)))
    assert (spread.low, spread.high) == pytest.approx((means.min(), means.max()))
    assert other.spreads["mean_rank"].deviation is None
    assert f"{means.mean():.1f} ± {means.std(ddof=1):.2f}" in found.table()
    again = write_run(tmp_path / "again", ranks[1], seed=1)
    with pytest.raises(ValueError, match=r"same train\.seed=1"):
        compare_paths([*runs, again], by_seed=True)
    plain = write_run(tmp_path / "plain", ranks[1])
    with pytest.raises(ValueError, match=r"no config\.json beside it"):
        compare_paths([*runs, plain], by_seed=True)
    line = ["compare", str(runs[0]), str(plain), "--group", "x", "x", "--samples", "9"]
    assert main(line) == 0
    assert "x (2 runs)" in capsys.readouterr().out


def test_the_page_shows_names_as_text(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, some_ranks(0)) for name in ("a", "<script>alert(1)")]
    out = tmp_path / "page.html"
    line = ["compare", *map(str, runs), "--group", "<b>", "y", "--samples", "50"]
    assert main([*line, "--html", str(out)]) == 0
    page = Page(out.read_text())
    assert not page.named("script")
    assert not page.named("b")
    assert "<script>alert(1)" in page.text
    for wanted in ("Text to video", "Video to text", "2 - 1", "80 queries of 40 videos", "<b>"):
        assert wanted in page.text, wanted
