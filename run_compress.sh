#!/bin/sh
# From an encoder or a classifier, and photos without labels, to smaller models: no training, minutes on a CPU.
#
#   MODEL=vit_small_patch14_dinov2 CHECKPOINT=encoder.pth DATA_PATH=photos SIZES="--macs-ratio 0.5" sh run_compress.sh
#   CHECKPOINT=checkpoint.pth MODEL=deit_small_patch16_224 DATA_PATH=photos FORMAT="folder onnx" sh run_compress.sh
#
# Contracts the model (METHOD=best) into FOLDER (default: OUTPUT/reparamed/NAME), then cuts the sizes that SIZES asks for,
# refits them on the photos and writes them to COMPRESSED (default: OUTPUT/compressed/NAME), with a table of how near each comes
# to the whole model on photos that are held back. Further sizes: python export.py FOLDER, as the last line here calls it.
#
# SIZES: budgets as of export.py, such as "--macs-ratio 0.5 0.25" or "--latency 5ms".  FORMAT: see docs/EXPORT.md, such as "folder onnx".
# REFIT: steps of gradient descent per block, after least squares for its linear layers; 0 is least squares alone, "no" leaves the
# sizes as they are cut.
# TARGET: logits, features or tokens.  Without CHECKPOINT, timm's weights are downloaded.
set -eu
here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=. # sbatch runs a copy of this script from a folder of its own
[ -f "$here/common.sh" ] || { echo "start the script in the folder that holds common.sh" >&2; exit 2; }
DATA_SET=${DATA_SET:-images}
. "$here/common.sh"
SIZES=${SIZES:---macs-ratio 0.5}
FORMAT=${FORMAT:-folder}
REFIT=${REFIT:-400}
TARGET=${TARGET:-}
FOLDER=${FOLDER:-$OUTPUT/reparamed/$NAME}
COMPRESSED=${COMPRESSED:-$OUTPUT/compressed/$NAME}

run_script run_reparam.sh METHOD=best DATA_SET="$DATA_SET" FOLDER="$FOLDER" EXTRA="${TARGET:+--target $TARGET} $EXTRA"

case $FORMAT in *onnx*) prepare requirements-export.txt ;; *) prepare requirements.txt ;; esac
set -- "$FOLDER" --data-set "$DATA_SET" --measure fidelity --proxy-samples "$PROXY_SAMPLES" --device "$DEVICE" --seed "$SEED"
[ -z "$DATA_PATH" ] || set -- "$@" --data-path "$DATA_PATH"
[ "$REFIT" = no ] || set -- "$@" --refit "$REFIT"
# shellcheck disable=SC2086 # these hold several words each
exec "$PYTHON" "$here/export.py" "$@" $SIZES --format $FORMAT --output "$COMPRESSED" --replace
