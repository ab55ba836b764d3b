#!/usr/bin/env bash
# Builds wheel and sdist into dist/, checks them, the conda recipe and the workflows, and tries both in an environment of their own, away from the source tree: a short
# quick run and a notebook from the wheel, with the cells that are in it, and tests from the sdist. PYTHON names the interpreter. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PIP_CONSTRAINT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_DISABLE_PIP_VERSION_CHECK=1

python=${PYTHON:-python3}
constraints=$PWD/constraints/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
[ -e "$constraints" ] || { echo "package: no $constraints; set PYTHON to another interpreter" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
install() { "$folder/$1/bin/python" -m pip install --quiet "${@:2}"; }

"$python" -m venv "$folder/tools"
install tools --upgrade pip # an older one does not know of groups
install tools --group package
rm -rf dist
"$folder/tools/bin/python" -m build --outdir dist . >/dev/null
"$folder/tools/bin/twine" check --strict dist/*
"$folder/tools/bin/python" - <<'RECIPE' # rendered as for a build; building needs a channel
from rattler_build import Stage0Recipe

for one in Stage0Recipe.from_file("recipe/recipe.yaml").render():
    print("recipe:", one.recipe.package.name, one.recipe.package.version, one.recipe.build.noarch)
RECIPE
if [ -d .github ]; then "$folder/tools/bin/zizmor" --offline --no-progress .github; fi

"$python" -m venv "$folder/user"
install user "torch==${TORCH:-2.13.0}"
install user --constraint "$constraints" dist/*.whl
(
  cd "$folder"
  user/bin/sedd quick -o quick --num_epochs 1 --min_steps 0 --hidden_dim 16 --num_layers 1 --num_heads 2
  test -s quick/report.html
)
# What a stranger does: the notebook of ten lines, with the wheel and no source tree. Its figures are kept in build/notebook.
install user --constraint "$constraints" ipykernel nbclient
cp docs/tutorials/ten-lines.ipynb tools/execute_notebook.py "$folder"
(cd "$folder" && user/bin/python execute_notebook.py ten-lines.ipynb figures)
test -s "$folder/figures/figure1.png"
rm -rf build/notebook && mkdir -p build && cp -r "$folder/figures" build/notebook

tar -xzf dist/*.tar.gz -C "$folder"
source=$(echo "$folder"/sedd-*)
install user --constraint "$constraints" --force-reinstall --no-deps "$source"
install user --constraint "$constraints" "$source[test]"
cd "$source"
tests=("$@")
[ $# -gt 0 ] || tests=(tests/test_*.py tests/metrics tests/report tests/inference)
"$folder/user/bin/pytest" -q "${tests[@]}"
