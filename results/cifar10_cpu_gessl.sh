#!/usr/bin/env bash
# The rows "BYOL and GeSSL, one seed" of results/README.md, from the repository's root. A run that
# was interrupted goes on, one that is done is only evaluated again.
#   results/cifar10_cpu_gessl.sh DATA OUT [ROW ...]        all rows, or these
# DATA: CIFAR-10 as class folders train/ and test/ of 32x32 images. OUT: e.g. runs
set -euo pipefail
data=$1 out=$2
shift 2
common="--data $data --arch resnet_tiny --batch-size 32 --lr 2e-3 --ema-decay 0.98 --eval-every 1
  --log-every 30 --warmup-epochs 0.1"
gessl="--epochs 1 --tasks 4 --target-steps 3"
large="--baseline --batch-size 128 --ema-decay 0.922"           # all images of GeSSL's outer step
declare -A rows=(
  [byol]="--baseline --epochs 1"
  [byol_large_batch]="$large --epochs 1"
  [byol_equal_passes]="--baseline --epochs 5"
  [byol_large_batch_equal_passes]="$large --epochs 5"
  [gessl]="$gessl"
  [gessl_kl_only]="--ssl-weight 0 $gessl"
  [gessl_first_order]="--hypergrad first-order $gessl"
  [lookahead]="--lookahead $gessl"
)
[ $# -gt 0 ] || set -- "${!rows[@]}"
for name; do
  python byol_gessl.py $common ${rows[$name]} --out "$out/$name"
  python eval_linear.py "$out/$name"
done
