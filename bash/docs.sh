#!/usr/bin/env bash
# Builds the site into docs/_build/html, tutorials executed: a warning, a broken link or a name without a page is an error.
# Further arguments go to sphinx-build: ./bash/docs.sh -D nb_execution_mode=off builds without the tutorials' output, in half a minute.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./bash/setup.sh
if ! cmp -s .venv/.sedd-ready .venv/.sedd-docs-ready; then # once: an installation takes `sedd` away for a moment, from a test that runs beside this
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt --editable '.[docs]'
  cp .venv/.sedd-ready .venv/.sedd-docs-ready
fi
rm -rf docs/_build docs/reference/generated
.venv/bin/python -m sphinx -b html -W --keep-going -q -j 2 "$@" docs docs/_build/html
# On a phone, where a Chromium is installed: no page is too wide, the menu opens, the search finds.
SEDD_SITE=$PWD/docs/_build/html .venv/bin/python -m pytest -q -m slow tests/test_site.py
echo "docs: open docs/_build/html/index.html"
