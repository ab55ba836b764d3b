#!/usr/bin/env bash
# The tests, on all cores. With arguments, which go to pytest, in one process: ./bash/test.sh -m slow, ./bash/test.sh tests/test_loss.py -k toy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./bash/setup.sh
if [ $# = 0 ]; then
  cores=$(getconf _NPROCESSORS_ONLN)
  set -- -n "$((cores < 8 ? cores : 8))" --dist worksteal
fi
exec .venv/bin/python -m pytest "$@"
