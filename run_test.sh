#!/bin/sh
# Stage 4: evaluates sub-networks of the super-network; prints a table, writes frontier.csv, .json, .png, and widths.png.
#
#   sh run_test.sh                                                          the embedded digits
#   DATA_SET=imagenet DATA_PATH=/data/imagenet MODEL=vit_small SIZES="--macs-ratio 0.333 0.5 0.667" sh run_test.sh
#
# Seconds a size on one GPU. The authors' released checkpoint_<epoch>.pth and mask_table.json can be put into
# OUTPUT/peelable/NAME/ and evaluated: SIZES="--op-code 150". Their figures (with fine-tuning of 30 epochs): DeiT-Ti op code 64 69.0 %
# at 793 M MACs; DeiT-S op code 150 76.7 % at 2.27 G; DeiT-B op code 194 80.4 % at 8.47 G.
set -eu
. ./common.sh
SIZES=${SIZES:---frontier 12}
REPORT=${REPORT:-$OUTPUT/tested/$NAME}
if [ "$DATA_SET" = digits ]; then
    WEIGHTS=${WEIGHTS---eval-ema} # a short run ends on a high learning rate: the average is the steadier estimate
    BASELINE=${BASELINE-$OUTPUT/reparamed/$NAME/contracted.safetensors}
else
    WEIGHTS=${WEIGHTS-}
    BASELINE=${BASELINE-}         # contracted weights to cut to the same widths, for comparison
fi
CHECKPOINT=${CHECKPOINT:-$(newest "$OUTPUT/peelable/$NAME")}
if [ -z "$CHECKPOINT" ]; then
    [ "$DATA_SET" = digits ] || { echo "no checkpoint in $OUTPUT/peelable/$NAME: run run_train.sh first" >&2; exit 2; }
    sh run_train.sh
    CHECKPOINT=$(newest "$OUTPUT/peelable/$NAME")
fi

prepare requirements.txt
# shellcheck disable=SC2086
launch main.py --eval --checkpoint "$CHECKPOINT" $WEIGHTS $SIZES ${BASELINE:+--baseline "$BASELINE"} --output-dir "$REPORT"
