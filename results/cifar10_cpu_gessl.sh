#!/usr/bin/env bash
# Every row of the GeSSL table in results/README.md, from the repository's root. DATA: CIFAR-10 as class folders of 32x32 images.
# Usage: results/cifar10_cpu_gessl.sh DATA OUT [ROW ...]
set -euo pipefail
data=$1 out=$2
shift 2
common="--data $data --arch resnet_tiny --batch-size 32 --lr 2e-3 --ema-decay 0.98 --eval-every 1 --log-every 30 --warmup-epochs 0.1"
declare -A rows=(
  [byol]="--baseline --epochs 1"
  [byol_large_batch]="--baseline --batch-size 128 --ema-decay 0.922 --epochs 1"
  [gessl_kl_only]="--ssl-weight 0 --epochs 1 --tasks 4 --target-steps 3"
  [gessl]="--epochs 1 --tasks 4 --target-steps 3"
  [lookahead]="--lookahead --epochs 1 --tasks 4 --target-steps 3"
  [gessl_first_order]="--hypergrad first-order --epochs 1 --tasks 4 --target-steps 3"
  [byol_equal_passes]="--baseline --epochs 5"
  [byol_large_batch_equal_passes]="--baseline --batch-size 128 --ema-decay 0.922 --epochs 5"
)
for row in "${@:-byol byol_large_batch gessl_kl_only gessl lookahead gessl_first_order byol_equal_passes byol_large_batch_equal_passes}"; do
  for name in $row; do
    python byol_gessl.py $common ${rows[$name]} --out "$out/$name"
    python eval_linear.py "$out/$name"
  done
done
