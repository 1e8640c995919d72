#!/bin/sh
# Stage 5: extracts one sub-network and fine-tunes it; writes it as a folder (model.safetensors, config.json).
#
#   sh run_train_peeled.sh                                                  the embedded digits
#   DATA_SET=imagenet DATA_PATH=/data/imagenet MODEL=vit_base SIZE="--macs 8.5G" GPUS=2 sh run_train_peeled.sh
#
# ImageNet: 30 epochs at 5e-5 to 1e-6, drop path 0.1. Hours were not measured here.
# The authors publish for fine-tuned sub-networks: DeiT-B op code 194 (8.47 G MACs) 80.4 %, op code 268 (5.65 G) 77.0 %.
set -eu
. ./common.sh
SIZE=${SIZE:---macs-ratio 0.25}
if [ "$DATA_SET" = digits ]; then
    EPOCHS=${EPOCHS:-15} LR=${LR:-2e-3} DROP_PATH=${DROP_PATH:-0} WEIGHTS=${WEIGHTS---eval-ema}
else
    EPOCHS=${EPOCHS:-30} LR=${LR:-5e-5} DROP_PATH=${DROP_PATH:-0.1} WEIGHTS=${WEIGHTS-}
fi
CHECKPOINT=${CHECKPOINT:-$(newest "$OUTPUT/peelable/$NAME")}
if [ -z "$CHECKPOINT" ]; then
    [ "$DATA_SET" = digits ] || { echo "no checkpoint in $OUTPUT/peelable/$NAME: run run_train.sh first" >&2; exit 2; }
    sh run_train.sh
    CHECKPOINT=$(newest "$OUTPUT/peelable/$NAME")
fi
FOLDER=${FOLDER:-$OUTPUT/peeled/$NAME/$(echo "$SIZE" | tr -d ' -' )}

prepare requirements.txt
# shellcheck disable=SC2086
launch main.py --stage finetune --eval-every "$EVAL_EVERY" --checkpoint "$CHECKPOINT" $WEIGHTS $SIZE --epochs "$EPOCHS" --lr "$LR" \
    --drop-path "$DROP_PATH" $AUGMENTATION --resume auto --output-dir "$FOLDER"
