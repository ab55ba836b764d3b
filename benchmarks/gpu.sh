#!/usr/bin/env bash
# One command for a rented GPU: correctness first, then speed, JSON, and what falls short. Installs nothing.
#   benchmarks/gpu.sh [--device cpu --tiny] [--output FILE]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python
export PYTHONPATH=$PWD
"$python" -m pytest -q tests/training/test_masking.py tests/training/test_no_wait.py tests/training/test_late_look.py
"$python" benchmarks/gpu.py "$@"
