"""R@1 and binding accuracy of the demo for InfoNCE and both modes of NegNCE, over seeds.

Needs the data of a `tvr demo` (its folder with settings.json). Each run is one rank on one core
without TPM-CL. A finished run is not trained again. Prints one line of JSON. The default is 18
runs, about 1.5 hours on 2 cores: neg_nce_demo.py --demo runs/demo --out runs/neg_nce
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from tvr.launchers.host_limits import host_cpus

LOSSES = {
    "info_nce": ["--loss.similarity", "info_nce"],
    "neg_nce reference": ["--loss.similarity", "neg_nce", "--loss.neg-nce-mode", "reference"],
    "neg_nce log": ["--loss.similarity", "neg_nce", "--loss.neg-nce-mode", "log"],
}
# The last steps, over which a run's own numbers are averaged.
LAST_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/neg_nce"))
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--at-once", type=int, default=host_cpus().usable)
    options = parser.parse_args()
    runs = list(product(options.seeds, options.batches, LOSSES))

    def one(run: tuple[int, int, str]) -> dict[str, float | None]:
        return train(*run, demo=options.demo, out=options.out, steps=options.steps)

    with ThreadPoolExecutor(options.at_once) as pool:
        results = dict(zip(runs, pool.map(one, runs), strict=True))
    rows = [
        {"loss": loss, "global_batch": batch}
        | spread([results[seed, batch, loss] for seed in options.seeds])
        for batch, loss in product(options.batches, LOSSES)
    ]
    print(
        json.dumps(
            {
                "benchmark": "NegNCE on the demo: mean over seeds, smallest and largest",
                "steps": options.steps,
                "seeds": options.seeds,
                "rows": rows,
            }
        )
    )


def train(
    seed: int, batch: int, loss: str, *, demo: Path, out: Path, steps: int
) -> dict[str, float | None]:
    """The last evaluation of one run, trained if it is not there yet."""
    run_dir = out / f"{loss.replace(' ', '-')}-{batch}-{seed}"
    flags = {
        "--config": demo / "settings.json",
        "--run-dir": run_dir,
        "--train.seed": seed,
        "--train.steps": steps,
        "--train.global-batch": batch,
        "--train.micro-batch": batch,
        "--train.eval-every": 0,
        "--checkpoint.every": 0,
        "--loss.tpm-cl": 0,
    }
    line = [sys.executable, "-m", "tvr.launchers.cli", "train"]
    line += [str(part) for pair in flags.items() for part in pair]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["DS_ACCELERATOR"] = "cpu"
    if not (run_dir / "evaluation.json").exists():
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(run_dir.with_suffix(".log"), "w") as log:
            command = [*line, *LOSSES[loss]]
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
        print(f"{run_dir.name}: done", file=sys.stderr, flush=True)
    return outcome(run_dir)


def outcome(run_dir: Path) -> dict[str, float | None]:
    """Results of a finished run, and means over its last steps."""
    found = json.loads((run_dir / "evaluation.json").read_text())
    events = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"][-LAST_STEPS:]

    def late(name: str) -> float | None:
        values = [step[name] for step in steps if step[name] is not None]
        return statistics.fmean(values) if values else None

    return {
        "text_to_video_r_at_1": found["text_to_video"]["recall_at_1"],
        "video_to_text_r_at_1": found["video_to_text"]["recall_at_1"],
        "binding_accuracy": found["binding_accuracy"],
        "hard_negatives_per_row": late("hard_negatives_per_row"),
        "clamped_share": late("clamped_share"),
    }


def spread(outcomes: list[dict[str, float | None]]) -> dict[str, Any]:
    """Mean, minimum and maximum of each value over the seeds; None where a loss lacks the value."""
    found: dict[str, Any] = {}
    for name in outcomes[0]:
        values = [value for each in outcomes if (value := each[name]) is not None]
        statistic = (statistics.fmean, min, max)
        found[name] = [round(f(values), 4) for f in statistic] if values else None
    return found


if __name__ == "__main__":
    main()
