#!/usr/bin/env bash
# Trains with settings from the environment: every flag of `sedd train` in capitals, such as
#   DATA_PATH=mine.h5ad HIDDEN_DIM=256 NUM_LAYERS=6 NUM_HEADS=8 ./bash/train.sh
# Further arguments are passed on and win. NUM_PROCESSES=2 starts that many processes with `accelerate launch`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$here/bash/setup.sh"
export PATH="$here/.venv/bin:$PATH"

mapfile -d '' -t flags < <(python "$here/train.py" --flags_from_environment)

if [ "${NUM_PROCESSES:-1}" -gt 1 ]; then
  # --multi_gpu: without it accelerate starts one process where there is no GPU.
  exec accelerate launch --multi_gpu --num_processes "$NUM_PROCESSES" "$here/train.py" "${flags[@]}" "$@"
fi
exec python "$here/train.py" "${flags[@]}" "$@"
