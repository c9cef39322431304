#!/bin/bash
# Fine-tunes OpenAI's GPT-2 124M on Tiny Shakespeare, twice its 305,260 tokens, so that it writes plays.
#
# Costs 6e14 FLOPs: an hour on a laptop (150 GFLOP/s), 7 minutes on a server (1.5 TFLOP/s), 4.1 GiB of memory, and 3 GB of
# disk for the two newest checkpoints.
# Needs `make data`. Ctrl-C stops the run, the same command goes on with it. More flags may follow: the last one counts.
# Then: python dev/vislog.py data/runs/shakespeare_124M
#       python -m dev.generate -e data/runs/shakespeare_124M/model_00000040.bin --prompt "ROMEO:" --top_k 50
set -e
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"

python train_gpt2.py \
  -i "data/tinyshakespeare/tiny_shakespeare_train.bin" \
  -j "data/tinyshakespeare/tiny_shakespeare_val.bin" \
  -e "data/gpt2_124M.bin" \
  -o data/runs/shakespeare_124M -n 10 -nk 2 -y 1 \
  -b 4 -t 1024 -d 16384 -x 40 \
  -l 5e-5 -u 4 -q 0.1 -c 0.1 --beta2 0.95 --grad_clip 1.0 \
  -v 5 -m -1 -s 10 -g 256 --top_k 50 "$@"
