#!/bin/bash
# Nodes: 2, ranks per node: 4. Written by `tvr launch slurm`.
#SBATCH --job-name="a"
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --dependency=afterok:17
#SBATCH --chdir="/disk"
#SBATCH --output="/disk/runs/a/launch/%j.out"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

export TVR_GPUS_PER_NODE=4

# batch_main sets the rendezvous address, forwards the preemption notice to the
# ranks, and decides whether the job restarts.
exec /venv/bin/python -m tvr.launchers.slurm.batch_main /disk/runs/a/launch/jobs/RECORD.json \
    srun --export=ALL --wait=0 --kill-on-bad-exit=1 --open-mode=append --output=/disk/runs/a/launch/%j.rank-%5t.log \
    apptainer exec --nv --bind=/disk/runs/a:/disk/runs/a --bind=/disk:/disk --bind=/data:/data --pwd=/disk '/images/tvr 1.sif' \
    /py -m tvr.launchers.slurm.task_main \
    tvr train --recipe msrvtt_b32 --run-dir runs/a
