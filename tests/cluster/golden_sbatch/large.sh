#!/bin/bash
# Nodes: 8, ranks per node: 8. Written by `tvr launch slurm`.
#SBATCH --job-name="a"
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=900G
#SBATCH --partition=gpu
#SBATCH --account=video
#SBATCH --qos=high
#SBATCH --time=1-00:00:00
#SBATCH --exclude=gpu07,gpu11
#SBATCH --chdir="/disk"
#SBATCH --output="/disk/runs/a/launch/%j.out"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@150
set -euo pipefail

export OMP_NUM_THREADS=12
export NCCL_DEBUG=WARN
export TORCH_EXTENSIONS_DIR=/disk/ext
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export TVR_GPUS_PER_NODE=8
export TVR_METRICS_ADDRESS=0.0.0.0

# batch_main sets the rendezvous address, forwards the preemption notice to the
# ranks, and decides whether the job restarts.
exec /venv/bin/python -m tvr.launchers.slurm.batch_main /disk/runs/a/launch/jobs/RECORD.json \
    srun --export=ALL --wait=0 --kill-on-bad-exit=1 --open-mode=append --output=/disk/runs/a/launch/%j.rank-%5t.log --cpus-per-task=12 \
    /venv/bin/python -m tvr.launchers.slurm.task_main \
    tvr train --recipe msrvtt_b32 --run-dir runs/a
