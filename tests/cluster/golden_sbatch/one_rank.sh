#!/bin/bash
# Nodes: 1, ranks per node: 1. Written by `tvr launch slurm`.
#SBATCH --job-name="a"
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --chdir="/disk"
#SBATCH --output="/disk/runs/a/launch/%j.out"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

# batch_main sets the rendezvous address, forwards the preemption notice to the
# ranks, and decides whether the job restarts.
exec /venv/bin/python -m tvr.launchers.slurm.batch_main /disk/runs/a/launch/jobs/RECORD.json \
    srun --export=ALL --wait=0 --kill-on-bad-exit=1 --open-mode=append --output=/disk/runs/a/launch/%j.rank-%5t.log \
    /venv/bin/python -m tvr.launchers.slurm.task_main \
    tvr train --recipe msrvtt_b32 --run-dir runs/a
