"""Compares the demo on two nodes of a SLURM cluster with the demo on one machine, bit for bit.

Starts SLURM's daemons on this machine. Their two nodes, with one rank each, repeat the training
that `make demo` did with two ranks of `tvr launch local`. Needs the demo's folder and SLURM, and
takes some minutes. Prints one line of JSON; exits with 1 if the runs differ:

PYTHONPATH=tests python tests/benchmarks/demo_on_slurm.py --demo runs/demo --out runs/on_slurm
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from builders import jobs
from builders.slurm_cluster import cluster_of
from tvr_bench.harness import machine, versions

from tvr.trainer.config import from_json

# Fields of a step's record that do not depend on time.
LOSSES = ("loss", "similarity_loss", "tpm_cl_loss", "penalty", "gradient_norm")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/on_slurm"))
    options = parser.parse_args()
    ours, theirs = options.demo / "run", options.out.resolve()
    config = from_json((ours / "config.json").read_text(), where="the demo's config.json")
    on_nodes = train(options.demo / "settings.json", theirs)
    trained, results = jobs.final_weights(theirs, config), evaluation(theirs)
    same = {
        "losses": values(ours, *LOSSES) == values(theirs, *LOSSES),
        "weights": equal(jobs.final_weights(ours, config), trained),
        "evaluation": evaluation(ours) == results,
    }
    line = {
        "benchmark": "the demo by tvr launch slurm on 2 nodes x 1 rank, and by tvr launch local",
        "sizes": {
            "steps": len(values(theirs, "loss")),
            "global_batch": config.train.global_batch,
            "parameters": sum(tensor.numel() for tensor in trained.values()),
        },
        "job": on_nodes,
        "equal_bit_for_bit": same,
        "last_loss": values(theirs, "loss")[-1][0],
        "r_at_1": {way: results[way]["recall_at_1"] for way in ("text_to_video", "video_to_text")},
        "versions": versions() | {"slurm": on_nodes.pop("slurm")},
        "machine": machine(),
    }
    print(json.dumps(line))
    return 0 if all(same.values()) else 1


def train(settings: Path, run_dir: Path) -> dict[str, Any]:
    """Submits the job, waits for its end, and returns its result."""
    if run_dir.exists():
        raise SystemExit(f"{run_dir} is there already; remove it or choose another --out")
    with cluster_of(2) as cluster:
        launch = [sys.executable, "-m", "tvr.launchers.cli", "launch", "slurm", "--nodes", "2"]
        launch += ["--cpus-per-rank", "1", "--interface", "lo", "--run-dir", str(run_dir)]
        command = ["tvr", "train", "--config", str(settings.resolve()), "--run-dir", str(run_dir)]
        environment = {**cluster.environment, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        job_id = subprocess.run(
            [*launch, "--", *command],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.strip()
        print(f"job {job_id}; its output: {run_dir / 'launch'}", file=sys.stderr, flush=True)
        state = cluster.until_ended(job_id, timeout_s=3600)
        job, slurm = cluster.job(job_id), cluster.run("sinfo", "--version").split()[-1]
    if state != "COMPLETED":
        raise SystemExit(f"job {job_id} is {state}: see {run_dir / 'launch'}")
    return {
        "state": state,
        "nodes": job["NodeList"],
        "restarts": int(job["Restarts"]),
        "slurm": slurm,
    }


def steps(run_dir: Path) -> list[dict[str, Any]]:
    return jobs.events(run_dir, "step")


def values(run_dir: Path, *names: str) -> list[list[float]]:
    return [[step[name] for name in names] for step in steps(run_dir)]


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def evaluation(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "evaluation.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
