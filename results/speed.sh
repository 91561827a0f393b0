#!/usr/bin/env bash
# The rows of results/scale.md that need a GPU, by one command, from the repository's root.
#   results/speed.sh CIFAR10 IMAGES OUT
# CIFAR10: class folders train/ and test/ of 32-px images. IMAGES: a folder of large JPEGs,
# on a GPU 25,600 or more: the time of a checkpoint, one an epoch, counts as decoding. On a machine
# without a GPU it runs the same lines at small sizes.
set -euo pipefail
cifar=$1 images=$2 out=$3
scripts="simclr_tc2 byol_gessl barlow_sparsehead mae_tc2"

if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  checked=$cifar
  small="--arch resnet18 --batch-size 512 --epochs 3 --log-every 10"
  large="--batch-size 256 --epochs 1000 --max-steps 100 --log-every 20"
else
  checked=shapes
  small="--arch resnet_tiny --batch-size 512 --max-steps 4 --log-every 2"
  large="--arch resnet18 --batch-size 4 --max-steps 4 --log-every 2"
fi

# The tests of a GPU, and the benchmarks: a step over its own passes, hypergradients, memory.
# The tests hide every GPU that is not named.
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
python -m pytest -q tests/test_device.py || echo "the tests have failed"
for name in augment decode peers step hypergrad masks probe; do
  python tests/bench.py $name || echo "the benchmark $name has failed"
done

# SimCLR with 2 views: small images on the device, large ones decoded in the loop. Anew each time:
# a complete run would show the figures of the time before.
rm -rf "$out/small" "$out/large"
python simclr_tc2.py --baseline --data "$cifar" $small --out "$out/small"
python simclr_tc2.py --baseline --data "$images" $large --out "$out/large" \
  || echo "large images have failed"
python - "$out" <<'PY'
import json, os, statistics, sys
for run in ("small", "large"):
    path = f"{sys.argv[1]}/{run}/log.jsonl"
    if not os.path.exists(path):            # it has failed
        continue
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    images = lines[0]["settings"]["images"]
    rate = statistics.median(line["images_per_s"] for line in lines if "images_per_s" in line)
    print(f"{run}: {2 * rate:.0f} views/s, {images / rate:.2f} s per epoch")
PY
time python eval_linear.py "$out/small" --protocol linear knn

# Both precisions: all steps are finite; how far the losses are apart.
for script in $scripts; do
  for precision in --bf16 --no-bf16; do
    rm -rf "$out/$script$precision"
    python $script.py --data "$checked" --max-steps 20 --log-every 5 $precision \
      --out "$out/$script$precision"
  done
  python - "$out/$script" <<'PY'
import json, sys
runs = []
for precision in ("--bf16", "--no-bf16"):
    with open(f"{sys.argv[1]}{precision}/log.jsonl") as file:
        lines = [json.loads(line) for line in file]
    runs.append([line for line in lines if "lr" in line])
for half, full in zip(*runs):
    name = [key for key in full if key.startswith("loss")][0]
    print(f"step {full['step']}: {name} {full[name]:.4f}, in bfloat16 {half[name]:.4f}")
PY
done

# No step waits for the GPU: 40 steps have as many synchronisations as 20.
for script in $scripts; do
  for steps in 20 40; do
    rm -rf "$out/sync-$script-$steps"
    python -W always - $script $steps "$out/sync-$script-$steps" > "$out/sync.txt" 2>&1 \
      <<'PY' || { tail "$out/sync.txt"; exit 1; }
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
