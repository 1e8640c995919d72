#!/bin/sh
# All stages on scikit-learn's digits, no GPU: pre-train; the paper's contraction and PIAD; contraction by METHOD=best and training
# by RECIPE=best; twelve sizes of both super-networks; fine-tune one sub-network.
#
#   sh run_demo.sh                      results in output/demo
#   OUTPUT=output/other sh run_demo.sh  results in another folder
set -eu
export DATA_SET=digits OUTPUT="${OUTPUT:-output/demo}"
here=$(dirname "$0")
. "$here/common.sh"
echo "=== run_pretrain.sh"
run_script run_pretrain.sh
run_paper() {
    echo "=== the paper: $1"
    run_script "$@" NAME=paper METHOD=paper RECIPE=paper REPORT="$OUTPUT/paper"
}
run_paper run_reparam.sh CHECKPOINT="$OUTPUT/pretrained/$NAME"
run_paper run_train.sh
run_paper run_test.sh
export REPORT="$OUTPUT" METHOD=best RECIPE=best COMPARE="$OUTPUT/paper"
for stage in reparam train test train_peeled; do
    echo "=== METHOD=best, RECIPE=best: run_$stage.sh"
    run_script "run_$stage.sh"
done
echo "=== $OUTPUT/frontier.png shows this table:"
cat "$OUTPUT/frontier.txt"
