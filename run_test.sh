#!/bin/sh
# Stage 4: evaluates sub-networks of the super-network; prints a table, writes frontier.csv, .json, .png, and widths.png.
#
#   sh run_test.sh                                                          the embedded digits
#   DATA_SET=imagenet DATA_PATH=/data/imagenet MODEL=vit_small SIZES="--macs-ratio 0.333 0.5 0.667" sh run_test.sh
#
# Seconds per size on one GPU. The authors' released checkpoint_<epoch>.pth and mask_table.json can be put into
# OUTPUT/peelable/NAME/ and evaluated: SIZES="--op-code 150". Their figures: DeiT-B at 8.44 G MACs 80.4 %, at 5.63 G 77.0 %
# without fine-tuning; DeiT-B at 8.47 G 81.24 % with it.
set -eu
here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=. # sbatch runs a copy of this script from a folder of its own
[ -f "$here/common.sh" ] || { echo "start the script in the folder that holds common.sh" >&2; exit 2; }
. "$here/common.sh"
SIZES=${SIZES:---frontier 12}
REPORT=${REPORT:-$OUTPUT/tested/$NAME}
if [ "$DATA_SET" = digits ]; then
    BASELINE=${BASELINE-$OUTPUT/reparamed/$NAME/contracted.safetensors}
else
    BASELINE=${BASELINE-} # contracted weights to cut to the same widths, for comparison
fi
COMPARE=${COMPARE:-}      # REPORT of another evaluation, to draw its sizes beside these
use_trained

prepare requirements.txt
# shellcheck disable=SC2086
launch main.py --eval --checkpoint "$CHECKPOINT" ${WEIGHTS:-} $SIZES ${BASELINE:+--baseline "$BASELINE"} \
    ${COMPARE:+--compare "$COMPARE"} --output-dir "$REPORT"
