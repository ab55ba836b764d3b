"""The commands of `sedd` besides `train`: a dataclass each, whose fields are its flags.

A setting that several commands have is a field of a class that they share. A command passes its settings by the signature
of the function that it calls (`given`), so nothing here lists them a second time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from sedd.errors import UserError
from sedd.processes import is_main

if TYPE_CHECKING:
    import anndata as ad

    from sedd.inference.pretrained import Pretrained


def given(command: Any, function: Callable[..., Any], **instead: Any) -> dict[str, Any]:
    """Choose those settings of a command that a function takes.

    Parameters
    ----------
    command
        A dataclass. A field that is None is left to the default of the function.
    function
        Its parameters name the fields to pass.
    instead
        Values in place of those of the fields, or for parameters that no field is named after.
    """
    taken = inspect.signature(function).parameters
    named = {field.name for field in fields(command)} & taken.keys() - instead.keys()
    return {name: value for name in named if (value := getattr(command, name)) is not None} | instead


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert .h5ad files into one store that training reads fast."""

    paths: Positional[tuple[str, ...]]
    """INPUT.h5ad [INPUT2.h5ad ...] OUTPUT.zarr"""
    layer: str | None = None
    """Take counts from this layer instead of X."""
    raw: bool = False
    """Take counts from .raw."""
    join: Literal["inner", "outer"] = "inner"
    """Genes of several inputs: those that all have, or those that any has."""
    genes: str | None = None
    """Keep only these genes: a file with one name a line."""
    obs: tuple[str, ...] = ()
    """Keep only these obs columns; all if none is named."""
    keep_layers: tuple[str, ...] = ()
    """Keep these layers too, beside the matrix."""
    shuffle: bool = False
    """Permute all cells; their place in the input is kept in obs."""
    seed: int = 0
    """Seed of the permutation."""
    codec: str | None = None
    """Compression of the store; a measured default if not given."""
    memory_budget: str = "1GiB"
    """Memory for data in flight."""
    workers: int | None = None
    """Threads; all cores if not given."""
    scheduler: str | None = None
    """Address of a dask.distributed scheduler whose workers convert."""
    slurm_workers: int = 0
    """Have SLURM start this many Dask workers of one core, which convert (pip install 'sedd[slurm]')."""
    values: Literal["counts", "real"] = "counts"
    """counts: whole numbers, anything else is an error. real: keep real values as float32."""
    resume: bool = False
    """Resume a conversion that was interrupted."""
    overwrite: bool = False
    """Replace an existing output."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""

    def run(self) -> int:
        """Convert and say what was made."""
        from sedd.io.convert import convert

        if len(self.paths) < 2:
            raise UserError("expected INPUT.h5ad [INPUT2.h5ad ...] OUTPUT.zarr; found fewer than two paths.")
        *inputs, output = self.paths
        store = convert(**given(self, convert, inputs=inputs, output=output, obs=list(self.obs) or None))
        if store is not None:
            print(f"{output}: {store.n_obs} cells x {store.n_vars} genes, {store.nnz} counts as {store.dtype}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Info:
    """Tell what is in a store, a checkpoint, an experiment directory or an exported model."""

    path: Positional[str]
    """A .zarr store, a .pt checkpoint, an experiment directory or that of an exported model."""

    def run(self) -> int:
        """Print it."""
        path = Path(self.path)
        if path.is_dir() and (path / "zarr.json").exists():
            from sedd.io.store import describe

            print(format_facts(describe(str(path))))
            return 0
        from sedd.inference.pretrained import Pretrained

        print(Pretrained.load(path, device="cpu").summary())
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Prove that a store is whole: every checksum, index and statistic, and its contents against the input."""

    store: Positional[str]
    """The .zarr store."""
    against: tuple[str, ...] = ()
    """The .h5ad files it was made from, in their order."""

    def run(self) -> int:
        """Verify and print the report."""
        from sedd.io.verify import verify

        print(format_facts(verify(self.store, against=list(self.against) or None, progress=True)))
        print("The store is whole" + (", and every entry is that of its input." if self.against else "."))
        return 0


