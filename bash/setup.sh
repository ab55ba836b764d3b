#!/usr/bin/env bash
# Builds .venv with everything that training and the tests need, or does nothing when it is there and up to date.
# PYTHON names the interpreter (one that constraints/ has a file for); TORCH the version of torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
stamp="$venv/.sedd-ready"

# The constraints for an interpreter; fails where there are none.
constraints_of() {
  local file
  file=constraints/$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null).txt
  [ -e "$file" ] && echo "$file"
}

unusable() {
  local pinned
  pinned=$(cd constraints && echo *.txt)
  echo "setup: $1; sedd is pinned for Python ${pinned//.txt/}: set PYTHON=/path/to/one of those" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13 python3.14}; do
    if constraints_of "$candidate" >/dev/null; then
      echo "$candidate"
      return
    fi
  done
  unusable "${PYTHON:-no interpreter on the path} cannot be used"
}

python=$venv/bin/python
[ -x "$python" ] || python=$(find_python)
constraints=$(constraints_of "$python") || unusable "$venv was built with another Python (remove it to build it anew)"
wanted=$(cat pyproject.toml "$constraints" | cksum)
if [ -x "$venv/bin/sedd" ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
  exit 0
fi

echo "setup: building $venv with $("$python" --version), this takes a few minutes once" >&2
[ "$python" = "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
# torch first and by its version: left to the resolver it would come with gigabytes of CUDA where there is no GPU.
pip install "torch==${TORCH:-2.13.0}"
pip install --constraint "$constraints" --editable '.[test]'
cp "$constraints" "$venv/constraints.txt" # for who adds more to it
echo "$wanted" >"$stamp"
