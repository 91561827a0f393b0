#!/usr/bin/env bash
# Every row of the SparseHead table in results/README.md, from the repository's root. DATA: CIFAR-10 as class folders of 32x32 images.
# Usage: results/cifar10_cpu_sparsehead.sh DATA OUT [ROW ...]
set -euo pipefail
data=$1 out=$2
shift 2
common="--data $data --arch resnet_tiny --batch-size 128 --hidden 256 --dim 128 --epochs 3 --warmup-epochs 0.2 --eval-every 1 --log-every 30"
declare -A rows=(
  [barlow]="--baseline"
  [plain]="--penalty plain"
  [rownorm]=""
  [prox]="--penalty prox --lambda-sparse 10"
  [prox_weak]="--penalty prox --lambda-sparse 3"
  [plain_strong]="--penalty plain --lambda-sparse 1"
)
for row in "${@:-barlow plain rownorm prox prox_weak plain_strong}"; do
  for name in $row; do
    python barlow_sparsehead.py $common ${rows[$name]} --out "$out/$name"
    python eval_linear.py "$out/$name" --protocol linear knn spectrum
  done
done
