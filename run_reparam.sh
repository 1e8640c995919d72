#!/bin/sh
# Stage 2: WPAC. Contracts the pre-trained model; its function does not change.
#
# METHOD=paper (the default) is the paper's. METHOD=best orders dims by their effect on the loss, and writes beside the
# weights compensation.safetensors, with which sub-networks make up for what was cut, and a mask table without training:
# sizes at once, which CHECKPOINT=FOLDER sh run_test.sh evaluates. FOLDER: where the results go.
#
#   sh run_reparam.sh                                                       the embedded digits
#   DATA_SET=imagenet DATA_PATH=/data/imagenet MODEL=vit_small sh run_reparam.sh
#
# One forward and backward pass over 1,024 training images, on one GPU or a CPU: minutes. (Then five passes over val/ for
# the report; EXTRA=--no-eval skips them.) CHECKPOINT: weights to start from; without them, timm's are downloaded.
# The paper, DeiT-B with 3/4, 2/4, 1/4 of the attention dims, no training: 81.2, 76.9, 41.8 % of 81.8 % (paper's figures).
set -eu
here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=. # sbatch runs a copy of this script from a folder of its own
[ -f "$here/common.sh" ] || { echo "start the script in the folder that holds common.sh" >&2; exit 2; }
. "$here/common.sh"
METHOD=${METHOD:-paper}
FOLDER=${FOLDER:-$OUTPUT/reparamed/$NAME}
DROPOUT_RATIO=${DROPOUT_RATIO:-} # share of the MACs that the mask table of METHOD=best can drop (default: that of reparam.py)
CHECKPOINT=${CHECKPOINT:-}
if [ -z "$CHECKPOINT" ]; then
    pretrained=$OUTPUT/pretrained/$NAME
    has_checkpoint "$pretrained" || [ "$DATA_SET" != digits ] || run_script run_pretrain.sh
    if has_checkpoint "$pretrained"; then CHECKPOINT=$pretrained; fi
fi

prepare requirements.txt
if [ -n "$CHECKPOINT" ]; then
    set -- --checkpoint "$CHECKPOINT"
else
    set -- --pretrained
fi
[ "$METHOD" != best ] || set -- "$@" --mask-table ${DROPOUT_RATIO:+--dropout-ratio "$DROPOUT_RATIO"}
launch reparam.py "$@" --method "$METHOD" --output-dir "$FOLDER"
