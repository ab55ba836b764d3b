"""What those processes run."""

from __future__ import annotations

import warnings
from typing import Any


def run(source: str, output: str, options: dict[str, Any]) -> None:
    """Convert; warnings about the made-up cells are not the point."""
    from sedd.io.convert import convert

    warnings.simplefilter("ignore")
    convert(source, output, progress=False, **options)


def run_and_tell(source: str, output: str, options: dict[str, Any], pipe: Any) -> None:
    """Convert, and send "done" or the error."""
    try:
        run(source, output, options)
        pipe.send("done")
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
