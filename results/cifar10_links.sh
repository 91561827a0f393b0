# Sourced by the scripts that train on parts of CIFAR-10; needs $data and $out. Makes, of links:
# $out/subset, the first 1,000 training images of each class, by name, and every test image;
# $out/seen, 2,000 images of each of five classes, and $out/unseen, 1,000 of each of the others.
link() {        # NAME IMAGES CLASS ...
  for class in "${@:3}"; do
    for split in train test; do
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
