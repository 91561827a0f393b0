#!/usr/bin/env bash
# The rows of results/README.md over lengths of training, from the repository's root. A run that was
# interrupted goes on, one that is done is only evaluated again.
#   results/cifar10_lengths.sh DATA OUT LENGTH SEED [ROW ...]       all rows, or these
# DATA: CIFAR-10 as class folders train/ and test/ of 32x32 images. OUT: e.g. runs. LENGTH: 1, 4 or
# 16 times the shortest training, each with a learning rate schedule of its own. The rows seen_* are
# judged on the five classes that they were not trained on.
set -euo pipefail
data=$(realpath "$1") out=$2 length=$3 seed=$4
shift 4
source "$(dirname "$0")/cifar10_links.sh"

epochs() {      # N: of length 1
  echo "--epochs $(($1 * length))"
}

common="--seed $seed --lr 2e-3 --eval-every 1000 --log-every $((39 * length))"
tiny="--data $out/subset $common --arch resnet_tiny"

# SimCLR and TC2: 128 images a step. Passes of a view per image: 2, 4, TC2 7.3.
simclr="$tiny --batch-size 128 --warmup-epochs 0.5 --temperature 0.2 --weight-decay 1e-6"
two="simclr_tc2.py $simclr --baseline"
four="$two --views 4"
tc2="simclr_tc2.py $simclr $(epochs 4)"

# BYOL and GeSSL: four mini-batches of 32 images are a step of GeSSL, one of 128 is BYOL's.
byol="--batch-size 32 --warmup-epochs 0.3 --ema-decay 0.98"
large="byol_gessl.py $tiny --baseline --batch-size 128 --warmup-epochs 0.3 --ema-decay 0.922"
gessl="byol_gessl.py $tiny $byol --tasks 4 --target-steps 3 $(epochs 2)"

barlow="barlow_sparsehead.py $tiny --batch-size 128 --lr 3e-3 --hidden 256 --dim 128
  --warmup-epochs 0.5"
mae="mae_tc2.py --data $out/subset $common --arch vit_micro --batch-size 64 --warmup-epochs 0.5"
mae_tc2="$mae --masks 2 --tasks 2 $(epochs 4)"

# Other readings of TC2.
many="simclr_tc2.py ${simclr/--batch-size 128/--batch-size 512}"
reading() {     # NAME: TC2 with another step
  echo "results/readings.py $1 $simclr $(epochs 4)"
}

# Another base for each enhancement.
byol_tc2="results/combinations.py byol tc2 $tiny --batch-size 128 --warmup-epochs 0.3
  --ema-decay 0.922"

