#!/usr/bin/env bash
# The whole road on one .h5ad in a few minutes: train, impute hidden genes of held-out cells, generate cells, evaluate.
#   ./bash/train_quick.sh                          on the PBMC 3k counts that the project ships
#   DATA_PATH=mine.h5ad ./bash/train_quick.sh      on your own counts (LAYER=counts if X does not hold them)
# OUTPUT is where everything goes (experiments/quick). Further arguments go to the training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./bash/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

data=${DATA_PATH:-data/pbmc3k.h5ad}
output=${OUTPUT:-experiments/quick}
layer=(${LAYER:+--layer "$LAYER"})

sedd train --config configs/quick.yaml --data_path "$data" --checkpoint_dir "$output" "${layer[@]}" --overwrite "$@"
sedd impute "$output" "$data" -o "$output/imputed.h5ad" --cells val --hide 0.15 "${layer[@]}" --overwrite
sedd generate "$output" -n 500 -o "$output/generated.h5ad" --overwrite
sedd evaluate "$output" "$data" -o "$output" --imputed "$output/imputed.h5ad" --generated "$output/generated.h5ad" \
  "${layer[@]}" --overwrite
