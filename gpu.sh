#!/bin/sh
# What to run on a machine with one GPU, most wanted first (about 8 minutes on an H100; results in OUT, default runs/gpu).
#
#   sh gpu.sh          or: PYTHON=python3 OUT=somewhere sh gpu.sh
#
# Longer ones, each by itself, with the minutes to expect:
#   15  python train.py --dataset tiny-imagenet --mode augment --views 1 --epochs 60 && python evaluate.py runs/tiny-imagenet-augment/last.pt
#   15  python train.py --dataset solids --mode rotation --epochs 60   (again with --condition none; then evaluate.py on each)
#   15  python train.py --dataset tiny-imagenet --mode regions --method dseq-jepa --epochs 30   (again with --method i-jepa)
#    2  python bench.py train --only augment --compare torchvision
set -u
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
status=0
say() { echo; echo "== $*"; }

say "every mode and method, 20 steps"
$PYTHON smoke.py --out "$OUT" || status=1
say "bf16 and compile against float32"
$PYTHON -m pytest -q tests/test_numerics.py > "$OUT/numerics.txt" 2>&1 || status=1
tail -n 3 "$OUT/numerics.txt"
say "speed"
$PYTHON bench.py regions flops views train --threads 4 --json "$OUT/bench.json" || status=1
say "the command itself, start to checkpoint"
for mode in saccade rotation augment regions; do
    $PYTHON train.py --dataset solids --mode $mode --quick --epochs 1 --limit 512 --out "$OUT" --name "train-$mode" || status=1
done
exit $status
