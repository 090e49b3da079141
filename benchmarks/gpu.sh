#!/bin/sh
# What to run on a machine with one GPU, most wanted first; results in OUT, default runs/gpu. Not timed on a GPU yet. Most of it is
# compiling: seven models at 1 to 5 minutes each on one slow core, less on several cores, far less the second time.
# Each part stands alone: sh benchmarks/gpu.sh smoke, numerics, speed, train; without a word, all.
#
#   sh benchmarks/gpu.sh [PART ...]          or: PYTHON=python3 OUT=somewhere sh gpu.sh
#
# Longer ones, each by itself, with the minutes to expect:
#   15  python train.py --dataset tiny-imagenet --mode augment --views 1 --epochs 60 && python evaluate.py runs/tiny-imagenet-augment/last.pt
#   15  python train.py --dataset solids --mode rotation --epochs 60   (again with --condition none; then evaluate.py on each)
#   15  python train.py --dataset tiny-imagenet --mode regions --method dseq-jepa --epochs 30   (again with --method i-jepa)
#    2  python -m benchmarks.bench train --only augment --compare torchvision
set -u
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
status=0
say() { echo; echo "== $*"; }

wanted() { [ -z "$PARTS" ] || case " $PARTS " in *" $1 "*) true ;; *) false ;; esac; }
PARTS="$*"

if wanted smoke; then
    say "every mode and method, 20 steps"
    $PYTHON -m benchmarks.smoke --out "$OUT" || status=1
fi
if wanted numerics; then                                # needs pytest
    say "bf16 and compile against float32"
    $PYTHON -m pytest -q tests/test_numerics.py > "$OUT/numerics.txt" 2>&1 || status=1
    tail -n 3 "$OUT/numerics.txt"
fi
if wanted speed; then                                   # regions also needs OpenCV and SciPy
    say "speed"
    $PYTHON -m benchmarks.bench views train flops regions --threads 4 --json "$OUT/bench.json" || status=1
fi
if wanted train; then
    say "the command itself, start to checkpoint; the last with data read ahead instead of resident"
    for mode in saccade rotation augment regions; do
        rm -rf "$OUT/train-$mode"
        $PYTHON train.py --dataset solids --mode $mode --quick --epochs 2 --warmup-epochs 1 --limit 512 --out "$OUT" --name "train-$mode" || status=1
    done
    rm -rf "$OUT/train-ahead"
    $PYTHON train.py --dataset solids --mode saccade --quick --epochs 2 --limit 512 --resident no --out "$OUT" --name train-ahead || status=1
fi
exit $status
