#!/usr/bin/env bash
# `sedd quick` on one .h5ad in a few minutes: train, impute hidden genes of held-out cells, generate cells, evaluate.
#   ./bash/train_quick.sh                          on the PBMC 3k counts that the project ships
#   DATA_PATH=mine.h5ad ./bash/train_quick.sh      on your own counts (LAYER=counts if X does not hold them)
# OUTPUT is where everything goes (experiments/quick). Further arguments go to the training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./bash/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

exec sedd quick ${DATA_PATH:+--data_path "$DATA_PATH"} ${LAYER:+--layer "$LAYER"} --output "${OUTPUT:-experiments/quick}" --overwrite "$@"
