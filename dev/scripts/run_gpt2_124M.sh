#!/bin/bash
# GPT-2 124M on 10B tokens of FineWeb: 18,865 steps of 524,288 tokens, with the hyper-parameters of llm.c's
# scripts/run_gpt2_124M.sh. OpenAI's model, to compare with: validation loss 3.425, HellaSwag 29.4 %.
#
# Costs 8e18 FLOPs, 95 minutes on llm.c's eight A100. Here: 61 days on a server (1.5 TFLOP/s), 20 months on a laptop
# (150 GFLOP/s). 4.1 GiB of memory, 20 GB of shards, 1.5 GB a checkpoint.
# -b is 4 instead of 64: a step has as many tokens, from as many micro-batches as that takes. Checkpoints are more frequent,
# since a step takes minutes, and only every 5,000th is kept for good. llm.c always uses --beta2 0.95 --grad_clip 1.0.
# `DEVICE=cuda dev/scripts/run_gpt2_124M.sh` on one H100 (`make train-gpu` makes its environment): 4.9 hours at 562,000 tokens/s
# with llm.c's -b 64; 22 GiB of its memory.
# Needs `python dev/data/fineweb.py -t classic -v 10B` and `python dev/data/hellaswag.py`.
# Ctrl-C stops the run, the same command goes on with it. More flags may follow: the last one counts.
set -e
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
gpu=
if [ "$DEVICE" = cuda ]; then
  PATH="$PWD/.venv-gpu/bin:$PATH"
  gpu="--device cuda -b 64 -n 1000"
fi

python train_gpt2.py \
  -i "data/fineweb10B/fineweb_train_*.bin" \
  -j "data/fineweb10B/fineweb_val_*.bin" \
  -e "d12" \
  -o data/runs/gpt2_124M -n 50 -nk 2 -nm 5000 -y 1 \
  -b 4 -t 1024 -d 524288 -x 18865 \
  -l 0.0006 -u 700 -q 0.0 -c 0.1 --beta2 0.95 --grad_clip 1.0 \
  -v 250 -m 20 -h 1 -s 20000 -g 144 $gpu "$@"
