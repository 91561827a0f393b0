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
for run in "${@:-tc2 gessl rownorm mae_tc2}"; do
  for name in $run; do
    evaluate="python eval_linear.py $runs/$name --data $data"
    python eval_linear.py "$runs/${baseline[$name]}" --data "$data" --protocol adaptation spectrum fewshot sigma distance-ratio conflict
    $evaluate --protocol linear knn fewshot sigma adaptation spectrum distance-ratio conflict pca --overlay "$runs/${baseline[$name]}"
    $evaluate --protocol linear --sweep
    [ "$name" = mae_tc2 ] || $evaluate --protocol linear knn --on embedding --probe-epochs 100
    python eval_linear.py "$runs/$name" --domains "$domains"
    python eval_linear.py "$runs/$name" --train-data "$data" --test-data "$domains/inverted" --protocol linear
    $evaluate --protocol finetune --label-fraction 0.01
    $evaluate --protocol finetune --label-fraction 0.1 --tune-epochs 10
    $evaluate --protocol finetune --label-fraction 1 --tune-epochs 2
  done
done
