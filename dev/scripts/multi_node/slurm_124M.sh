#!/usr/bin/env bash
# GPT-2 124M under Slurm: sbatch dev/scripts/multi_node/slurm_124M.sh, from the project's folder. One process a node.
# A minute before the time is over Slurm sends SIGUSR1, which srun passes on: a checkpoint is written, and the job queued
# again goes on from it. `touch data/runs/gpt2_124M/STOP` stops it at the next step.
# Where srun starts processes that do not find each other ("there should be 4 processes, but MPI finds 1"), Slurm has no
# PMIx: try --mpi=pmi2 with an MPICH, or start mpirun here in srun's place.
#SBATCH --job-name=gpt2_124M
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
PATH="$PWD/.venv/bin:$PATH"
tokens=$((4096 * SLURM_NTASKS))

srun --mpi=pmix --cpus-per-task="$SLURM_CPUS_ON_NODE" python train_gpt2.py \
  -i "data/fineweb10B/fineweb_train_*.bin" -j "data/fineweb10B/fineweb_val_*.bin" \
  -e d12 -o data/runs/gpt2_124M -n 50 -nk 2 -nm 5000 -y 1 \
  -b 4 -t 1024 -d $((524288 / tokens * tokens)) -x 18865 \
  -v 250 -s 0 -h 1 -l 0.0006 -q 0.0 -u 700 -c 0.1 --beta2 0.95 --grad_clip 1.0
