#!/bin/bash
# GPT-3 125M (a context of 2048 tokens) on 300B tokens, FineWeb's 100B three times: 572,204 steps of 524,288 tokens, with
# the hyper-parameters of llm.c's scripts/run_gpt3_125M.sh. OpenAI's model, to compare with: HellaSwag 33.7 %.
#
# Costs 2.6e20 FLOPs, a day on llm.c's eight A100. Here: 5 1/2 years on a server (1.5 TFLOP/s). It is here to be read,
# and for trying a few steps of it. 4.2 GiB of memory, 200 GB of shards, 1.5 GB a checkpoint.
# -b is 2 instead of 32: a step has as many tokens, from as many micro-batches as that takes. Checkpoints are more frequent,
# since a step takes minutes, and only every 50,000th is kept for good. llm.c always uses --beta2 0.95 --grad_clip 1.0.
# `DEVICE=cuda dev/scripts/run_gpt3_125M.sh` on one H100 (`make train-gpu` makes its environment): 6.9 days at 500,000 tokens/s
# with llm.c's -b 32, which nobody has measured: that of the 124M by FLOPs; 22 GiB of its memory.
# Needs `python dev/data/fineweb.py -t classic -v 100B` and `python dev/data/hellaswag.py`.
# Ctrl-C stops the run, the same command goes on with it. More flags may follow: the last one counts.
set -e
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
gpu=
if [ "$DEVICE" = cuda ]; then
  PATH="$PWD/.venv-gpu/bin:$PATH"
  gpu="--device cuda -b 32 -n 1000"
fi

python train_gpt2.py \
  -i "data/fineweb100B/fineweb_train_*.bin" \
  -j "data/fineweb100B/fineweb_val_*.bin" \
  -e "gpt3:c768" \
  -o data/runs/gpt3_125M -n 50 -nk 5 -nm 50000 -y 1 \
  -b 2 -t 2048 -d 524288 -x 572204 \
  -l 0.0006 -u 700 -q 0.1 -c 0.1 --beta2 0.95 --grad_clip 1.0 -sl 7.0 -sg 7.0 \
  -v 250 -m 20 -h 1 -s 20000 -g 144 $gpu "$@"
