"""The bench of evidence: trains rows on a set, and writes the table with its intervals.

    run.py shapes  --data runs/shapes --out runs/evidence/shapes
    run.py droid1k --droid1k DROID1K --data runs/droid1k --out runs/evidence/droid1k

Finished rows are not trained again. `--rows` and `--seeds` choose some of them; `--results FILE`
writes FILE, the summary, and the ranks of all queries beside it. README.md describes both sets.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from evidence.results import Table, write_results
from evidence.rows import ROWS, slug

from tvr.launchers.host_limits import host_cpus

SEEDS = {"shapes": [0, 1, 2, 3, 4], "droid1k": [0, 1, 2]}
# droid1k has an order of samples of its own.
NOT_ON_DROID = ("full method + hard batches",)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; an error of a run ends it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("set", choices=SEEDS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--data", type=Path, default=None, help="folder of packed clips")
    parser.add_argument("--droid1k", type=Path, default=None, help="folder of the raw clips")
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument(
        "--files",
        type=Path,
        default=None,
        help="droid1k: only writes each clip's frames here, for `tvr import-features`",
    )
    parser.add_argument(
        "--finished", action="store_true", help="trains nothing: the table of what is there"
    )
    parser.add_argument("--at-once", type=int, default=host_cpus().usable)
    options = parser.parse_args(argv)
    options.seeds = options.seeds or SEEDS[options.set]
    options.data = options.data or Path("runs") / options.set
    options.out = options.out or Path("runs/evidence") / options.set
    if options.files is not None:
        return write_frames(options)
    table = (shapes if options.set == "shapes" else droid)(options)
    print(table.text())
    if options.results is not None:
        write_results(table, options.results)
    return 0


def shapes(options: argparse.Namespace) -> Table:
    """Trains and evaluates rows on the shapes."""
    from evidence.shapes import ShapesRuns, base, outcome, run_dir_of, train_row, warm_up
    from evidence.shapes_data import ShapesSizes, prepare

    runs = ShapesRuns(data=options.data, out=options.out)
    jobs = _jobs(options, list(ROWS))
    if options.finished:
        found = {job: run_dir_of(runs, *job) for job in jobs}
        found = {job: path for job, path in found.items() if (path / "evaluation.json").exists()}
    else:
        prepare(options.data, ShapesSizes(), options.at_once)
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(partial(warm_up, runs), range(runs.starts)))
            paths = list(pool.map(lambda job: _said(train_row(runs, *job)), jobs))
        found = dict(zip(jobs, paths, strict=True))
    outcomes = {job: outcome(path) for job, path in found.items()}
    ways = ("text_to_video", "video_to_text")
    keys = sorted(next(iter(outcomes.values()))["text_to_video"])
    ranks = {
        job: np.array([[each[way][key] for key in keys] for way in ways])
        for job, each in outcomes.items()
    }
    names = ("binding_accuracy", "hard_negatives_per_row", "train_s")
    more = {job: {name: each[name] for name in names} for job, each in outcomes.items()}
    return _table("shapes", keys, keys, ranks, more, _settings(base(runs)))


def _jobs(options: argparse.Namespace, rows: Sequence[str]) -> list[tuple[str, int]]:
    """Row and seed of each run; the seeds of all rows advance together."""
    return [(row, seed) for seed in options.seeds for row in options.rows or rows]


def _table(
    name: str,
    keys: Sequence[str],
    clusters: Sequence[str],
    ranks: Mapping[tuple[str, int], Any],
    more: Mapping[tuple[str, int], Mapping[str, float | None]],
    settings: Mapping[str, Any],
) -> Table:
    """Joins the runs of each row."""
    rows = [row for row in ROWS if any(row == each for each, _ in ranks)]
    seeds = {row: [seed for each, seed in ranks if each == row] for row in rows}
    joined = {row: np.array([ranks[row, seed] for seed in seeds[row]]) for row in rows}
    numbers = {
        row: {
            key: [more[row, seed][key] for seed in seeds[row]] for key in more[row, seeds[row][0]]
        }
        for row in rows
    }
    return Table(name, seeds, keys, clusters, joined, numbers, settings)


def write_frames(options: argparse.Namespace) -> int:
    """Packs and encodes droid1k, and writes a file of frames for each clip."""
    from evidence import droid as bench
    from evidence.droid_features import write_files

    features = bench.prepare(_source(options), options.data, options.at_once)
    write_files(features, options.files)
    print(options.files)
    return 0


def _source(options: argparse.Namespace) -> Path:
    if options.set != "droid1k" or options.droid1k is None:
        raise SystemExit("give run.py droid1k --droid1k, the folder of captions.jsonl and clips")
    return options.droid1k


def droid(options: argparse.Namespace) -> Table:
    """Cross-validates rows on droid1k."""
    from evidence import droid as bench

    _source(options)
    features = bench.prepare(options.droid1k, options.data, options.at_once)
    meta = bench.meta_of(options.droid1k)
    groups = [meta[key]["group"] for key in features.keys]
    jobs = _jobs(options, [row for row in ROWS if row not in NOT_ON_DROID])
    if options.finished:
        jobs = [job for job in jobs if _droid_file(options.out, job).exists()]
    work = partial(_droid_row, options.droid1k, options.data, options.out)
    with ProcessPoolExecutor(options.at_once) as pool:
        found = dict(zip(jobs, pool.map(work, jobs), strict=True))
    ranks = {job: np.array(each["ranks"]) for job, each in found.items()}
    more = {job: {"train_s": each["train_s"]} for job, each in found.items()}
    keys = [str(key) for key in features.keys]
    return _table("droid1k", keys, groups, ranks, more, _settings(bench.base()))


def _droid_file(out: Path, job: tuple[str, int]) -> Path:
    return out / f"{slug(job[0])}-{job[1]}.json"


def _droid_row(source: Path, data: Path, out: Path, job: tuple[str, int]) -> dict[str, Any]:
    """Ranks of a row and seed; read from its file if that is there."""
    import torch
    from evidence import droid as bench

    row, seed = job
    path = _droid_file(out, job)
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    started = time.perf_counter()
    ranks = bench.cross_validate(_folds(source, data), ROWS[row], seed)
    found = {"ranks": ranks.tolist(), "train_s": time.perf_counter() - started}
    out.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(found))
    partial_path.replace(path)
    _said(path)
    return found


@lru_cache(maxsize=1)
def _folds(source: Path, data: Path) -> Any:
    """The folds, once in each process."""
    from evidence import droid as bench

    features, meta = bench.prepare(source, data), bench.meta_of(source)
    return bench.Folds(features, [meta[key]["group"] for key in features.keys])


def _said(path: Path) -> Path:
    print(f"{time.strftime('%H:%M:%S')} {path.name}: done", file=sys.stderr, flush=True)
    return path


def _settings(config: Any) -> dict[str, Any]:
    """The settings that all rows share, without folders of this machine."""
    from dataclasses import asdict

    found = asdict(config)
    names = ("data", "model", "loss", "train")
    return {
        section: {k: v for k, v in found[section].items() if not isinstance(v, str) or "/" not in v}
        for section in names
    }


if __name__ == "__main__":
    sys.exit(main())
