#!/usr/bin/env bash
# Every row of the CPU table in results/README.md, from the repository's root. DATA: CIFAR-10 as class folders of 32x32 images.
# Usage: results/cifar10_cpu.sh DATA OUT [ROW ...]
set -euo pipefail
data=$1 out=$2
shift 2
common="--data $data --arch resnet_tiny --batch-size 128 --lr 2e-3 --warmup-epochs 0.2 --temperature 0.2 --eval-every 1 --log-every 30"
declare -A rows=(
  [simclr_2views]="--baseline --epochs 3"
  [simclr_4views]="--baseline --views 4 --epochs 3"
  [tc2]="--epochs 3"
  [tc2_inner0]="--inner-lr 0 --epochs 3"
  [tc2_literal]="--literal --epochs 3"
  [simclr_4views_equal_passes]="--baseline --views 4 --epochs 6"
  [tc2_no_calibration]="--calibrate none --epochs 3"
  [simclr_t]="--baseline --views 4 --tasks 4 --epochs 3"
)
for row in "${@:-simclr_2views simclr_4views tc2 tc2_inner0 tc2_literal simclr_4views_equal_passes simclr_t tc2_no_calibration}"; do
  for name in $row; do
    python simclr_tc2.py $common ${rows[$name]} --out "$out/$name"
    python eval_linear.py "$out/$name"
  done
done