declare -A rows=(
  [simclr_2views]="$two $(epochs 4)"
  [simclr_2views_equal_passes]="$two $(epochs 15)"
  [simclr_4views]="$four $(epochs 4)"
  [simclr_4views_equal_passes]="$four $(epochs 8)"
  [simclr_t]="$four --tasks 4 $(epochs 4)"
  [simclr_t_2]="$two --tasks 2 $(epochs 4)"
  [simclr_4views_512]="$many --baseline --views 4 $(epochs 4)"
  [tc2_512]="$many $(epochs 4)"
  [tc2]="$tc2"
  [tc2_support]="$(reading support)"
  [tc2_features]="$(reading features)"
  [tc2_without_skip]="$tc2 --without skip"
  [tc2_no_calibration]="$tc2 --without calibration"
  [tc2_literal]="$tc2 --literal"
  [byol]="byol_gessl.py $tiny $byol --baseline $(epochs 2)"
  [byol_large_batch]="$large $(epochs 2)"
  [byol_large_batch_equal_passes]="$large $(epochs 10)"
  [gessl]="$gessl"
  [gessl_ssl_4]="$gessl --ssl-weight 4"
  [gessl_kl_only]="$gessl --ssl-weight 0"
  [lookahead]="$gessl --lookahead"
  [barlow]="$barlow --baseline $(epochs 4)"
  [rownorm]="$barlow $(epochs 4)"
  [plain]="$barlow --penalty plain $(epochs 4)"
  [inputs]="$barlow --penalty inputs $(epochs 4)"
  [mae]="$mae --baseline $(epochs 4)"
  [mae_2masks]="$mae --baseline --masks 2 $(epochs 4)"
  [mae_equal_passes]="$mae --baseline $(epochs 15)"
  [mae_tc2]="$mae_tc2"
  [mae_tc2_inner0]="$mae_tc2 --inner-lr 0"
  [byol_large_batch_4epochs]="$large $(epochs 4)"
  [byol_tc2]="$byol_tc2 $(epochs 4)"
  [barlow_tc2]="${barlow/barlow_sparsehead.py/results/combinations.py barlow tc2} $(epochs 4)"
  [barlow_equal_passes]="$barlow --baseline $(epochs 11)"
  [simclr_sparsehead]="results/combinations.py simclr sparsehead $simclr $(epochs 4)"
  [simclr_sparsehead_strong]="results/combinations.py simclr sparsehead $simclr $(epochs 4)
    --lambda-sparse 0.1"
  [simclr_gessl]="results/combinations.py simclr gessl ${simclr/--batch-size 128/--batch-size 64} --tasks 2 $(epochs 4)"
  [simclr_2views_equal_gessl]="$two $(epochs 26)"

  # Settings and parts.
  [tc2_inner0]="$tc2 --inner-lr 0"
  [tc2_all_factors]="$tc2 --factors 64"
  [tc2_lambda_s_0.01]="$tc2 --lambda-s 0.01"
  [tc2_lambda_s_1]="$tc2 --lambda-s 1"
  [tc2_2tasks]="$tc2 --tasks 2"
  [tc2_8tasks]="$tc2 --tasks 8"
  [tc2_nce]="$tc2 --query-loss nce"
  [tc2_no_decay]="$tc2 --weight-decay 0"
  [byol_equal_passes]="byol_gessl.py $tiny $byol --baseline $(epochs 10)"
  [gessl_lambda_1]="$gessl --target-steps 1"
  [gessl_lambda_5]="$gessl --target-steps 5"
  [gessl_lambda_10]="$gessl --target-steps 10"
  [gessl_alpha_0.005]="$gessl --inner-lr 0.005"
  [gessl_first_order]="$gessl --hypergrad first-order"
  [gessl_exact]="$gessl --hypergrad exact"
  [gessl_neumann]="$gessl --hypergrad neumann"
  [gessl_cg]="$gessl --hypergrad cg"
  [plain_strong]="$barlow --penalty plain --lambda-sparse 1 $(epochs 4)"
  [prox]="$barlow --penalty prox --lambda-sparse 3 $(epochs 4)"
  [prox_strong]="$barlow --penalty prox --lambda-sparse 10 $(epochs 4)"
  [mae_tc2_no_calibration]="$mae_tc2 --without calibration"
  [mae_tc2_inner_lr_0.1]="$mae_tc2 --inner-lr 0.1"
  [mae_tc2_inner_lr_1]="$mae_tc2 --inner-lr 1"
  [mae_tc2_lambda_s_0.001]="$mae_tc2 --lambda-s 0.001"
  [mae_tc2_all_factors]="$mae_tc2 --lambda-s 0.001 --factors 64"

  # Five classes.
  [seen_simclr_4views]="$four $(epochs 4) --data $out/seen"
  [seen_simclr_4views_equal_passes]="$four $(epochs 8) --data $out/seen"
  [seen_simclr_t]="$four --tasks 4 $(epochs 4) --data $out/seen"
  [seen_tc2]="$tc2 --data $out/seen"
)
[ $# -gt 0 ] || set -- "${!rows[@]}"
for name; do
  run=$out/length$length/seed$seed/$name
  python ${rows[$name]} --out "$run"
  python eval_linear.py "$run"
  case $name in
    seen*) python eval_linear.py "$run" --data "$out/unseen" --protocol linear knn fewshot ;;
  esac
done
