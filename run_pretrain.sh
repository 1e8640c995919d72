#!/bin/sh
# Stage 1: trains a plain vision transformer, where there are no pre-trained weights. On ImageNet, skip it: run_reparam.sh
# takes timm's weights.
#
#   sh run_pretrain.sh                                                      the embedded digits, 2 CPU cores
#   DATA_SET=imagenet DATA_PATH=/data/imagenet MODEL=vit_small GPUS=8 sh run_pretrain.sh
#
# The ImageNet setting is DeiT's (300 epochs, global batch 1,024); DeiT reports 72.2 / 79.9 / 81.8 % for Ti / S / B.
# Its hours on 8 GPUs were not measured here.
set -eu
here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=. # sbatch runs a copy of this script from a folder of its own
[ -f "$here/common.sh" ] || { echo "start the script in the folder that holds common.sh" >&2; exit 2; }
. "$here/common.sh"
if [ "$DATA_SET" = digits ]; then
    # A small ViT of timm's, 17 tokens.
    MODEL=${MODEL:-vit_tiny_patch16_224}
    MODEL_KWARGS=${MODEL_KWARGS:-img_size=8 patch_size=2 in_chans=1 embed_dim=16 depth=8 num_heads=2}
    PREPROCESSING=${PREPROCESSING:---crop-pct 1}
    EPOCHS=${EPOCHS:-80} LR=${LR:-1.6e-2} EMA_DECAY=${EMA_DECAY:-0}
else
    EPOCHS=${EPOCHS:-300} LR=${LR:-5e-4} EMA_DECAY=${EMA_DECAY:-0.99996}
fi

prepare requirements.txt
# shellcheck disable=SC2086
launch main.py --stage pretrain --eval-every "$EVAL_EVERY" --epochs "$EPOCHS" --lr "$LR" --ema-decay "$EMA_DECAY" $AUGMENTATION \
    --resume auto --output-dir "$OUTPUT/pretrained/$NAME"
