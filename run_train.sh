#!/bin/sh
# Stage 3: PIAD. Trains the super-network; writes checkpoint_<epoch>.pth and mask_table.json.
#
#   sh run_train.sh                                                         the embedded digits, 2 CPU cores
#   DATA_SET=imagenet DATA_PATH=/data/imagenet MODEL=vit_base GPUS=8 sh run_train.sh
#
# ImageNet, as in the paper: DeiT-B 150 epochs, DeiT-S and DeiT-Ti 300, global batch 1,024 (8 GPUs of 128), P_e = 50,
# r = 0.875, DeiT's augmentation and optimizer, no warm-up. Hours on 8 GPUs were not measured here.
# The paper, DeiT-S at 4:12 / 8:12 of its MACs, no fine-tuning: 70.6 / 78.2 % (paper's figures).
set -eu
here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=. # sbatch runs a copy of this script from a folder of its own
[ -f "$here/common.sh" ] || { echo "start the script in the folder that holds common.sh" >&2; exit 2; }
. "$here/common.sh"
if [ "$DATA_SET" = digits ]; then
    EPOCHS=${EPOCHS:-100} PROGRESSIVE_EPOCHS=${PROGRESSIVE_EPOCHS:-50} LR=${LR:-1.6e-2} EMA_DECAY=${EMA_DECAY:-0.99}
    DROPOUT_RATIO=${DROPOUT_RATIO:-0.94}
else
    case $MODEL in
    *base*) EPOCHS=${EPOCHS:-150} ;;
    *) EPOCHS=${EPOCHS:-300} ;;
    esac
    PROGRESSIVE_EPOCHS=${PROGRESSIVE_EPOCHS:-50} LR=${LR:-5e-4} EMA_DECAY=${EMA_DECAY:-0.99996}
    DROPOUT_RATIO=${DROPOUT_RATIO:-0.875}
fi
CHECKPOINT=${CHECKPOINT:-$OUTPUT/reparamed/$NAME/contracted.safetensors}
[ -f "$CHECKPOINT" ] || [ "$DATA_SET" != digits ] || run_script run_reparam.sh

prepare requirements.txt
# shellcheck disable=SC2086
launch main.py --stage piad --eval-every "$EVAL_EVERY" --checkpoint "$CHECKPOINT" --epochs "$EPOCHS" --progressive-epochs "$PROGRESSIVE_EPOCHS" \
    --dropout-ratio "$DROPOUT_RATIO" --lr "$LR" --ema-decay "$EMA_DECAY" $AUGMENTATION --resume auto --output-dir "$OUTPUT/peelable/$NAME"
