#!/bin/bash
# Nodes: 1, ranks per node: 1. Written by `tvr launch slurm`.
#SBATCH --job-name="a"
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=10
#SBATCH --array=0-7
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
    tvr pack --task "${SLURM_ARRAY_TASK_ID:?}"/8 --out 'data/it'"'"'s' --annotations a.jsonl
