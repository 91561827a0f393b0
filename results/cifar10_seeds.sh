#!/usr/bin/env bash
# The rows over seeds of results/README.md, from the repository's root. A run that was interrupted
# goes on, one that is done is only evaluated again.
#   results/cifar10_seeds.sh DATA OUT SEED [ROW ...]        all rows, or these
# DATA: CIFAR-10 as class folders train/ and test/ of 32x32 images. OUT: e.g. runs. The rows seen_*
# are judged on the five classes of their training and on the five others. Of methods and baselines,
# fine-tuning and the papers' measures.
set -euo pipefail
data=$(realpath "$1") out=$2 seed=$3
shift 3

source "$(dirname "$0")/cifar10_links.sh"

common="--data $out/subset --seed $seed --lr 2e-3 --eval-every 100 --log-every 39"
simclr="simclr_tc2.py $common --arch resnet_tiny --batch-size 128 --warmup-epochs 0.5
  --temperature 0.2 --weight-decay 1e-6 --eval-every 1"
four="$simclr --baseline --views 4"
tc2="$simclr --factors 64 --epochs 4"
byol="byol_gessl.py $common --arch resnet_tiny --batch-size 32 --warmup-epochs 0.3 --ema-decay 0.98"
large="$byol --baseline --batch-size 128 --ema-decay 0.922"     # all images of GeSSL's outer step
gessl="$byol --epochs 2 --tasks 4 --target-steps"
barlow="barlow_sparsehead.py $common --arch resnet_tiny --batch-size 128 --lr 3e-3 --hidden 256
  --dim 128 --epochs 4 --warmup-epochs 0.5"
mae="mae_tc2.py $common --arch vit_micro --batch-size 64 --warmup-epochs 0.5"
mae_tc2="$mae --masks 2 --tasks 2 --factors 64 --epochs 4"
declare -A rows=(
  [simclr_2views]="$simclr --baseline --epochs 4"
  [simclr_4views]="$four --epochs 4"
  [simclr_4views_equal_passes]="$four --epochs 8"
  [simclr_t]="$four --tasks 4 --epochs 4"
  [tc2]="$tc2"
  [tc2_inner0]="$tc2 --inner-lr 0"
  [tc2_no_calibration]="$tc2 --without calibration"
  [tc2_half_factors]="$simclr --factors 32 --epochs 4"
  [tc2_lambda_s_0.01]="$tc2 --lambda-s 0.01"
  [tc2_lambda_s_1]="$tc2 --lambda-s 1"
  [tc2_2tasks]="$tc2 --tasks 2"
  [tc2_8tasks]="$tc2 --tasks 8"
  [tc2_nce]="$tc2 --query-loss nce"
  [tc2_literal]="$tc2 --literal"
  [byol]="$byol --baseline --epochs 2"
  [byol_large_batch]="$large --epochs 2"
  [byol_equal_passes]="$byol --baseline --epochs 10"
  [byol_large_batch_equal_passes]="$large --epochs 10"
  [gessl]="$gessl 3"
  [gessl_kl_only]="$gessl 3 --ssl-weight 0"
  [gessl_lambda_1]="$gessl 1"
  [gessl_lambda_5]="$gessl 5"
  [gessl_lambda_10]="$gessl 10"
  [gessl_alpha_0.005]="$gessl 3 --inner-lr 0.005"
  [lookahead]="$gessl 3 --lookahead"
  [gessl_first_order]="$gessl 3 --hypergrad first-order"
  [gessl_exact]="$gessl 3 --hypergrad exact"
  [gessl_neumann]="$gessl 3 --hypergrad neumann"
  [gessl_cg]="$gessl 3 --hypergrad cg"
  [barlow]="$barlow --baseline"
  [plain]="$barlow --penalty plain"
  [plain_strong]="$barlow --penalty plain --lambda-sparse 1"
  [rownorm]="$barlow"
  [prox]="$barlow --penalty prox --lambda-sparse 3"
  [prox_strong]="$barlow --penalty prox --lambda-sparse 10"
  [mae]="$mae --baseline --epochs 4"
  [mae_2masks]="$mae --baseline --masks 2 --epochs 4"
  [mae_equal_passes]="$mae --baseline --epochs 15"
  [mae_tc2]="$mae_tc2"
  [mae_tc2_no_calibration]="$mae_tc2 --without calibration"
  [mae_tc2_inner_lr_0.1]="$mae_tc2 --inner-lr 0.1"
  [mae_tc2_inner_lr_1]="$mae_tc2 --inner-lr 1"
  [seen_simclr_4views]="$four --epochs 4 --data $out/seen"
  [seen_simclr_4views_equal_passes]="$four --epochs 8 --data $out/seen"
  [seen_tc2]="$tc2 --data $out/seen"
)
[ $# -gt 0 ] || set -- "${!rows[@]}"
for name; do
  run=$out/seed$seed/$name
  python ${rows[$name]} --out "$run"
  python eval_linear.py "$run"
  case $name in
    seen*) python eval_linear.py "$run" --data "$out/unseen" ;;
    barlow* | plain* | rownorm* | prox*) python results/measures.py "$run" --measure spectrum ;;
  esac
  case $name in
    simclr_4views_equal_passes | tc2 | byol_large_batch_equal_passes | gessl | barlow | rownorm | \
      mae_equal_passes | mae_tc2)
      python eval_linear.py "$run" --protocol finetune
      python results/measures.py "$run" ;;
  esac
done
