#!/bin/bash
# GPT-2 350M on 31.5B tokens of FineWeb: 60,000 steps of 524,288 tokens, with the hyper-parameters of llm.c's
# scripts/run_gpt2_350M.sh. OpenAI's model, to compare with: validation loss 3.083, HellaSwag 37.5 %.
#
# Costs 7e19 FLOPs, 14 hours on llm.c's eight A100. Here: 18 months on a server (1.5 TFLOP/s), 15 years on a laptop
# (150 GFLOP/s). 10.5 GiB of memory, 200 GB of shards, 4.3 GB a checkpoint.
# -b is 4 instead of 64: a step has as many tokens, from as many micro-batches as that takes. Checkpoints are more frequent,
# since a step takes minutes, and only every 2,000th is kept for good. llm.c always uses --beta2 0.95 --grad_clip 1.0.
# `DEVICE=cuda dev/scripts/run_gpt2_350M.sh` on one H100 (`make train-gpu` makes its environment): 44 hours at 199,000 tokens/s
# with llm.c's -b 64, measured at -b 16; 49 GiB of its memory.
# Needs `python dev/data/fineweb.py -t classic -v 100B` and `python dev/data/hellaswag.py`.
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
  -i "data/fineweb100B/fineweb_train_*.bin" \
  -j "data/fineweb100B/fineweb_val_*.bin" \
  -e "d24" \
  -o data/runs/gpt2_350M -n 20 -nk 2 -nm 2000 -y 1 \
  -b 4 -t 1024 -d 524288 -x 60000 \
  -l 0.0003 -u 700 -q 0.0 -c 0.1 --beta2 0.95 --grad_clip 1.0 \
  -v 250 -m 20 -h 1 -s 100000 -g 144 $gpu "$@"
