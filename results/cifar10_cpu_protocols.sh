#!/usr/bin/env bash
# Every protocol of eval_linear.py on one run of each script, from the repository's root. DATA: CIFAR-10 as class folders of 32x32 images; RUNS: the folder
# that results/cifar10_cpu*.sh have filled with the rows named here. Usage: results/cifar10_cpu_protocols.sh DATA RUNS [RUN ...]
set -euo pipefail
data=$1 runs=$2
shift 2
declare -A baseline=([tc2]=simclr_2views [gessl]=byol [rownorm]=barlow [mae_tc2]=mae)
domains=$runs/domains                       # the test images of DATA rendered in four ways, a stand-in for PACS: 250 different images of each class in each domain
[ -d "$domains" ] || python - "$data" "$domains" <<'PY'
import os, sys
from PIL import Image, ImageFilter, ImageOps
render = {"photo": lambda x: x, "gray": lambda x: ImageOps.grayscale(x), "edges": lambda x: ImageOps.grayscale(x).filter(ImageFilter.FIND_EDGES),
          "inverted": ImageOps.invert}
for c in sorted(os.listdir(f"{sys.argv[1]}/test")):
    for i, name in enumerate(sorted(os.listdir(f"{sys.argv[1]}/test/{c}"))):
        domain = list(render)[i % 4]
        os.makedirs(f"{sys.argv[2]}/{domain}/{c}", exist_ok=True)
        render[domain](Image.open(f"{sys.argv[1]}/test/{c}/{name}").convert("RGB")).convert("RGB").save(f"{sys.argv[2]}/{domain}/{c}/{i}.png")
PY
for run in "${@:-simclr_2views tc2 byol gessl barlow rownorm mae mae_tc2}"; do
  for name in $run; do
    evaluate="python eval_linear.py $runs/$name"
    overlay=${baseline[$name]:+--overlay $runs/${baseline[$name]}}                  # a method's own baseline comes before it
    $evaluate --data "$data" --protocol linear knn fewshot sigma adaptation spectrum distance-ratio conflict pca $overlay
    $evaluate --data "$data" --protocol finetune --label-fraction 0.01
    $evaluate --domains "$domains"
    $evaluate --train-data "$data" --test-data "$domains/inverted" --protocol linear --probe-epochs 100
    if [ -n "$overlay" ]; then                                                      # the four methods only
      $evaluate --data "$data" --protocol linear --sweep --probe-epochs 100
      [ "$name" = mae_tc2 ] || $evaluate --data "$data" --protocol linear knn --on embedding --probe-epochs 100
      $evaluate --data "$data" --protocol finetune --label-fraction 0.1 --tune-epochs 10
      $evaluate --data "$data" --protocol finetune --label-fraction 1 --tune-epochs 2
    fi
  done
done
