"""The quick run, as the words of four commands, and the files that come with sedd for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sedd.errors import MissingFileError, UserError

CHECKOUT = {"pbmc3k.h5ad": "data", "quick.yaml": "configs"}
"""Where a file stands in a checkout; a wheel has all of them in this folder."""


def shipped(name: str) -> Path:
    """Return the path of a file that comes with sedd.

    Parameters
    ----------
    name
        `pbmc3k.h5ad`, the 2,700 cells, or `quick.yaml`, the settings of the quick run.

    Raises
    ------
    UserError
        If no file of this name comes with sedd.
    MissingFileError
        If the installation lacks it.
    """
    if name not in CHECKOUT:
        raise UserError(f"name is {name!r}; expected one of {', '.join(CHECKOUT)}.")
    folder = Path(__file__).parent
    places = [folder / name, folder.parents[1] / CHECKOUT[name] / name]
    for place in places:
        if place.is_file():
            return place
    raise MissingFileError(f"this installation of sedd lacks {name}; expected {places[0]} or, in a checkout, {places[1]}. Install sedd again.")


@dataclass(frozen=True, kw_only=True)
class Quick:
    """Train, impute, generate and evaluate in a few minutes: on the cells that come with sedd, or on yours.

    Any flag of `sedd train` may follow, such as --num_epochs 1; it changes the training.
    """

    data_path: str | None = None
    """Your raw counts, in any format that `sedd train` takes; the 2,700 PBMC that come with sedd if not given."""
    layer: str | None = None
    """Take counts from this layer; from X if not given."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "experiments/quick"
    """Directory for the run, the imputed and the generated cells and the page report.html."""
    overwrite: bool = False
    """Replace what an earlier quick run left there."""

    def commands(self, training: Sequence[str] = ()) -> Iterator[list[str]]:
        """Yield the commands in their order, each as a list of words; `training` are more words for the first."""
        data = self.data_path or str(shipped("pbmc3k.h5ad"))
        layer = ["--layer", self.layer] if self.layer is not None else []
        replace = ["--overwrite"] if self.overwrite else []
        imputed, generated = f"{self.output}/imputed.h5ad", f"{self.output}/generated.h5ad"
        train = ["train", "--config", str(shipped("quick.yaml")), "--data_path", data, "--checkpoint_dir", self.output]
        yield [*train, *layer, *replace, *training]
        yield ["impute", self.output, data, "-o", imputed, "--cells", "val", "--hide", "0.15", *layer, *replace]
        yield ["generate", self.output, "-n", "500", "-o", generated, *replace]
        yield ["evaluate", self.output, data, "-o", self.output, "--imputed", imputed, "--generated", generated, *layer, *replace]
