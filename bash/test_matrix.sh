#!/usr/bin/env bash
# Tests with other libraries than the pinned ones. Each set is an environment of its own in a temporary folder (MATRIX names one to keep):
#   newest      the newest Python of this machine, and what `pip install .[test]` brings today: the default tests
#   lowest      Python 3.11 and the lowest versions that pyproject.toml declares: the default tests
#   plain3.12   that Python and what `pip install .` brings: the help, a conversion, an epoch of training
# ./bash/test_matrix.sh runs them all, two at once, and says which Python is not here; ./bash/test_matrix.sh lowest plain3.11 these
# (`plain` stands for all of its kind).
set -euo pipefail
set -m # each lane is a group of processes, which ends as one
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
pythons=(3.14 3.13 3.12 3.11)
# Nothing of this shell leaks into an environment: what is tested is what pip installed there.
unset PYTHONPATH PIP_CONSTRAINT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} UV_PYTHON_DOWNLOADS=never PIP_DISABLE_PIP_VERSION_CHECK=1

if [ -n "${MATRIX:-}" ]; then
  mkdir -p "$MATRIX"
  folder=$(cd "$MATRIX" && pwd)
else
  folder=$(mktemp -d)
fi
clean() {
  local group
  for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done
  [ -n "${MATRIX:-}" ] || rm -rf "$folder"
}
trap clean EXIT
trap 'exit 143' INT TERM

# The interpreter of a version: on the path (a shim of pyenv may be there and not work), or among pyenv's versions.
interpreter() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/"python$1"; do
    if "$candidate" -c '' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# environment NAME PYTHON: an empty one, at $folder/NAME
environment() { [ -x "$folder/$1/bin/python" ] || "$(interpreter "$2")" -m venv "$folder/$1"; }
# install NAME ...: with plain pip
install() { "$folder/$1/bin/python" -m pip install -qq "${@:2}"; }

# What a user does first, away from the source tree, so that the installed package is what runs.
first_steps() {
  local sedd=$folder/$1/bin/sedd cells
  cells=$(mktemp -d "$folder/cells.XXXXXX")
  cp data/pbmc3k.h5ad "$cells"
  (
    cd "$cells"
    "$sedd" --help >/dev/null
    "$sedd" convert pbmc3k.h5ad pbmc3k.zarr
    "$sedd" train --data_path pbmc3k.h5ad --checkpoint_dir run --num_epochs 1 --hidden_dim 16 --num_layers 1 --num_heads 2
  )
  rm -rf "$cells"
}

default_tests() {
  # Numba's cache in the tree is of other versions.
  NUMBA_CACHE_DIR=$folder/$1/numba "$folder/$1/bin/python" -m pytest -o cache_dir="$folder/$1/pytest" -q
}

run_newest() {
  environment newest "$newest"
  install newest .
  first_steps newest
  install newest '.[test]'
  default_tests newest
}

run_lowest() {
  environment uv 3.11
  install uv uv
  "$folder/uv/bin/uv" pip compile --quiet --resolution lowest-direct --python-version 3.11 --extra test --no-annotate \
    pyproject.toml --output-file "$folder/lowest.txt"
  environment lowest 3.11
  install lowest --constraint "$folder/lowest.txt" '.[test]'
  default_tests lowest
}

run_plain() {
  environment "plain$1" "$1"
  install "plain$1" .
  first_steps "plain$1"
}

# lane SET ...: one after the other; says how each went, and goes on with the next
lane() {
  local set began log failed=0
  for set in "$@"; do
    began=$SECONDS
    log=$folder/$set.log
    # In a shell of its own: `set -e` does not hold inside a condition.
    ("run_${set%%3.*}" "${set#plain}") >"$log" 2>&1 &
    if wait $!; then
      echo "matrix: $set passed in $((SECONDS - began)) s: $(tail -n 1 "$log")"
    else
      echo "matrix: $set failed after $((SECONDS - began)) s:"
      tail -n 150 "$log"
      failed=1
    fi
    [ -n "${MATRIX:-}" ] || rm -rf "${folder:?}/$set" # gigabytes
  done
  return "$failed"
}

newest=
plain=()
for version in "${pythons[@]}"; do
  if ! interpreter "$version" >/dev/null; then
    echo "matrix: no Python $version on this machine: nothing is tested with it."
  elif [ -z "$newest" ]; then
    newest=$version
  else
    plain+=("plain$version")
  fi
done
[ -n "$newest" ] || exit 1
echo "matrix: the newest Python is $newest."
lowest=()
if interpreter 3.11 >/dev/null; then
  lowest=(lowest)
else
  echo "matrix: the lowest declared versions are not tested."
fi

if [ $# -gt 0 ]; then
  wanted=()
  for set in "$@"; do
    if [ "$set" = plain ]; then wanted+=("${plain[@]}"); else wanted+=("$set"); fi
  done
  lane "${wanted[@]}"
  exit
fi
lane newest &
first=$!
failed=0
lane "${lowest[@]}" "${plain[@]}" || failed=1
wait "$first" || failed=1
exit "$failed"
