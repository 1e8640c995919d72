#!/bin/sh
# Stage 5: cuts one sub-network and fine-tunes it; writes it as a folder (model.safetensors, config.json, model.py).
#
#   sh run_train_peeled.sh                                                  the embedded digits
#   DATA_SET=imagenet DATA_PATH=/data/imagenet MODEL=vit_base SIZE="--macs 8.5G" GPUS=2 sh run_train_peeled.sh
#
# RECIPE=best: the whole super-network teaches, with the loss of run_train.sh and, away from the digits, its learning rate, averaging
# and augmentation; without drop path.
# From contracted weights instead of a trained super-network, refit the size first: CHECKPOINT=output/reparamed/NAME EXTRA=--refit.
# ImageNet, RECIPE=paper: 30 epochs at 5e-5 to 1e-6, drop path 0.1. Hours were not measured here.
# The authors' figure for a fine-tuned sub-network of DeiT-B: 81.24 % at 8.47 G MACs (80.4 % at 8.44 G without fine-tuning).
set -eu
here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=. # sbatch runs a copy of this script from a folder of its own
[ -f "$here/common.sh" ] || { echo "start the script in the folder that holds common.sh" >&2; exit 2; }
. "$here/common.sh"
SIZE=${SIZE:---macs-ratio 0.25}
if [ "$DATA_SET" = digits ]; then
    EPOCHS=${EPOCHS:-15} LR=${LR:-2e-3} DROP_PATH=${DROP_PATH:-0}
elif [ "$RECIPE" = best ]; then
    EPOCHS=${EPOCHS:-30} LR=${LR:-3e-4} DROP_PATH=${DROP_PATH:-0} EMA_DECAY=${EMA_DECAY:-0.998}
else
    EPOCHS=${EPOCHS:-30} LR=${LR:-5e-5} DROP_PATH=${DROP_PATH:-0.1}
fi
use_trained
[ "$RECIPE" = paper ] || teach_by_itself
FOLDER=${FOLDER:-$OUTPUT/peeled/$NAME/$(echo "$SIZE" | tr -d ' -' )}

prepare requirements.txt
# shellcheck disable=SC2086
launch main.py --stage finetune --eval-every "$EVAL_EVERY" --checkpoint "$CHECKPOINT" ${WEIGHTS:-} $SIZE --epochs "$EPOCHS" \
    --lr "$LR" ${TEACHER:-} --drop-path "$DROP_PATH" ${EMA_DECAY:+--ema-decay $EMA_DECAY} $AUGMENTATION --resume auto --output-dir "$FOLDER"
