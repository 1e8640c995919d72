#!/bin/sh
# The whole road on scikit-learn's digits: pre-train, WPAC, PIAD, evaluate, fine-tune one sub-network. 2 CPU cores, no GPU.
set -eu
cd "$(dirname "$0")"
export DATA_SET=digits OUTPUT="${OUTPUT:-output/demo}"
export REPORT="$OUTPUT"
for stage in pretrain reparam train test train_peeled; do
    echo "=== run_$stage.sh"
    sh "run_$stage.sh"
done
echo "=== $OUTPUT/frontier.png shows this table:"
cat "$OUTPUT/frontier.txt"
