#!/usr/bin/env bash
# The rows "Barlow Twins and SparseHead, one seed" of results/README.md, from the repository's root.
# A run that was interrupted goes on, one that is done is only evaluated again.
#   results/cifar10_cpu_sparsehead.sh DATA OUT [ROW ...]        all rows, or these
# DATA: CIFAR-10 as class folders train/ and test/ of 32x32 images. OUT: e.g. runs
set -euo pipefail
data=$1 out=$2
shift 2
common="--data $data --arch resnet_tiny --batch-size 128 --hidden 256 --dim 128 --epochs 3
  --warmup-epochs 0.2 --eval-every 1 --log-every 30"
declare -A rows=(
  [barlow]="--baseline"
  [plain]="--penalty plain"
  [plain_strong]="--penalty plain --lambda-sparse 1"
  [rownorm]=""
  [prox_weak]="--penalty prox --lambda-sparse 3"
  [prox]="--penalty prox --lambda-sparse 10"
)
[ $# -gt 0 ] || set -- "${!rows[@]}"
for name; do
  python barlow_sparsehead.py $common ${rows[$name]} --out "$out/$name"
  python eval_linear.py "$out/$name"
  python results/measures.py "$out/$name" --measure spectrum                # rank r, rank z
done
