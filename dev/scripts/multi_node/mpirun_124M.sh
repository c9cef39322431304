#!/usr/bin/env bash
# GPT-2 124M on several machines with mpirun: bash dev/scripts/multi_node/mpirun_124M.sh node1,node2,node3,node4
# Each machine runs one process with all its cores, so one copy of the model. They need ssh to each other without a
# password, the same path for this folder (data and -o too, best on a shared disk), and the same kind of processor: the
# last bit of a sum may depend on it. The loss curve does not depend on their number, and a run may go on with another.
#
# To stop after a step, with a checkpoint: touch data/runs/gpt2_124M/STOP, or SIGUSR1 to mpirun for one
# without a stop. Open MPI's mpirun kills a quarter of a second after Ctrl-C or SIGTERM, too soon for a checkpoint.
# On several networks name one: FLAGS="--mca btl_tcp_if_include eth1". As root in a container: set
# OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
set -euo pipefail
cd "$(dirname "$0")/../../.."
PATH="$PWD/.venv/bin:$PATH"
hosts=${1:?usage: mpirun_124M.sh HOST,HOST,... [flags of train_gpt2.py]}
shift
number=$(echo "$hosts" | tr ',' '\n' | wc -l)

mpirun -np "$number" -host "${hosts//,/:1,}:1" --bind-to none -x PATH ${FLAGS:-} python train_gpt2.py \
  -i "data/fineweb10B/fineweb_train_*.bin" -j "data/fineweb10B/fineweb_val_*.bin" \
  -e d12 -o data/runs/gpt2_124M -n 50 -nk 2 -nm 5000 -y 1 \
  -b 4 -t 1024 -d $((524288 / (4096 * number) * 4096 * number)) -x 18865 \
  -v 250 -s 0 -h 1 -l 0.0006 -q 0.0 -u 700 -c 0.1 --beta2 0.95 --grad_clip 1.0 "$@"
