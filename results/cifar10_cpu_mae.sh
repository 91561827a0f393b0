#!/usr/bin/env bash
# The rows "MAE and TC2, one seed" of results/README.md, from the repository's root. A run that was
# interrupted goes on, one that is done is only evaluated again.
#   results/cifar10_cpu_mae.sh DATA OUT [ROW ...]        all rows, or these
# DATA: CIFAR-10 as class folders train/ and test/ of 32x32 images. OUT: e.g. runs
set -euo pipefail
data=$1 out=$2
shift 2
common="--data $data --arch vit_micro --batch-size 64 --lr 2e-3 --warmup-epochs 0.3 --eval-every 3
  --log-every 50"
tc2="--masks 2 --tasks 2 --factors 64 --epochs 3"
declare -A rows=(
  [mae]="--baseline --epochs 3"
  [mae_2masks]="--baseline --masks 2 --epochs 3"
  [mae_equal_passes]="--baseline --epochs 11"
  [mae_tc2]="$tc2"
  [mae_tc2_no_calibration]="$tc2 --without calibration"
)
[ $# -gt 0 ] || set -- "${!rows[@]}"
for name; do
  python mae_tc2.py $common ${rows[$name]} --out "$out/$name"
  python eval_linear.py "$out/$name"
done
