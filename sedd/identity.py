"""What determines the result of a task, short enough to compare: the model, the cells, what was asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import anndata as ad

from sedd import __version__
from sedd.cells import obs_digest
from sedd.errors import UserError
from sedd.io.files import fingerprint
from sedd.pretrained import Pretrained

_METADATA = ("zarr.json", ".zmetadata", ".zgroup")  # of a store; rewritten whenever the store is


def identity(
    model: Pretrained, data: ad.AnnData | str | Path | None, output: str | Path | None, resume: bool, **settings: Any
) -> dict[str, Any]:
    """Name what a result is made from; empty when the result stays in memory, where nothing is gone on with.

    Parameters
    ----------
    model, data
        As a task gets them; None where the task takes no cells.
    output, resume
        Where the result goes, and whether it was begun.
    settings
        What was asked for, as JSON has it.

    Raises
    ------
    UserError
        If a result is to be gone on with and its cells are not in a file, so that nobody knows whether they are the same.
    """
    if output is None:
        return {}
    if resume and isinstance(data, ad.AnnData):
        raise UserError("resume needs the cells in a file, to know that they are those it was begun with; give a path.")
    named = {f"--{name}": value for name, value in settings.items()}
    return {"version": __version__, "model": _model(model), "data": _data(data), **named}


def _model(model: Pretrained) -> str:
    digest = hashlib.blake2b("\0".join(map(str, model.genes)).encode(), digest_size=16)
    for name, tensor in model.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _data(data: ad.AnnData | str | Path | None) -> str | None:
    if data is None:
        return None
    if isinstance(data, ad.AnnData):
        return obs_digest(data.obs_names)
    path = Path(data)
    if path.is_dir():
        path = next((path / name for name in _METADATA if (path / name).exists()), path)
    return None if not path.is_file() else fingerprint(str(path))
