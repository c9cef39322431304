#!/bin/bash
# Trains a small model (d6: 6 layers, 384 channels, 30M parameters) from nothing on TinyStories, overnight: 33M tokens, a
# thirtieth of what there is.
#
# Costs 6e15 FLOPs: 12 hours on a laptop (150 GFLOP/s), 70 minutes on a server (1.5 TFLOP/s), 1.8 GiB of memory, 1 GB of
# disk for the checkpoints; the data are 1.6 GB to fetch.
# Needs `python dev/data/tinystories.py`. Ctrl-C stops the run, the same command goes on with it: weights, data and learning
# rate continue as if it had never stopped. More flags may follow: the last one counts.
# Then: python dev/vislog.py data/runs/tinystories_d6
#       python -m dev.generate -e data/runs/tinystories_d6/model_00002000.bin --prompt "Once upon a time" --top_k 50
set -e
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"

python train_gpt2.py \
  -i "data/tinystories/TinyStories_train.bin" \
  -j "data/tinystories/TinyStories_val.bin" \
  -e "d6" \
  -o data/runs/tinystories_d6 -n 50 -nk 2 -y 1 \
  -b 16 -t 512 -d 16384 -x 2000 \
  -l 0.001 -u 100 -q 0.1 -c 0.1 --beta2 0.95 --grad_clip 1.0 \
  -v 50 -m 20 -s 200 -g 200 --prompt "Once upon a time" --top_k 50 "$@"
