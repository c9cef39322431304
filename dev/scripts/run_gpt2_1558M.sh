#!/bin/bash
# GPT-2 1558M, OpenAI's largest, on 33.6B tokens of FineWeb-Edu: 32,000 steps of 1,048,576 tokens, with the hyper-parameters
# of llm.c's scripts/run_gpt2_1558M.sh. OpenAI's model, to compare with: HellaSwag 48.9 %.
#
# Costs 3e20 FLOPs, a day on llm.c's eight H100. Here: 7 years on a server (1.5 TFLOP/s). It is here to be read, and for
# trying a few steps of it. 30 GiB of memory, 200 GB of shards, 19 GB a checkpoint.
# -b is 2 instead of 16: a step has as many tokens, from as many micro-batches as that takes. -r 2 saves memory. Checkpoints
# are more frequent, since a step takes two hours, and only every 2,000th is kept for good. llm.c always uses --beta2 0.95
# --grad_clip 1.0.
# `DEVICE=cuda dev/scripts/run_gpt2_1558M.sh` on one H100 (`make train-gpu` makes its environment): 8.9 days at 44,000 tokens/s
# with llm.c's -b 16, which nobody has measured: that of the 774M by FLOPs; 53 GiB of its memory.
# Needs `python dev/data/fineweb.py -t edu -v 100B` (or --ready) and `python dev/data/hellaswag.py`.
# Ctrl-C stops the run, the same command goes on with it. More flags may follow: the last one counts.
set -e
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
gpu=
if [ "$DEVICE" = cuda ]; then
  PATH="$PWD/.venv-gpu/bin:$PATH"
  gpu="--device cuda -b 16 -n 100"
fi

python train_gpt2.py \
  -i "data/edu_fineweb100B/edu_fineweb_train_*.bin" \
  -j "data/edu_fineweb100B/edu_fineweb_val_*.bin" \
  -e "d48" \
  -o data/runs/gpt2_1558M -n 5 -nk 2 -nm 2000 -y 1 \
  -b 2 -t 1024 -d 1048576 -r 2 -x 32000 \
  -k cosine -l 0.0006 -u 700 -q 0.1 -c 0.1 --beta2 0.95 --grad_clip 1.0 \
  -v 250 -m 20 -h 1 -s 300000 -g 384 $gpu "$@"
