#!/bin/bash
# Which learning rate? A small model from nothing on Tiny Shakespeare, 200 steps with each of five, and one picture of all.
#
# Costs 1.3e14 FLOPs: 15 minutes on a laptop (150 GFLOP/s), 90 seconds on a server (1.5 TFLOP/s), 0.8 GiB of memory.
# Needs `make data`, and matplotlib for the picture. More flags may follow, for another model or batch: -e d12 -b 4 ...
set -e
trap 'exit 130' INT  # otherwise Ctrl-C would only go on to the next one
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
sweep=data/runs/sweep_lr
start=$(mktemp)  # logs that are older are an earlier sweep's
trap 'rm -f "$start"' EXIT

for lr in 1e-4 3e-4 1e-3 3e-3 1e-2; do
  python train_gpt2.py \
    -i "data/tinyshakespeare/tiny_shakespeare_train.bin" \
    -j "data/tinyshakespeare/tiny_shakespeare_val.bin" \
    -e "d6" -o $sweep/lr_$lr --overwrite 1 \
    -b 8 -t 64 -x 200 \
    -l $lr -u 20 -q 0.1 -c 0.1 --beta2 0.95 --grad_clip 1.0 \
    -v 20 -m 20 -s 0 "$@" || { [ $sweep/lr_$lr/main.log -nt "$start" ] || exit 1; echo "$lr failed"; }  # it never began
done

runs=()
for lr in 1e-4 3e-4 1e-3 3e-3 1e-2; do
  [ $sweep/lr_$lr/main.log -nt "$start" ] && runs+=($sweep/lr_$lr)
done
echo "validation loss at the end, best first:"
for run in "${runs[@]}"; do
  echo "$(grep tel: $run/main.log | tail -n 1 | cut -d : -f 3) $(basename $run)"
done | sort -n
python dev/vislog.py "${runs[@]}" -o $sweep/sweep.png --title "Learning rates"
