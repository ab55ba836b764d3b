"""The commands of `sedd` besides `train`: a dataclass each, whose fields are its flags."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from sedd.errors import UserError
from sedd.processes import is_main

if TYPE_CHECKING:
    import anndata as ad

Output = Annotated[str, tyro.conf.arg(aliases=["-o"])]


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
    """Go on with a conversion that was stopped."""
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
        settings: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "paths"}
        settings["obs"], settings["keep_layers"] = list(self.obs) or None, list(self.keep_layers)
        if self.codec is None:
            del settings["codec"]
        store = convert(list(inputs), output, **settings)
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
            from sedd.io.store import store_facts

            print(format_facts(store_facts(str(path))))
            return 0
        from sedd.inference.pretrained import Pretrained

        print(Pretrained.load(path, device="cpu").describe())
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
class Impute:
    """Predict unobserved genes of cells from their observed ones."""

    checkpoint: Positional[str]
    """A checkpoint or an experiment directory."""
    data: Positional[str]
    """An .h5ad or a .zarr store of counts."""
    output: Output
    """The .h5ad or .zarr to write, a block of cells at a time."""
    predict: tuple[str, ...] = ()
    """Genes to predict in every cell."""
    hide: float = 0.0
    """Share of each cell's genes to hide and predict, to see how well it works; with neither, zeros are predicted."""
    cells: Literal["all", "train", "val"] = "all"
    """Which cells, for the data that the model was trained on."""
    layer: str | None = None
    """Take counts from this layer instead of X."""
    num_samples: int = 0
    """Also draw joint samples of the hidden genes, into layers sedd_sample_0, ..., sedd_mean and sedd_std."""
    num_steps: int = 64
    """Steps of the sampler that draws them."""
    sampler: Literal["analytic", "euler"] = "analytic"
    """Reverse process that draws them."""
    new_genes: tuple[str, ...] = ()
    """Genes of the data that the model was not trained on; it knows them by --gene_embeddings."""
    gene_embeddings: str | None = None
    """Vectors of the new genes, for a model trained with --gene_embeddings."""
    batch_size: int = 64
    """Cells at a time."""
    seed: int = 0
    """Seed of the hidden genes and the samples."""
    resume: bool = False
    """Go on with an output that this command began and did not finish."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> int:
        """Impute and write."""
        check_output(self.output, self.overwrite, self.resume)
        from sedd.tasks import impute

        names = (
            "predict",
            "hide",
            "cells",
            "layer",
            "num_samples",
            "num_steps",
            "sampler",
            "batch_size",
            "seed",
            "output",
            "resume",
        )
        _say_written(impute(_with_new_genes(self), self.data, **_given(self, *names)), self.output)
        return 0


@dataclass(frozen=True, kw_only=True)
class Denoise:
    """Replace counts by the rates behind them, as the whole cell tells them."""

    checkpoint: Positional[str]
    """A checkpoint or an experiment directory."""
    data: Positional[str]
    """An .h5ad or a .zarr store of counts."""
    output: Output
    """The .h5ad or .zarr to write, a block of cells at a time."""
    cells: Literal["all", "train", "val"] = "all"
    """Which cells, for the data that the model was trained on."""
    layer: str | None = None
    """Take counts from this layer instead of X."""
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
    num_steps: int = 64
    """Steps of the sampler that draws them."""
    sampler: Literal["analytic", "euler"] = "analytic"
    """Reverse process that draws them."""
    new_genes: tuple[str, ...] = ()
    """Genes of the data that the model was not trained on; it knows them by --gene_embeddings."""
    gene_embeddings: str | None = None
    """Vectors of the new genes, for a model trained with --gene_embeddings."""
    batch_size: int = 64
    """Cells at a time."""
    seed: int = 0
    """Seed of the partitions."""
    resume: bool = False
    """Go on with an output that this command began and did not finish."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> int:
        """Denoise and write."""
        check_output(self.output, self.overwrite, self.resume)
        from sedd.tasks import denoise

        names = ("cells", "layer", "rounds", "folds", "own_counts", "log1p", "num_samples", "num_steps", "sampler")
        settings = _given(self, *names, "batch_size", "seed", "output", "resume")
        _say_written(denoise(_with_new_genes(self), self.data, **settings), self.output)
        return 0


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Draw new cells from a model."""

    checkpoint: Positional[str]
    """A checkpoint or an experiment directory."""
    output: Output
    """The .h5ad or .zarr to write, a block of cells at a time."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 500
    """Number of cells."""
    where: tuple[str, ...] = ()
    """Labels to condition on, as COLUMN=LABEL, such as cell_type="B cell"."""
    library_size: float | None = None
    """Total count to ask for, in a model conditioned on it."""
    guidance: float = 1.0
    """Strength of classifier-free guidance; 1 is the conditional model."""
    num_steps: int = 128
    """Steps of the reverse process."""
    sampler: Literal["analytic", "euler"] = "analytic"
    """Reverse process."""
    temperature: float = 1.0
    """Below 1 sharpens the distribution of each draw."""
    order: Literal["random", "confidence"] = "random"
    """random: the reverse process. confidence: surest genes first, which is biased."""
    batch_size: int = 64
    """Cells at a time."""
    seed: int = 0
    """Seed of the draws."""
    resume: bool = False
    """Go on with an output that this command began and did not finish."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> int:
        """Generate and write."""
        check_output(self.output, self.overwrite, self.resume)
        where = {}
        for text in self.where:
            column, separator, label = text.partition("=")
            if not separator:
                raise UserError(f'--where {text!r}: expected COLUMN=LABEL, such as cell_type="B cell".')
            where[column] = label
        from sedd.tasks import generate

        names = (
            "library_size",
            "guidance",
            "num_steps",
            "sampler",
            "temperature",
            "order",
            "batch_size",
            "seed",
            "output",
            "resume",
        )
        _say_written(generate(self.checkpoint, self.n, where=where, **_given(self, *names)), self.output)
        return 0


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Put the network's state for each cell into obsm["X_sedd"]."""

    checkpoint: Positional[str]
    """A checkpoint or an experiment directory."""
    data: Positional[str]
    """An .h5ad or a .zarr store of counts."""
    output: Output
    """The .h5ad or .zarr to write."""
    cells: Literal["all", "train", "val"] = "all"
    """Which cells, for the data that the model was trained on."""
    layer: str | None = None
    """Take counts from this layer instead of X."""
    batch_size: int = 64
    """Cells at a time."""
    resume: bool = False
    """Go on with an output that this command began and did not finish."""
    overwrite: bool = False
    """Replace an existing output."""

    def run(self) -> int:
        """Embed and write."""
        check_output(self.output, self.overwrite, self.resume)
        from sedd.tasks import embed

        names = ("cells", "layer", "batch_size", "output", "resume")
        _say_written(embed(self.checkpoint, self.data, **_given(self, *names)), self.output)
        return 0


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure likelihood, imputation and generation beside baselines, and write a report."""

    checkpoint: Positional[str]
    """A checkpoint or an experiment directory."""
    data: Positional[str]
    """The data of the training run (its validation cells are used) or other cells on the same genes."""
    output: Output
    """Directory for metrics.json, steps.json and report.html."""
    cells: Literal["val", "all"] | None = None
    """Which cells; val for the data of the training run, else all."""
    layer: str | None = None
    """Take counts from this layer instead of X."""
    imputed: str | None = None
    """What `sedd impute --hide` made of the same cells; made anew if not given."""
    generated: str | None = None
    """What `sedd generate` made; made anew if not given."""
    hide: float | None = None
    """Share of genes to hide; the --mask_ratio of the training run if not given."""
    n_masks: int = 32
    """Masks per cell of the likelihood bound."""
    num_steps: int = 128
    """Steps of the sampler."""
    steps: tuple[int, ...] = (1, 4, 16)
    """Fewer steps to try, for the curve of quality against steps; --steps without a number draws none."""
    umap: bool = True
    """Draw a UMAP as well, where umap-learn is installed; it takes ten seconds or more."""
    batch_size: int = 64
    """Cells at a time."""
    seed: int = 0
    """Seed of the masks and the samples."""
    overwrite: bool = False
    """Replace what is there of these."""

    def run(self) -> int:
        """Evaluate, write the report and print the table."""
        directory = Path(self.output)
        for name in ("metrics.json", "steps.json", "report.html"):
            check_output(str(directory / name), self.overwrite)
        from sedd.evaluation.evaluate import evaluate
        from sedd.metrics import metrics_table, steps_table

        names = (
            "cells",
            "layer",
            "imputed",
            "generated",
            "hide",
            "n_masks",
            "num_steps",
            "steps",
            "umap",
            "batch_size",
            "seed",
        )
        found = evaluate(self.checkpoint, self.data, output=directory, **_given(self, *names))
        print(metrics_table(found.metrics))
        if found.steps:
            print(f"\n{steps_table(found.steps)}")
        low, high = found.metrics["likelihood"]["nats_per_cell"]["ci"]
        for note in found.notes:
            print(f"\n{note}")
        print(
            f"\nThe held-out NELBO lies between {low:.1f} and {high:.1f} nats per cell (95 % interval over cells and masks)."
        )
        print(f"\nreport: {found.report}")
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
class Export:
    """Write a trained model into a directory to hand on: safetensors, settings, panel and a model card."""

    checkpoint: Positional[str]
    """A checkpoint or an experiment directory."""
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


def _given(command: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(command, name) for name in names}


def _with_new_genes(command: Impute | Denoise) -> Any:
    """The model of the command, on the genes it was not trained on as well if any are named."""
    if not command.new_genes:
        return command.checkpoint
    if command.gene_embeddings is None:
        raise UserError("--new_genes needs --gene_embeddings FILE with their vectors.")
    from sedd.tasks import add_genes

    return add_genes(command.checkpoint, command.data, command.new_genes, command.gene_embeddings, layer=command.layer)


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


def check_output(path: str, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output that exists or was begun, and a directory that cannot be written, before any work is done."""
    from sedd.inference.output_parts import partial_folder

    if not is_main():  # the main process may have begun already
        return
    target = Path(path)
    if target.exists() and not overwrite:
        raise UserError(f"{path}: exists already; pass --overwrite to replace it, or another name.")
    begun = partial_folder(path)
    if begun.exists() and not (overwrite or resume):
        raise UserError(f"{begun}: holds what was begun; pass --resume to go on with it or --overwrite to start again.")
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path}: {parent} is not a directory that can be written; choose another output.")


def _say_written(result: ad.AnnData, path: str) -> None:
    if is_main():
        print(f"{path}: {result.n_obs} cells x {result.n_vars} genes")
