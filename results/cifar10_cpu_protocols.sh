#!/usr/bin/env bash
# Every evaluation on one run of each script, "Every protocol" of results/README.md, from the
# repository's root.
#   results/cifar10_cpu_protocols.sh DATA RUNS [RUN ...]        all eight, or these
# DATA: CIFAR-10 as class folders train/ and test/ of 32x32 images. RUNS: the folder that the
# scripts cifar10_cpu*.sh have filled with the rows named here; RUNS/domains is made.
set -euo pipefail
data=$1 runs=$2
shift 2
declare -A baseline=([tc2]=simclr_4views [gessl]=byol [rownorm]=barlow [mae_tc2]=mae)

# The test images rendered in four ways, a stand-in for PACS: 250 different ones of each class each.
domains=$runs/domains
if [ ! -d "$domains" ]; then
  rm -rf "$domains.tmp"
  python - "$data/test" "$domains" <<'PY'
import os, sys
from PIL import Image, ImageFilter, ImageOps
source, target = sys.argv[1:]
for c in sorted(os.listdir(source)):
    for i, name in enumerate(sorted(os.listdir(f"{source}/{c}"))):
        image = Image.open(f"{source}/{c}/{name}").convert("RGB")
        domain = ["photo", "gray", "edges", "inverted"][i % 4]
        if domain == "gray":
            image = ImageOps.grayscale(image)
        elif domain == "edges":
            image = ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES)
        elif domain == "inverted":
            image = ImageOps.invert(image)
        os.makedirs(f"{target}.tmp/{domain}/{c}", exist_ok=True)
        image.convert("RGB").save(f"{target}.tmp/{domain}/{c}/{i}.png")
os.rename(f"{target}.tmp", target)              # whole, or not there
PY
fi

[ $# -gt 0 ] || set -- simclr_2views tc2 byol gessl barlow rownorm mae mae_tc2
for name; do
  run=$runs/$name
  overlay=${baseline[$name]:+--overlay $runs/${baseline[$name]}}      # drawn beside its method
  python eval_linear.py "$run" --data "$data" --protocol linear knn fewshot
  python results/measures.py "$run" --data "$data" $overlay
  python eval_linear.py "$run" --train-data "$data" --test-data "$domains/inverted" \
    --protocol linear
  for test in photo gray edges inverted; do                   # leave one domain out
    train=
    for domain in photo gray edges inverted; do
      [ $domain = $test ] || train+=" $domains/$domain"
    done
    python eval_linear.py "$run" --train-data $train --test-data "$domains/$test"
  done
done
