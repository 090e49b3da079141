#!/bin/sh
# What to run on a machine with one GPU, most wanted first; results in OUT, default runs/gpu.
# Not timed on a GPU yet. Most of it is compiling: seven models at 1 to 5 minutes each on one slow
# core, less on several cores, far less the second time.
# Run it from the repository's root. Each part stands alone: smoke, numerics, speed, train.
#
#   sh benchmarks/gpu.sh                     all of them
#   sh benchmarks/gpu.sh smoke speed         these
#   PYTHON=python3 OUT=somewhere sh benchmarks/gpu.sh
#
# Longer ones, each by itself, with the minutes to expect:
#   15  python train.py --dataset tiny-imagenet --mode augment --views 1 --epochs 60
#       python evaluate.py runs/tiny-imagenet-augment/last.pt
#   15  python train.py --dataset solids --mode rotation --epochs 60
#       (again with --condition none; then evaluate.py on each)
#   15  python train.py --dataset tiny-imagenet --mode regions --method dseq-jepa --epochs 30
#       (again with --method i-jepa)
#    2  python -m benchmarks.bench train --only augment --compare torchvision
set -u
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/gpu}
PARTS="$*"
for part in $PARTS; do
    case $part in
        smoke|numerics|speed|train) ;;
        *) echo "error: $part: no such part; choose of smoke numerics speed train" >&2; exit 2 ;;
    esac
done
mkdir -p "$OUT"
status=0

say() { echo; echo "== $*"; }

wanted() { [ -z "$PARTS" ] || case " $PARTS " in *" $1 "*) true ;; *) false ;; esac; }

# train NAME FLAGS...: two epochs of the embedded solids, from the start.
train() {
    name=$1
    shift
    rm -rf "$OUT/$name"
    $PYTHON train.py --dataset solids --quick --epochs 2 --limit 512 \
        --out "$OUT" --name "$name" "$@" || status=1
}

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
    $PYTHON -m benchmarks.bench views train flops regions --threads 4 \
        --json "$OUT/bench.json" || status=1
fi
if wanted train; then
    say "the command itself, start to checkpoint; the last with data read ahead, not resident"
    for mode in saccade rotation augment regions; do
        train "train-$mode" --mode $mode --warmup-epochs 1
    done
    train train-ahead --mode saccade --resident no
fi
exit $status
