#!/bin/bash
# Nodes: 2, ranks per node: 1. Written by `tvr launch slurm`.
#SBATCH --job-name="it's \"b\" at 100% $HOME"
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --chdir="/my disk"
#SBATCH --output="/my disk/it's \"b\" at 100%% $HOME/launch/%j.out"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

export PATH='/my bin:/bin'
export TORCH_LOGS='it'"'"'s "$x"'

# batch_main sets the rendezvous address, forwards the preemption notice to the
# ranks, and decides whether the job restarts.
exec /venv/bin/python -m tvr.launchers.slurm.batch_main '/my disk/it'"'"'s "b" at 100% $HOME/launch/jobs/RECORD.json' \
    srun --export=ALL --wait=0 --kill-on-bad-exit=1 --open-mode=append '--output=/my disk/it'"'"'s "b" at 100%% $HOME/launch/%j.rank-%5t.log' \
    /venv/bin/python -m tvr.launchers.slurm.task_main \
    tvr train --run-dir 'it'"'"'s "b" at 100% $HOME' --loss.margin 0.2
