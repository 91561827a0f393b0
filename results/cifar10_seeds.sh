#!/usr/bin/env bash
# Every row of results/README.md's tables over seeds, from the repository's root. DATA: CIFAR-10 as class folders train/ and test/ of 32x32 images, of
# which OUT/subset links the first 1,000 training images of each class, by name, and every test image. The rows seen_* train on 2,000 images of each of
# five classes (OUT/seen) and are evaluated on these and on the five others (OUT/unseen).
# Usage: results/cifar10_seeds.sh DATA OUT SEED [ROW ...]
set -euo pipefail
data=$(realpath "$1") out=$2 seed=$3
shift 3
link() {        # NAME IMAGES CLASS ...
  for class in "${@:3}"; do
    for split in train test; do
      [ ! -L "$out/$1/$split" ] || rm "$out/$1/$split"            # of an earlier version: a link to DATA's own folder, which nothing here may write into
      mkdir -p "$out/$1/$split/$class"
      files=("$data/$split/$class"/*)
      ln -s -f -t "$out/$1/$split/$class" "${files[@]:0:$2}"
    done
  done
}
if [ ! -e "$out/unseen/test/truck" ]; then
  link subset 1000 airplane automobile bird cat deer dog frog horse ship truck
  link seen 2000 airplane bird deer frog ship
  link unseen 1000 automobile cat dog horse truck
fi
common="--data $out/subset --seed $seed --lr 2e-3 --eval-every 100 --log-every 39"
simclr="simclr_tc2.py $common --arch resnet_tiny --batch-size 128 --warmup-epochs 0.5 --temperature 0.2 --eval-every 1"
byol="byol_gessl.py $common --arch resnet_tiny --batch-size 32 --warmup-epochs 0.3 --ema-decay 0.98"
gessl="$byol --epochs 2 --tasks 4 --target-steps"
barlow="barlow_sparsehead.py $common --arch resnet_tiny --batch-size 128 --lr 3e-3 --hidden 256 --dim 128 --epochs 4 --warmup-epochs 0.5"
mae="mae_tc2.py $common --arch vit_micro --batch-size 64 --warmup-epochs 0.5"
mae_tc2="$mae --masks 2 --tasks 2 --epochs 4"
declare -A rows=(
  [simclr_2views]="$simclr --baseline --epochs 4"
  [simclr_4views]="$simclr --baseline --views 4 --epochs 4"
  [simclr_4views_equal_passes]="$simclr --baseline --views 4 --epochs 8"
  [simclr_t]="$simclr --baseline --views 4 --tasks 4 --epochs 4"
  [tc2]="$simclr --epochs 4"
  [tc2_inner0]="$simclr --inner-lr 0 --epochs 4"
  [tc2_no_calibration]="$simclr --calibrate none --epochs 4"
  [tc2_mix]="$simclr --calibrate mix --epochs 4"
  [tc2_half_factors]="$simclr --factors 32 --epochs 4"
  [tc2_lambda_s_0.01]="$simclr --lambda-s 0.01 --epochs 4"
  [tc2_lambda_s_1]="$simclr --lambda-s 1 --epochs 4"
  [tc2_2tasks]="$simclr --tasks 2 --epochs 4"
  [tc2_8tasks]="$simclr --tasks 8 --epochs 4"
  [tc2_nce]="$simclr --query-loss nce --epochs 4"
  [tc2_literal]="$simclr --literal --epochs 4"
  [byol]="$byol --baseline --epochs 2"
  [byol_large_batch]="$byol --baseline --batch-size 128 --ema-decay 0.922 --epochs 2"
  [byol_equal_passes]="$byol --baseline --epochs 10"
  [byol_large_batch_equal_passes]="$byol --baseline --batch-size 128 --ema-decay 0.922 --epochs 10"
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
  [mae_tc2_no_calibration]="$mae_tc2 --calibrate none"
  [mae_tc2_inner_lr_0.1]="$mae_tc2 --inner-lr 0.1"
  [mae_tc2_inner_lr_1]="$mae_tc2 --inner-lr 1"
  [seen_simclr_4views]="$simclr --baseline --views 4 --epochs 4 --data $out/seen"
  [seen_simclr_4views_equal_passes]="$simclr --baseline --views 4 --epochs 8 --data $out/seen"
  [seen_tc2]="$simclr --epochs 4 --data $out/seen"
)
[ $# -gt 0 ] || set -- "${!rows[@]}"
for name; do
  python ${rows[$name]} --out "$out/seed$seed/$name"
  python eval_linear.py "$out/seed$seed/$name" --protocol linear knn $(case $name in barlow* | plain* | rownorm* | prox*) echo spectrum ;; esac)
  case $name in seen*) python eval_linear.py "$out/seed$seed/$name" --data "$out/unseen" --protocol linear knn ;; esac
done
