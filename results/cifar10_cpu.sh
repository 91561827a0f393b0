#!/usr/bin/env bash
# The rows "SimCLR and TC2, one seed" of results/README.md, from the repository's root. A run that
# was interrupted goes on, one that is done is only evaluated again.
#   results/cifar10_cpu.sh DATA OUT [ROW ...]        all rows, or these
# DATA: CIFAR-10 as class folders train/ and test/ of 32x32 images. OUT: e.g. runs
set -euo pipefail
data=$1 out=$2
shift 2
common="--data $data --arch resnet_tiny --batch-size 128 --lr 2e-3 --warmup-epochs 0.2
  --temperature 0.2 --weight-decay 1e-6 --eval-every 1 --log-every 30"
declare -A rows=(
  [simclr_2views]="--baseline --epochs 3"
  [simclr_4views]="--baseline --views 4 --epochs 3"
  [simclr_4views_equal_passes]="--baseline --views 4 --epochs 6"
  [simclr_t]="--baseline --views 4 --tasks 4 --epochs 3"
  [tc2]="--factors 64 --epochs 3"
  [tc2_inner0]="--factors 64 --inner-lr 0 --epochs 3"
  [tc2_no_calibration]="--factors 64 --without calibration --epochs 3"
  [tc2_literal]="--factors 64 --literal --epochs 3"
)
[ $# -gt 0 ] || set -- "${!rows[@]}"
for name; do
  python simclr_tc2.py $common ${rows[$name]} --out "$out/$name"
  python eval_linear.py "$out/$name"
done
