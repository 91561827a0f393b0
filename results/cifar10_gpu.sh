#!/usr/bin/env bash
# The rows that a GPU should make first, from the repository's root: ResNet-18, CIFAR-10, each
# script's own recipe, 100 epochs. A run that was interrupted goes on, one that is done is only
# evaluated again.
#   results/cifar10_gpu.sh DATA OUT SEED [ROW ...]        all rows, most informative first, or these
# DATA: class folders train/ and test/ of 32-px images, or cifar10, which is downloaded.
set -euo pipefail
data=$1 out=$2 seed=$3
shift 3

common="--data $data --seed $seed"
simclr="simclr_tc2.py $common"
combine="results/combinations.py"
# Eight mini-batches of 32 images are a step of GeSSL, one of 256 is BYOL's; 0.968 = 0.996^8.
step="--batch-size 256 --ema-decay 0.968"
byol="byol_gessl.py $common --baseline $step"
barlow="barlow_sparsehead.py $common"
mae="mae_tc2.py $common"

# Passes of a view or mask per image: SimCLR 2 and 4, TC2 7.3; BYOL 2.7, GeSSL 27.3; MAE 1 and 4,
# TC2 5.9 (counted FLOPs of vit_tiny). Equal passes: as many as the method's, or up to 1 % more.
# 1024: the batch at which TC2's Table 11 is best. 0.06: a penalty of about twice the loss, so that
# columns die.
rows="
simclr_2views                 $simclr --baseline --epochs 100
simclr_4views                 $simclr --baseline --views 4 --epochs 100
tc2                           $simclr --epochs 100
byol_large_batch              $byol --epochs 100
gessl                         byol_gessl.py $common --epochs 100
simclr_4views_equal_passes    $simclr --baseline --views 4 --epochs 184
simclr_2views_equal_passes    $simclr --baseline --epochs 367
barlow                        $barlow --baseline --epochs 100
rownorm                       $barlow --epochs 100
mae                           $mae --baseline --epochs 100
mae_4masks                    $mae --baseline --masks 4 --epochs 100
mae_tc2                       $mae --epochs 100
mae_4masks_equal_passes       $mae --baseline --masks 4 --epochs 148
mae_equal_passes              $mae --baseline --epochs 592
byol_large_batch_equal_passes $byol --epochs 1025
simclr_2views_1024            $simclr --baseline --batch-size 1024 --epochs 100
simclr_4views_1024            $simclr --baseline --views 4 --batch-size 1024 --epochs 100
tc2_1024                      $simclr --batch-size 1024 --epochs 100
byol_tc2                      $combine byol tc2 $common $step --epochs 100
simclr_sparsehead             $combine simclr sparsehead $common --lambda-sparse 0.06 --epochs 100
"
for row; do
  grep -q "^$row " <<< "$rows" || { echo "no row $row" >&2; exit 2; }
done
failed=0
while read -r name command; do
  [ -n "$name" ] || continue
  [[ $# == 0 || " $* " == *" $name "* ]] || continue
  run=$out/gpu/seed$seed/$name
  status=0
  python $command --out "$run" < /dev/null && python eval_linear.py "$run" < /dev/null || status=$?
  # Who stops a row stops all; an error or a crash (abort, out of memory) ends one.
  case $status in 129 | 130 | 131 | 141 | 143) exit $status ;; esac
  [ $status == 0 ] || { echo "$name has failed" >&2; failed=1; }
done <<< "$rows"
exit $failed
