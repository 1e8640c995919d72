#!/bin/sh
# The whole road on scikit-learn's digits: pre-train, contract, cut twelve sizes without training, PIAD, evaluate, fine-tune
# one sub-network. 2 CPU cores, no GPU.
set -eu
cd "$(dirname "$0")"
export DATA_SET=digits OUTPUT="${OUTPUT:-output/demo}"
export REPORT="$OUTPUT" METHOD=best
for stage in pretrain reparam; do
    echo "=== run_$stage.sh"
    sh "run_$stage.sh"
done
echo "=== run_test.sh: twelve sizes of the contracted weights, without training"
CHECKPOINT="$OUTPUT/reparamed/digits/contracted.safetensors" WEIGHTS='' BASELINE='' REPORT="$OUTPUT/untrained" sh run_test.sh
for stage in train test train_peeled; do
    echo "=== run_$stage.sh"
    sh "run_$stage.sh"
done
echo "=== $OUTPUT/frontier.png shows this table:"
cat "$OUTPUT/frontier.txt"
