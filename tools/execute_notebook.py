"""Executes a notebook as a user would, prints what it prints and saves its figures; an error in a cell ends it.

    python tools/execute_notebook.py NOTEBOOK.ipynb FOLDER_FOR_FIGURES

It imports nothing of sedd, so bash/package.sh runs it where only a wheel is installed (with ipykernel and nbclient).
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    """Execute it where it stands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=Path, help="an .ipynb; the file is not changed")
    parser.add_argument("figures", type=Path, help="folder for the figures, as PNG")
    words = parser.parse_args()
    notebook = nbformat.read(words.notebook, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(words.notebook.resolve().parent)}}).execute()
    words.figures.mkdir(parents=True, exist_ok=True)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                number = len(list(words.figures.glob("*.png"))) + 1
                (words.figures / f"figure{number}.png").write_bytes(base64.b64decode(data["image/png"]))
            elif output.get("name") != "stderr":
                print(output.get("text") or data.get("text/plain", ""))
    print(f"{len(list(words.figures.glob('*.png')))} figures: {words.figures}")


if __name__ == "__main__":
    main()
