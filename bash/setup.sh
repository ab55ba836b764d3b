#!/usr/bin/env bash
# Builds .venv with everything that training and the tests need, or does nothing when it is there and up to date.
# PYTHON names the interpreter (3.11 or newer); TORCH the version of torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
stamp="$venv/.sedd-ready"
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ -x "$venv/bin/sedd" ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
  exit 0
fi

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3 python3.12 python3.13; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: no Python 3.11 or newer was found; install one or set PYTHON=/path/to/python3.11" >&2
  return 1
}

python=$(find_python)
echo "setup: building $venv with $("$python" --version), this takes a few minutes once" >&2
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
# torch first and by its version: left to the resolver it would come with gigabytes of CUDA where there is no GPU.
pip install "torch==${TORCH:-2.13.0}"
pip install --constraint constraints.txt --editable '.[test]'
echo "$wanted" >"$stamp"
