#!/usr/bin/env bash
# Every row of the MAE table in results/README.md, from the repository's root. DATA: CIFAR-10 as class folders of 32x32 images.
# Usage: results/cifar10_cpu_mae.sh DATA OUT [ROW ...]
set -euo pipefail
data=$1 out=$2
shift 2
common="--data $data --arch vit_micro --batch-size 64 --lr 2e-3 --warmup-epochs 0.3 --eval-every 3 --log-every 50"
tc2="--masks 2 --tasks 2 --epochs 3"
declare -A rows=(
  [mae]="--baseline --epochs 3"
  [mae_2masks]="--baseline --masks 2 --epochs 3"
  [mae_equal_passes]="--baseline --epochs 11"
  [mae_tc2]="$tc2"
  [mae_tc2_no_calibration]="$tc2 --calibrate none"
)
for row in "${@:-mae mae_2masks mae_equal_passes mae_tc2 mae_tc2_no_calibration}"; do
  for name in $row; do
    python mae_tc2.py $common ${rows[$name]} --out "$out/$name"
    python eval_linear.py "$out/$name"
  done
done
