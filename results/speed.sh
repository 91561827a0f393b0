#!/usr/bin/env bash
# The rows of results/scale.md that need a GPU, by one command, from the repository's root.
#   results/speed.sh CIFAR10 IMAGES OUT
# CIFAR10: class folders train/ and test/ of 32-px images. IMAGES: a folder of large JPEGs. On a
# machine without a GPU it runs the same lines at small sizes.
set -euo pipefail
cifar=$1 images=$2 out=$3
scripts="simclr_tc2 byol_gessl barlow_sparsehead mae_tc2"

if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  suite=tests checked=$cifar
  small="--arch resnet18 --batch-size 512 --epochs 3 --log-every 10"
  large="--batch-size 256 --epochs 1000 --max-steps 100 --log-every 20"
else
  suite=tests/test_results.py checked=shapes
  small="--arch resnet_tiny --batch-size 512 --max-steps 4 --log-every 2"
  large="--arch resnet18 --batch-size 4 --max-steps 4 --log-every 2"
fi

# The tests on the GPU, and the benchmarks: a step over its own passes, hypergradients, memory.
CUDA_VISIBLE_DEVICES=0 python -m pytest -q $suite || echo "the suite has failed"
python tests/bench.py

# SimCLR with 2 views: small images on the device, large ones decoded in the loop.
python simclr_tc2.py --baseline --data "$cifar" $small --out "$out/small"
python simclr_tc2.py --baseline --data "$images" $large --out "$out/large"
python - "$out" <<'PY'
import json, statistics, sys
for run in ("small", "large"):
    with open(f"{sys.argv[1]}/{run}/log.jsonl") as file:
        lines = [json.loads(line) for line in file]
    images = lines[0]["settings"]["images"]
    rate = statistics.median(line["images_per_s"] for line in lines if "images_per_s" in line)
    print(f"{run}: {2 * rate:.0f} views/s, {images / rate:.2f} s per epoch")
PY
time python eval_linear.py "$out/small" --protocol linear knn

# Both precisions: all steps are finite, and the losses agree.
for script in $scripts; do
  for precision in --bf16 --no-bf16; do
    python $script.py --data "$checked" --max-steps 20 --log-every 5 $precision \
      --out "$out/$script$precision"
  done
done

# No step waits for the GPU: 40 steps have as many synchronisations as 20.
for script in $scripts; do
  for steps in 20 40; do
    python -W always - $script $steps "$out/sync-$script-$steps" > "$out/sync.txt" 2>&1 <<'PY'
import sys, torch
name, steps, out = sys.argv[1:]
if torch.cuda.is_available():
    torch.cuda.set_sync_debug_mode("warn")
__import__(name).main(["--max-steps", steps, "--log-every", "1000", "--out", out])
PY
    count=$(grep -c "synchronizing CUDA operation" "$out/sync.txt" || true)
    echo "$script, $steps steps: $count synchronisations"
  done
done
