#!/bin/bash
# GPT-2 774M on 150B tokens of FineWeb, its 100B one and a half times: 286,102 steps of 524,288 tokens, with the
# hyper-parameters of llm.c's scripts/run_gpt2_774M.sh. OpenAI's model, to compare with: validation loss 3.001,
# HellaSwag 43.2 %.
#
# Costs 7e20 FLOPs, 6 days on llm.c's eight A100. Here: 16 years on a server (1.5 TFLOP/s). It is here to be read, and for
# trying a few steps of it. 21 GiB of memory, 200 GB of shards, 9.3 GB a checkpoint.
# -b is 4 instead of 32: a step has as many tokens, from as many micro-batches as that takes. Checkpoints are more frequent,
# since a step takes half an hour, and only every 4,000th is kept for good. llm.c always uses --beta2 0.95 --grad_clip 1.0.
# `DEVICE=cuda dev/scripts/run_gpt2_774M.sh` on one H100 (`make train-gpu` makes its environment): 20 days at 88,000 tokens/s
# with llm.c's -b 32, measured at -b 8; 53 GiB of its memory.
# Needs `python dev/data/fineweb.py -t classic -v 100B` and `python dev/data/hellaswag.py`.
# Ctrl-C stops the run, the same command goes on with it. More flags may follow: the last one counts.
set -e
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
gpu=
if [ "$DEVICE" = cuda ]; then
  PATH="$PWD/.venv-gpu/bin:$PATH"
  gpu="--device cuda -b 32 -n 500"
fi

python train_gpt2.py \
  -i "data/fineweb100B/fineweb_train_*.bin" \
  -j "data/fineweb100B/fineweb_val_*.bin" \
  -e "d36" \
  -o data/runs/gpt2_774M -n 10 -nk 2 -nm 4000 -y 1 \
  -b 4 -t 1024 -d 524288 -x 286102 \
  -l 0.00025 -u 700 -q 0.0 -c 0.1 --beta2 0.95 --grad_clip 1.0 \
  -v 250 -m 20 -h 1 -s 300000 -g 144 $gpu "$@"
