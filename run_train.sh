#!/bin/sh
# Stage 3: training of the super-network; writes checkpoint_<epoch>.pth and mask_table.json.
#
#   sh run_train.sh                                                         the embedded digits, 2 CPU cores
#   DATA_SET=imagenet DATA_PATH=/data/imagenet MODEL=vit_base GPUS=8 sh run_train.sh
#   RECIPE=best sh run_train.sh                                             with a teacher
#   RECIPE=best DATA_SET=images DATA_PATH=photos sh run_train.sh            without labels
#
# RECIPE=paper is PIAD on ImageNet as in the paper: DeiT-B 150 epochs, DeiT-S and DeiT-Ti 300, global batch 1,024 (8 GPUs of 128),
# P_e = 50, r = 0.875, DeiT's augmentation and optimizer, no warm-up. Hours on 8 GPUs were not measured here.
# The paper, DeiT-S at 4:12 / 8:12 of its MACs, no fine-tuning: 70.6 / 78.2 % (paper's figures).
#
# RECIPE=best starts from METHOD=best sh run_reparam.sh, keeps its mask table and its compensation, and learns from the whole
# network as it is at the start: docs/RESULTS.md, Recipes. ALPHA is the share of the teacher in the loss; 1 uses no labels.
# TOKENS is the weight of the teacher's tokens after four of its blocks (--distillation-tokens). A step trains
# SIZES_PER_STEP sizes on its images (--sizes-per-step); with 1 it takes less time.
# Away from digits, EPOCHS=30 and LR=3e-4 are a guess for runs that are longer and have larger batches than those measured: the
# ViT-S on CIFAR-10 had 2 epochs of batches of 64 images at LR=8e-4, otherwise these flags.
set -eu
here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=. # sbatch runs a copy of this script from a folder of its own
[ -f "$here/common.sh" ] || { echo "start the script in the folder that holds common.sh" >&2; exit 2; }
. "$here/common.sh"
if [ "$DATA_SET" = digits ]; then
    EPOCHS=${EPOCHS:-100} PROGRESSIVE_EPOCHS=${PROGRESSIVE_EPOCHS:-50} LR=${LR:-1.6e-2} EMA_DECAY=${EMA_DECAY:-0.99}
    DROPOUT_RATIO=${DROPOUT_RATIO:-0.94} SIZES_PER_STEP=${SIZES_PER_STEP:-1}
elif [ "$RECIPE" = best ]; then
    EPOCHS=${EPOCHS:-30} LR=${LR:-3e-4} EMA_DECAY=${EMA_DECAY:-0.998} SIZES_PER_STEP=${SIZES_PER_STEP:-3}
else
    case $MODEL in
    *base*) EPOCHS=${EPOCHS:-150} ;;
    *) EPOCHS=${EPOCHS:-300} ;;
    esac
    PROGRESSIVE_EPOCHS=${PROGRESSIVE_EPOCHS:-50} LR=${LR:-5e-4} EMA_DECAY=${EMA_DECAY:-0.99996}
    DROPOUT_RATIO=${DROPOUT_RATIO:-0.875}
fi
if [ "$RECIPE" = best ]; then
    CHECKPOINT=${CHECKPOINT:-$OUTPUT/reparamed/$NAME}
    [ -f "$CHECKPOINT/mask_table.json" ] || [ "$DATA_SET" != digits ] || run_script run_reparam.sh METHOD=best
    teach_by_itself
    # shellcheck disable=SC2086 # several words
    set -- --progressive-epochs 0 --op-code-sampling inverse-macs --sizes-per-step "$SIZES_PER_STEP" $TEACHER
else
    CHECKPOINT=${CHECKPOINT:-$OUTPUT/reparamed/$NAME/contracted.safetensors}
    [ -f "$CHECKPOINT" ] || [ "$DATA_SET" != digits ] || run_script run_reparam.sh
    set -- --progressive-epochs "$PROGRESSIVE_EPOCHS" --dropout-ratio "$DROPOUT_RATIO" --op-code-per-rank
fi

prepare requirements.txt
# shellcheck disable=SC2086
launch main.py --stage piad --eval-every "$EVAL_EVERY" --checkpoint "$CHECKPOINT" --epochs "$EPOCHS" "$@" --lr "$LR" \
    --ema-decay "$EMA_DECAY" $AUGMENTATION --resume auto --output-dir "$OUTPUT/peelable/$NAME"