@dataclass(frozen=True, kw_only=True)
class _OfModel:
    """What a command is given that uses a model."""

    checkpoint: Positional[str]
    """A checkpoint or an experiment directory."""


@dataclass(frozen=True, kw_only=True)
class _OfCells(_OfModel):
    """What it is given if it applies the model to cells."""

    data: Positional[str]
    """An .h5ad or a .zarr store of counts."""
    cells: Literal["all", "train", "val"] = "all"
    """Which cells, for the data that the model was trained on."""
    layer: str | None = None
    """Take counts from this layer instead of X."""


@dataclass(frozen=True, kw_only=True)
class _Makes:
    """What it is given if it makes something."""

    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """The .h5ad or .zarr to write, a block of cells at a time."""
    overwrite: bool = False
    """Replace an existing output."""
    batch_size: int = 64
    """Cells at a time."""


@dataclass(frozen=True, kw_only=True)
class _Writes(_Makes):
    """What it is given if it writes cells."""

    resume: bool = False
    """Resume an output that this command left unfinished."""

    def check(self) -> None:
        """Refuse an output that cannot be made, before any work is done."""
        from sedd.inference.output_parts import check_output

        check_output(self.output, overwrite=self.overwrite, resume=self.resume)

    def write(self, function: Callable[..., ad.AnnData], **instead: Any) -> int:
        """Call the function that makes the output, and say what was made."""
        made = function(**given(self, function, **instead))
        if is_main():
            print(f"{self.output}: {made.n_obs} cells x {made.n_vars} genes")
        return 0


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """What it is given if it draws counts."""

    seed: int = 0
    """Seed of all random choices."""
    num_steps: int = 64
    """Steps of the reverse process."""
    sampler: Literal["analytic", "euler"] = "analytic"
    """The reverse process that draws counts."""


@dataclass(frozen=True, kw_only=True)
class _Predicts(_Draws, _OfCells, _Writes):
    """What it is given if it predicts counts of cells."""

    new_genes: tuple[str, ...] = ()
    """Genes of the data that the model was not trained on; it knows them by --gene_embeddings."""
    gene_embeddings: str | None = None
    """Vectors of the new genes, for a model trained with --gene_embeddings."""

    def model(self) -> str | Pretrained:
        """Return the model, on the genes that it was not trained on as well if any are named."""
        if not self.new_genes:
            return self.checkpoint
        if self.gene_embeddings is None:
            raise UserError("--new_genes needs --gene_embeddings FILE with their vectors.")
        from sedd.tasks import add_genes

        return add_genes(**given(self, add_genes, model=self.checkpoint, genes=self.new_genes))


@dataclass(frozen=True, kw_only=True)
class Impute(_Predicts):
    """Predict unobserved genes of cells from their observed ones."""

    predict: tuple[str, ...] = ()
    """Genes to predict in every cell."""
    hide: float = 0.0
    """Share of each cell's genes to hide and predict, to see how well it works; with neither, zeros are predicted."""
    num_samples: int = 0
    """Also draw joint samples of the hidden genes, into layers sedd_sample_0, ..., sedd_mean and sedd_std."""

    def run(self) -> int:
        """Impute and write."""
        self.check()
        from sedd.tasks import impute

        return self.write(impute, model=self.model())


@dataclass(frozen=True, kw_only=True)
class Denoise(_Predicts):
    """Replace counts by the rates behind them, estimated from the whole cell."""

    rounds: int = 4
    """Random partitions of the genes to average over."""
    folds: int = 4
    """Parts of a partition; each is hidden once."""
    own_counts: bool = True
    """Whether a count has a say in its own denoised value; --no-own_counts leaves it to the other genes."""
    log1p: bool = False
    """Also give the expected log1p(CP10k), in the layer sedd_log1p."""
    num_samples: int = 0
    """Also draw every count this many times; mean and spread of the draws go into layers sedd_mean and sedd_std."""

    def run(self) -> int:
        """Denoise and write."""
        self.check()
        from sedd.tasks import denoise

        return self.write(denoise, model=self.model())


