#!/usr/bin/env bash
# The rows of results/speed.md, from the repository's root. CIFAR10, IMAGES: class folders of 32-px images, and of large JPEG files. On a machine without a GPU: the same at small sizes.
# Usage: results/speed.sh CIFAR10 IMAGES OUT
set -euo pipefail
cifar=$1 images=$2 out=$3
if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  small="--arch resnet18 --batch-size 512 --epochs 3" large="--batch-size 256 --epochs 1000 --max-steps 100 --log-every 20" probe=""
else
  small="--arch resnet_tiny --batch-size 512 --epochs 1 --max-steps 20" large="--arch resnet18 --batch-size 4 --epochs 1 --max-steps 4 --log-every 2" probe="--probe-epochs 10" checked="shapes"
fi
python tests/bench.py
python simclr_tc2.py --baseline --data "$cifar" $small --log-every 10 --out "$out/small"            # seconds per epoch = images / images_per_s
python simclr_tc2.py --baseline --data "$images" $large --out "$out/large"                          # views per second = 2 images_per_s
for script in simclr_tc2 byol_gessl barlow_sparsehead mae_tc2; do                                   # bf16 and float32 agree, all steps finite
  for precision in --bf16 --no-bf16; do
    python $script.py --data "${checked:-$cifar}" --max-steps 20 --log-every 5 $precision --out "$out/$script$precision"
  done
done
time python eval_linear.py "$out/small" $probe
