#!/usr/bin/env bash
# The tests. Further arguments go to pytest: ./bash/test.sh -m slow, ./bash/test.sh tests/test_loss.py -k toy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./bash/setup.sh
exec .venv/bin/python -m pytest "$@"