@dataclass(frozen=True, kw_only=True)
class Generate(_Draws, _Writes, _OfModel):
    """Draw new cells from a model."""

    num_steps: int = 128
    """Steps of the reverse process."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 500
    """Number of cells."""
    where: tuple[str, ...] = ()
    """Labels to condition on, as COLUMN=LABEL, such as cell_type="B cell"."""
    library_size: float | None = None
    """Total count to ask for, in a model conditioned on it."""
    guidance: float = 1.0
    """Strength of classifier-free guidance; 1 is the conditional model."""
    temperature: float = 1.0
    """Below 1 sharpens the distribution of each draw."""
    order: Literal["random", "confidence"] = "random"
    """random: the reverse process. confidence: surest genes first, which is biased."""

    def run(self) -> int:
        """Generate and write."""
        self.check()
        where = {}
        for text in self.where:
            column, separator, label = text.partition("=")
            if not separator:
                raise UserError(f'--where {text!r}: expected COLUMN=LABEL, such as cell_type="B cell".')
            where[column] = label
        from sedd.tasks import generate

        return self.write(generate, model=self.checkpoint, where=where)


@dataclass(frozen=True, kw_only=True)
class Embed(_OfCells, _Writes):
    """Put the network's state for each cell into obsm["X_sedd"]."""

    def run(self) -> int:
        """Embed and write."""
        self.check()
        from sedd.tasks import embed

        return self.write(embed, model=self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class Evaluate(_OfCells, _Makes):
    """Measure likelihood, imputation and generation beside baselines, and write a report."""

    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """Directory for metrics.json, steps.json and report.html."""
    data: Positional[str]
    """The data of the training run (its validation cells are used) or other cells on the same genes."""
    cells: Literal["val", "all"] | None = None  # type: ignore[assignment]
    """Which cells; val for the data of the training run, else all."""
    imputed: str | None = None
    """What `sedd impute --hide` made of the same cells; made anew if not given."""
    generated: str | None = None
    """What `sedd generate` made; made anew if not given."""
    hide: float | None = None
    """Share of genes to hide; the --mask_ratio of the training run if not given."""
    n_masks: int = 32
    """Masks per cell of the likelihood bound."""
    num_steps: int = 128
    """Steps of the reverse process."""
    steps: tuple[int, ...] = (1, 4, 16)
    """Fewer steps to try, for the curve of quality against steps; --steps without a number draws none."""
    umap: bool = True
    """Draw a UMAP as well, where umap-learn is installed; it takes ten seconds or more."""
    seed: int = 0
    """Seed of all random choices."""

    def run(self) -> int:
        """Evaluate, write the report and print the table."""
        from sedd.evaluation.evaluate import evaluate
        from sedd.inference.output_parts import check_output
        from sedd.metrics import metrics_table, steps_table

        for name in ("metrics.json", "steps.json", "report.html"):
            check_output(f"{self.output}/{name}", overwrite=self.overwrite)
        found = evaluate(**given(self, evaluate, model=self.checkpoint))
        low, high = found.metrics["likelihood"]["nats_per_cell"]["ci"]
        bound = f"between {low:.1f} and {high:.1f} nats per cell (95 % interval over cells and masks)"
        tables = [metrics_table(found.metrics), *([steps_table(found.steps)] if found.steps else [])]
        lines = [*tables, *found.notes, f"The held-out NELBO lies {bound}.", f"report: {found.report}"]
        print("\n\n".join(lines))
        return 0


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the experiments under a directory side by side."""

    directory: Positional[str] = "experiments"
    """Where the experiment directories are."""

    def run(self) -> int:
        """Print the table."""
        from sedd.training.directory import runs_table

        print(runs_table(self.directory))
        return 0


@dataclass(frozen=True, kw_only=True)
class Export(_OfModel):
    """Write a trained model into a directory to hand on: safetensors, settings, panel and a model card."""

    directory: Positional[str]
    """The directory to make; the other commands take it like a checkpoint."""
    overwrite: bool = False
    """Replace an exported model that is there."""

    def run(self) -> int:
        """Export and say where."""
        from sedd.inference.pretrained import Pretrained

        model = Pretrained.load(self.checkpoint, device="cpu")
        written = model.push_to_hub(self.directory, overwrite=self.overwrite)
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
