"""The commands of `sedd` besides `train`: a dataclass each, whose fields are its flags.

A command passes its settings on by the signature of the function that it calls (`given`), so no list of them is kept here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro
from tyro.conf import Positional

from sedd.config import ConversionSettings, ReadingSettings
from sedd.errors import MissingFileError, UserError, check_permitted, counted, without_secrets
from sedd.processes import is_main

if TYPE_CHECKING:
    import anndata as ad

Output = Annotated[str, tyro.conf.arg(aliases=["-o"])]


def called_by(command: Any) -> Callable[..., Any]:
    """Return the function that a command calls, imported now: its `calls` is MODULE:FUNCTION."""
    module, _, name = command.calls.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def given(command: Any, function: Callable[..., Any]) -> dict[str, Any]:
    """Return the fields of a command that are parameters of `function`, by name."""
    taken = inspect.signature(function).parameters
    return {field.name: getattr(command, field.name) for field in dataclasses.fields(command) if field.name in taken}


def labels_by_column(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """Return what a flag gives as COLUMN=LABEL, by column."""
    labels: dict[str, str] = {}
    for text in texts:
        column, separator, label = text.partition("=")
        if not separator:
            raise UserError(f'--{flag} {text!r}: expected COLUMN=LABEL, such as cell_type="B cell".')
        if labels.setdefault(column, label) != label:
            raise UserError(f"--{flag} gives {column} two labels, {labels[column]!r} and {label!r}; expected one. Run the command once for each.")
    return labels


@dataclass(frozen=True, kw_only=True)
class Convert(ConversionSettings):
    """Convert files of counts into one store that training reads fast."""

    paths: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATHS")]
    """INPUT.h5ad [INPUT2.h5ad ...] OUTPUT.zarr; also an AnnData .zarr, an .h5mu, a 10x .h5 or matrix.mtx folder, or a .loom."""
    resume: bool = False
    """Continue a conversion that was stopped."""
    overwrite: bool = False
    """Replace an existing output."""
    append: bool = False
    """Add the cells to the store OUTPUT.zarr, which is there, by its genes and settings; its full shards stay as they are."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    progress: bool = True
    """Show a bar of the cells that are done."""

    calls: ClassVar[str] = "sedd.io.convert:convert"

    def run(self) -> int:
        """Convert and say what was made."""
        if len(self.paths) < 2:
            raise UserError("expected INPUT.h5ad [INPUT2.h5ad ...] OUTPUT.zarr; found fewer than two paths.")
        *inputs, output = self.paths
        convert = called_by(self)
        store = convert(list(inputs), output, **given(self, convert))
        if store is not None:
            size = f"{counted(store.n_obs, 'cell')} x {counted(store.n_vars, 'gene')}"
            print(f"{without_secrets(str(output))}: {size}, {counted(store.nnz, 'count')} as {store.dtype}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Info:
    """Tell what is in a file of cells, a store, a checkpoint, the directory of a run or an exported model."""

    path: Annotated[Positional[str], tyro.conf.arg(metavar="PATH")]
    """A .zarr store, an input of any format, a .pt checkpoint, the directory of a run or that of an exported model."""

    def run(self) -> int:
        """Print it."""
        path = Path(self.path)
        check_permitted(self.path)
        if "://" not in self.path and not path.exists():
            raise MissingFileError(f"{path}: no such file or directory; expected cells, a store, a checkpoint, the directory of a run or of a model.")
        from sedd.io.convert import is_store
        from sedd.io.input.opening import is_input

        if "://" not in self.path and path.exists() and is_input(self.path) and not is_store(self.path):
            from sedd.io.conversion.describe import input_facts

            print(format_facts(input_facts(self.path)))
            return 0
        if is_store(self.path):
            from sedd.io.store import store_facts

            print(format_facts(store_facts(self.path)))
            return 0
        from sedd.inference.pretrained import Pretrained

        print(Pretrained.load(path, device="cpu").describe())
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Prove that a store is whole: every checksum, index and statistic, and its contents against the input."""

    store: Annotated[Positional[str], tyro.conf.arg(metavar="STORE")]
    """The .zarr store."""
    against: tuple[str, ...] = ()
    """The inputs it was made from, in their order; compare with nothing if not given."""
    workers: int | None = None
    """Threads; all cores if not given."""
    progress: bool = True
    """Show a bar of the cells that are done."""

    calls: ClassVar[str] = "sedd.io.verify:verify"

    def run(self) -> int:
        """Verify and print the report."""
        print(format_facts(called_by(self)(self.store, **{**given(self, called_by(self)), "against": list(self.against) or None})))
        print("The store is whole" + (", and every entry is that of its input." if self.against else "."))
        return 0


@dataclass(frozen=True, kw_only=True)
class _OfModel:
    """What every use of a model takes."""

    checkpoint: Annotated[Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint, the directory of a run, or an exported model."""
    batch_size: int = 256
    """Cells that the network is given at a time."""
    progress: bool = True
    """Show a bar of the cells that are done."""


@dataclass(frozen=True, kw_only=True)
class _Cells(ReadingSettings):
    """Which cells a model is applied to; where a flag of how they are read is not given, as the data of the training were."""

    data: Annotated[Positional[str], tyro.conf.arg(metavar="DATA")]
    """A .zarr store, or an input: an .h5ad, an AnnData .zarr, an .h5mu, a 10x .h5 or matrix.mtx folder, or a .loom."""
    cells: Literal["all", "train", "val"] = "all"
    """Which cells, for the data that the model was trained on."""
    layer: str | None = None
    """Take counts from this layer, or from X itself if it is X; if not given, from where the training data had them."""
    raw: bool = False
    """Take counts from .raw."""


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """The reverse process that draws joint samples."""

    num_samples: int = 0
    """Also draw every predicted count this many times; mean and spread of the draws go into layers sedd_mean and sedd_std,
    and the draws of impute into sedd_sample_0, ..."""
    num_steps: int = 32
    """Steps of the sampler that draws them."""
    sampler: Literal["analytic", "euler"] = "analytic"
    """Reverse process that draws them."""
    seed: int = 0
    """Seed of all random choices."""


@dataclass(frozen=True, kw_only=True)
class _Task(_OfModel):
    """A use of a model whose result is an AnnData file."""

    output: Output
    """The .h5ad or .zarr to write, a block of cells at a time."""
    resume: bool = False
    """Continue an output that this command left unfinished."""
    overwrite: bool = False
    """Replace an existing output."""

    calls: ClassVar[str]

    def settings(self) -> dict[str, Any]:
        """Keywords of the function that is called."""
        return given(self, called_by(self))

    def run(self) -> int:
        """Do the task and say what was written."""
        result: ad.AnnData = called_by(self)(self.checkpoint, **self.settings())
        if is_main():
            print(f"{self.output}: {counted(result.n_obs, 'cell')} x {counted(result.n_vars, 'gene')}")
        return 0


@dataclass(frozen=True, kw_only=True)
class _Prediction(_Draws, _Cells, _Task):
    """A task that may meet new genes."""

    new_genes: tuple[str, ...] = ()
    """Genes of the data that the model was not trained on; it knows them by --gene_embeddings."""
    gene_embeddings: str | None = None
    """Vectors of the new genes, for a model trained with --gene_embeddings."""


@dataclass(frozen=True, kw_only=True)
class Impute(_Prediction):
    """Predict unobserved genes of cells from their observed ones."""

    predict: tuple[str, ...] = ()
    """Genes to predict in every cell, whatever was counted of them."""
    hide: float = 0.0
    """Share of each cell's genes to hide and predict, to see how well it works; without --predict and --hide, zeros are predicted."""
    folds: int = 4
    """Parts of a random partition of the genes, each hidden once; used where zeros are predicted."""

    calls: ClassVar[str] = "sedd.tasks:impute"


@dataclass(frozen=True, kw_only=True)
class Denoise(_Prediction):
    """Replace counts by the rates behind them, estimated from the whole cell."""

    rounds: int = 4
    """Random partitions of the genes to average over."""
    folds: int = 4
    """Parts of a partition; each is hidden once."""
    own_counts: Literal["learned", "full", "none"] = "learned"
    """Weight of a count in its own denoised value. learned: as much as similar cells confirm. full: the most it can have. none: no weight."""
    similar_cells: Literal["learned", "none"] = "learned"
    """learned: a cell is averaged with cells in which its counts are about as probable, if --own_counts is learned. none: it is not."""
    log1p: bool = False
    """Also give the expected log1p(CP10k), in the layer sedd_log1p."""
    as_if: tuple[str, ...] = ()
    """Labels that all cells are given instead of their own, as COLUMN=LABEL, or COLUMN=average for the mean over all labels."""

    calls: ClassVar[str] = "sedd.tasks:denoise"

    def settings(self) -> dict[str, Any]:
        """Keywords for `denoise`, with the labels by column."""
        return {**super().settings(), "as_if": labels_by_column("as_if", self.as_if)}


@dataclass(frozen=True, kw_only=True)
class Generate(_Task):
    """Draw new cells from a model."""

    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 500
    """Number of cells."""
    where: tuple[str, ...] = ()
    """Labels to condition on, as COLUMN=LABEL, such as cell_type="B cell"."""
    library_size: float | None = None
    """Total count of each cell, in a model trained with --condition_library_size, which draws it if not given."""
    guidance: float = 1.0
    """Strength of classifier-free guidance; 1 is the conditional model."""
    num_steps: int = 32
    """Steps of the reverse process."""
    sampler: Literal["analytic", "euler"] = "analytic"
    """Reverse process."""
    temperature: float = 1.0
    """Below 1 sharpens the distribution of each draw, above 1 (up to 10) widens it."""
    order: Literal["random", "confidence"] = "random"
    """Order in which genes are drawn. random: that of the reverse process. confidence: the surest first, which is biased."""
    seed: int = 0
    """Seed of the draws."""

    calls: ClassVar[str] = "sedd.tasks:generate"

    def settings(self) -> dict[str, Any]:
        """Keywords for `generate`, with the labels by column."""
        return {**super().settings(), "where": labels_by_column("where", self.where)}


@dataclass(frozen=True, kw_only=True)
class Embed(_Cells, _Task):
    """Put the network's state for each cell into obsm["X_sedd"]."""

    without: tuple[str, ...] = ()
    """Condition columns, such as batch, that the embedding is to be without."""

    calls: ClassVar[str] = "sedd.tasks:embed"


@dataclass(frozen=True, kw_only=True)
class Annotate(_Cells, _Task):
    """Give cells the labels that a model was trained with, with their probabilities."""

    given: tuple[str, ...] = ()
    """Condition columns whose labels in the data the model is given; the others are predicted."""

    calls: ClassVar[str] = "sedd.inference.annotation:annotate"


@dataclass(frozen=True, kw_only=True)
class Score(_Cells, _Task):
    """Tell how improbable each cell is, in nats and among held-out cells of the same depth."""

    reference: str | None = None
    """Cells to compare with; the validation cells of the training run if not given."""
    given: tuple[str, ...] = ()
    """Condition columns whose labels in the data the model is given."""
    n_masks: int = 16
    """Masks per cell of the likelihood bound."""
    seed: int = 0
    """Seed of the masks."""

    calls: ClassVar[str] = "sedd.inference.scoring:score"


@dataclass(frozen=True, kw_only=True)
class Evaluate(ReadingSettings, _OfModel):
    """Measure likelihood, imputation and generation beside baselines, and write a report."""

    data: Annotated[Positional[str], tyro.conf.arg(metavar="DATA")]
    """The data of the training run (its validation cells are used) or other cells on the same genes."""
    output: Output
    """Directory for metrics.json, steps.json and report.html."""
    cells: Literal["val", "all"] | None = None
    """Which cells; if not given, val for the data of the training run, else all."""
    layer: str | None = None
    """Take counts from this layer, or from X itself if it is X; if not given, from where the training data had them."""
    raw: bool = False
    """Take counts from .raw."""
    imputed: str | None = None
    """What `sedd impute --hide` made of the same cells; made anew if not given."""
    generated: str | None = None
    """What `sedd generate` made; made anew if not given."""
    hide: float | None = None
    """Share of genes to hide; the --mask_ratio of the training run if not given."""
    n_masks: int = 32
    """Masks per cell of the likelihood bound."""
    max_cells: int = 20_000
    """Largest number of held-out cells, and of training cells for the baselines; of more, so many are drawn at random. Memory and time grow with it."""
    num_steps: int = 32
    """Steps of the sampler."""
    steps: tuple[int, ...] = (1, 4, 16)
    """Fewer steps to try, for the curve of quality against steps; --steps without a number draws none."""
    umap: bool = True
    """Draw a UMAP as well, where umap-learn is installed; it takes ten seconds or more."""
    seed: int = 0
    """Seed of the masks and the samples."""
    overwrite: bool = False
    """Replace these files where they are there."""

    calls: ClassVar[str] = "sedd.evaluation:evaluate"

    def run(self) -> int:
        """Evaluate, write the report and print the table."""
        from sedd.metrics import metrics_table, steps_table

        evaluate = called_by(self)
        found = evaluate(self.checkpoint, **given(self, evaluate))
        low, high = found.metrics["likelihood"]["nats_per_cell"]["ci"]
        bound = f"between {low:.1f} and {high:.1f} nats per cell (95 % interval over cells and masks)"
        tables = [metrics_table(found.metrics), *([steps_table(found.steps)] if found.steps else [])]
        print("\n\n".join([*tables, *found.notes, f"The held-out NELBO lies {bound}.", f"report: {found.report}"]))
        return 0


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs under a directory side by side."""

    directory: Annotated[Positional[str], tyro.conf.arg(metavar="DIRECTORY")] = "experiments"
    """Where the directories of runs are."""

    def run(self) -> int:
        """Print the table."""
        from sedd.training.directory import runs_table

        print(runs_table(self.directory))
        return 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained model into a directory to hand on: safetensors, settings, panel and a model card."""

    checkpoint: Annotated[Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint or the directory of a run."""
    directory: Annotated[Positional[str], tyro.conf.arg(metavar="DIRECTORY")]
    """The directory to make; the other commands take it like a checkpoint."""
    overwrite: bool = False
    """Replace an exported model that is there."""

    def run(self) -> int:
        """Export and say where."""
        from sedd.inference.pretrained import Pretrained

        model = Pretrained.load(self.checkpoint, device="cpu")
        written = model.save_pretrained(self.directory, overwrite=self.overwrite)
        print(f"{written}: {', '.join(sorted(path.name for path in written.iterdir()))} of {model.path}")
        return 0


COMMANDS: dict[str, Any] = {
    "convert": Convert,
    "info": Info,
    "verify": Verify,
    "impute": Impute,
    "denoise": Denoise,
    "generate": Generate,
    "embed": Embed,
    "annotate": Annotate,
    "score": Score,
    "evaluate": Evaluate,
    "runs": Runs,
    "export": Export,
}


def format_facts(facts: dict[str, Any], indent: str = "") -> str:
    """Named facts as aligned lines; a list of facts becomes indented blocks."""
    width = max(map(len, facts), default=0)
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", format_facts(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{name}:")
            lines += [format_facts(item, indent + "  ") for item in value]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            lines.append(f"{indent}{name.ljust(width)}  {text}")
    return "\n".join(lines)
