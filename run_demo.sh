#!/bin/sh
# All stages on scikit-learn's digits: pre-train, contract and evaluate twelve sizes without training, contract and train with
# PIAD, evaluate twelve sizes, fine-tune one sub-network. Under 5 minutes on 2 CPU cores, no GPU.
#
#   sh run_demo.sh                      results in output/demo
#   OUTPUT=output/other sh run_demo.sh  results in another folder
set -eu
export DATA_SET=digits OUTPUT="${OUTPUT:-output/demo}"
here=$(dirname "$0")
. "$here/common.sh"
echo "=== run_pretrain.sh"
run_script run_pretrain.sh
echo "=== METHOD=best run_reparam.sh and run_test.sh: twelve sizes without training"
run_script run_reparam.sh METHOD=best FOLDER="$OUTPUT/reparamed/best"
run_script run_test.sh CHECKPOINT="$OUTPUT/reparamed/best" WEIGHTS='' BASELINE='' REPORT="$OUTPUT/untrained"
export REPORT="$OUTPUT"
for stage in reparam train test train_peeled; do
    echo "=== run_$stage.sh"
    run_script "run_$stage.sh"
done
echo "=== $OUTPUT/frontier.png shows this table:"
cat "$OUTPUT/frontier.txt"
