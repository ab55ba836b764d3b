"""The settings of a conversion and of a training run: frozen dataclasses, one per concern, checked on construction.

The command line of `train.py` is made from these classes (a field is a flag, the string under it is its help), and
`args.json` is `TrainConfig.to_flat`, so a setting, its default, its meaning and its check exist once.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from sedd.errors import SettingError
from sedd.options import check_seed, parse_bytes, recorded_path

MODEL_SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_dim": 128, "num_layers": 4, "num_heads": 4},
    "medium": {"hidden_dim": 256, "num_layers": 6, "num_heads": 8},
    "large": {"hidden_dim": 512, "num_layers": 12, "num_heads": 16},
}
TRAINING_DEFAULTS: dict[str, dict[str, Any]] = {
    "small": {"batch_size": 32, "learning_rate": 1e-4},
    "medium": {"batch_size": 32, "learning_rate": 5e-4},
    "large": {"batch_size": 64, "learning_rate": 2e-4},
}
"""What each size trains with for a hundred epochs without trouble: docs/tuning.md has the curves."""

GPU_BATCH = {"small": 1024, "medium": 1024, "large": 512}
"""Cells per step and process that keep a GPU busy, where they are many; docs/tuning.md says what of this was tried."""
GPU_STEPS = 64
"""Steps of an epoch, at least, for which a GPU takes smaller batches."""
GPU_RATE = 5e-4
"""Up to it the learning rate rises with the square root of the batch (Malladi et al. 2022, arXiv:2205.10287)."""

LEAST_BUDGET = 64 << 20
"""Bytes that a conversion needs for data in flight, whatever its input."""

_WHERE = ("memory_budget", "workers", "scheduler", "slurm_workers")
"""Settings of where and how fast a store is made; it is the same store with others."""


def _require(ok: bool, flag: str, value: object, expected: str) -> None:
    if not ok:
        raise SettingError(f"--{flag} is {value!r}; expected {expected}.")


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """How an input is read: which of several matrices, by which names of genes, and without what."""

    modality: str | None = None
    """Modality of an .h5mu to take; of a 10x file the type of features (Gene Expression if not given)."""
    gene_names: str | None = None
    """Name genes by this column of var instead of its index, such as feature_name in files of CELLxGENE."""
    strip_version: bool = False
    """Take the versions off identifiers of genes: ENSG00000141510.18 becomes ENSG00000141510."""
    round: bool = False
    """Round fractions among counts, as SoupX or EM leave them, to the nearest whole number (halves to the even one)."""
    drop: tuple[str, ...] = ()
    """Leave out obsm, uns, or one of their elements or columns, such as obsm/airr or obs/notes."""

    def __post_init__(self) -> None:
        for name in self.drop:
            group, _, element = name.partition("/")
            if name not in ("obsm", "uns") and (group not in ("obs", "var", "obsm", "uns") or not element):
                raise SettingError(f"--drop {name!r}: expected obsm, uns, or an element of obs, var, obsm or uns, such as obsm/X_umap.")


@dataclass(frozen=True, kw_only=True)
class InputSettings(ReadingSettings):
    """What is taken of the inputs, and under which names."""

    layer: str | None = None
    """Take counts from this layer instead of X; X is the name of X itself."""
    raw: bool = False
    """Take counts from .raw."""
    keys: tuple[str, ...] = ()
    """Names of the inputs, in their order, for obs["source"]; their file names if not given."""
    join: Literal["inner", "outer"] = "inner"
    """Genes of several inputs: those that all have, or those that any has, which are unknown in cells of the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.raw:
            raise SettingError("give --layer or --raw, not both.")
        if len(set(self.keys)) < len(self.keys):
            raise SettingError(f"--keys {' '.join(self.keys)}: names the same input twice; expected a name of its own for each.")


@dataclass(frozen=True, kw_only=True)
class ConversionSettings(InputSettings):
    """What a store is made to hold, and on which machine."""

    genes: str | None = None
    """Keep only these genes, in this order: a file with one name a line (in Python also a list of names); all if not given."""
    gene_order: Literal["input", "frequent"] = "input"
    """input: genes in the order of the input, or of --genes. frequent: those seen in most cells first, which makes the store smaller."""
    obs: tuple[str, ...] = ()
    """Keep only these obs columns; all if not given."""
    keep_layers: tuple[str, ...] = ()
    """Keep these layers too, beside the matrix."""
    shuffle: bool = False
    """Permute all cells; their place in the input is kept in obs."""
    seed: int = 0
    """Seed of the permutation."""
    group_by: str | None = None
    """Store the cells of each label of this obs column together, such as perturbation, missing ones last; their place in the input is kept in obs."""
    codec: Literal["lz4", "zstd", "none"] = "lz4"
    """Compression of the store."""
    memory_budget: str = "1GiB"
    """Memory for data in flight, of all workers together."""
    workers: int | None = None
    """Threads; all cores if not given."""
    scheduler: str | None = None
    """Address of a dask.distributed scheduler whose workers convert; they must see the same files."""
    slurm_workers: int = 0
    """Have SLURM start this many Dask workers of one core, which convert (pip install 'sedd[slurm]')."""
    values: Literal["counts", "real"] = "counts"
    """counts: whole numbers, anything else is an error. real: keep real values as float32."""
    limit_cells: int | None = None
    """Convert only this many cells, the first ones; all if not given."""

    def __post_init__(self) -> None:
        for name, known in (("values", "counts or real"), ("gene_order", "input or frequent")):
            if getattr(self, name) not in known.split(" or "):
                raise SettingError(f"{name} must be {known}, not {getattr(self, name)!r}.")
        super().__post_init__()
        check_seed(self.seed)
        if self.round and self.values == "real":
            raise SettingError("--round makes whole numbers and --values real keeps fractions; leave one of them out.")
        if self.raw and self.keep_layers:
            raise SettingError(f"--raw has other genes than the layers; {', '.join(self.keep_layers)} cannot be kept beside it.")
        if self.slurm_workers and self.scheduler is not None:
            raise SettingError("--slurm_workers starts a Dask scheduler of its own; leave it or --scheduler out.")
        if self.slurm_workers < 0:
            raise SettingError(f"--slurm_workers must be 0 or more, not {self.slurm_workers}.")
        if self.budget < LEAST_BUDGET:
            raise SettingError(f"--memory_budget is {self.memory_budget}; expected at least {LEAST_BUDGET >> 20}MiB.")
        if self.limit_cells is not None and self.limit_cells < 1:
            raise SettingError(f"the number of cells must be positive, not {self.limit_cells}.")
        if self.group_by is not None:
            if self.shuffle:
                raise SettingError("--shuffle spreads the cells that --group_by puts together; leave one of them out.")
            if (self.obs and self.group_by not in self.obs) or f"obs/{self.group_by}" in self.drop:
                raise SettingError(f"--group_by {self.group_by}: the column is left out; name it in --obs, and not in --drop.")
        if self.codec not in ("lz4", "zstd", "none"):
            raise SettingError(f"there is no codec {self.codec!r}; choose one of lz4, zstd, none.")

    @property
    def budget(self) -> int:
        """Bytes that all workers together may hold."""
        return parse_bytes(self.memory_budget)

    def of_the_store(self) -> dict[str, Any]:
        """Return what the contents of the store depend on, as JSON has it; of a file of genes its name."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if name not in _WHERE}
        lists = {"obs": list(self.obs) or None, **{name: list(getattr(self, name)) for name in ("keep_layers", "keys", "drop")}}
        return {**found, **lists, "seed": self.seed if self.shuffle else 0}


@dataclass(frozen=True, kw_only=True)
class DataConfig(InputSettings):
    """Which counts, and how they become tokens."""

    data_path: str | tuple[str, ...]
    """A .zarr store, or one or several inputs, which are converted once into a store and reused while they are unchanged: an
    .h5ad, an AnnData .zarr, an .h5mu, a 10x .h5 or matrix.mtx folder, or a .loom."""
    cache_dir: str | None = None
    """Where the store that is made of inputs is kept; beside the first of them if not given."""
    genes: str | None = "2000"
    """The genes to model: a number N (the N most variable, seurat_v3 on the training cells), a file with one name a
    line, or `all`."""
    binning: Literal["auto", "counts", "identity", "linear", "log", "quantile"] = "auto"
    """What a value is. auto: a count (with --graph uniform: identity). identity: the number of a bin. linear, log, quantile: bins."""
    num_bins: int = 100
    """Number of bins, where there are any."""
    val_fraction: float = 0.1
    """Share of the cells held out for validation."""
    val_cells: int = 20_000
    """Validate with at most this many cells, whatever their share; the others are trained on."""
    limit_cells: int | None = None
    """Use only this many cells (a random subset), for a quick look; all if not given."""
    memory_budget: str = "2GiB"
    """Memory for the loader's windows of decoded cells, per process."""
    loader_threads: int = 2
    """Threads that read, decode and tokenise ahead of the model, per process."""
    masks_on: Literal["auto", "loader", "device"] = "auto"
    """Where the genes to hide are drawn, with the same result. auto: on the GPU if there is one, else by the loader's threads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.data_path, str):  # one path is kept as such
            paths = tuple(map(str, self.data_path)) if isinstance(self.data_path, list | tuple) else (str(self.data_path),)
            object.__setattr__(self, "data_path", paths[0] if len(paths) == 1 else paths)
        _require(bool(self.data_path), "data_path", self.data_path, "at least one file or store")
        _require(self.num_bins >= 2, "num_bins", self.num_bins, "at least 2")
        _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "a share between 0 and 1")
        _require(self.val_cells >= 1, "val_cells", self.val_cells, "at least 1")
        _require(self.limit_cells is None or self.limit_cells >= 2, "limit_cells", self.limit_cells, "at least 2")
        _require(self.loader_threads >= 1, "loader_threads", self.loader_threads, "at least 1")

    @property
    def paths(self) -> tuple[str, ...]:
        """All inputs, or the store."""
        return (self.data_path,) if isinstance(self.data_path, str) else self.data_path

    @property
    def named(self) -> str:
        """What messages call the data."""
        return " ".join(self.paths)

    def of_inputs(self) -> dict[str, Any]:
        """Return what is taken of the inputs, as keywords of `sedd.io.convert.ensure_store`."""
        return {own.name: getattr(self, own.name) for own in dataclasses.fields(InputSettings)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and the diffusion it is trained for."""

    model: Literal["small", "medium", "large"] = "small"
    """Preset of width, depth and heads: small 128/4/4, medium 256/6/8, large 512/12/16; and of batch size and learning rate."""
    hidden_dim: int | None = None
    """Width of the network; from --model if not given (small: 128)."""
    num_layers: int | None = None
    """Number of layers; from --model if not given (small: 4)."""
    num_heads: int | None = None
    """Number of attention heads; from --model if not given (small: 4)."""
    dropout: float = 0.1
    """Dropout probability."""
    attention: Literal["latent", "full"] = "latent"
    """latent: learned latents read the genes, cost linear in genes. full: attention over all gene tokens, quadratic."""
    num_latents: int = 1
    """Number of latents (latent attention only)."""
    graph: Literal["absorbing", "uniform"] = "absorbing"
    """How noise destroys a value. absorbing: it is masked. uniform: it is replaced by a random one; such a model generates
    cells and has a likelihood, but cannot impute or denoise."""
    noise: Literal["loglinear", "geometric"] = "loglinear"
    """Noise schedule sigma(t)."""
    objective: Literal["score_entropy", "masked"] = "score_entropy"
    """score_entropy: the diffusion bound over all noise levels. masked: cross-entropy with --mask_ratio genes hidden."""
    mask_ratio: float = 0.15
    """Share of a cell's genes hidden in the `masked` objective and in validation's recovery metric."""
    condition: tuple[str, ...] = ()
    """Categorical obs columns to condition on, such as cell_type or donor; a label that is missing or hidden is predicted."""
    condition_library_size: bool = False
    """Condition on the log of a cell's total count over the panel."""
    condition_dropout: float = 0.1
    """Probability of hiding a cell's conditions in training, for classifier-free guidance; labels and total are hidden together
    and, as often, apart."""
    gene_embeddings: str | None = None
    """Pretrained gene vectors, projected into the model: a .npz with `genes` and `vectors`, or a .csv/.tsv of gene, values."""

    def __post_init__(self) -> None:
        for name, value in MODEL_SIZES[self.model].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        assert self.hidden_dim is not None and self.num_heads is not None
        if self.hidden_dim % self.num_heads:
            fits = [h for h in range(1, self.hidden_dim + 1) if self.hidden_dim % h == 0 and h <= 2 * self.num_heads]
            raise SettingError(
                f"--hidden_dim {self.hidden_dim} is not divisible by --num_heads {self.num_heads}; expected a whole number of "
                f"channels per head. Use --num_heads {fits[-1]} or another --hidden_dim."
            )
        if self.graph == "uniform" and self.objective == "masked":
            raise SettingError("--objective masked hides genes and --graph uniform hides none; expected --graph absorbing with it.")
        _require(0 < self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "a share between 0 and 1, such as 0.15")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "a probability below 1")
        _require(0 <= self.condition_dropout < 1, "condition_dropout", self.condition_dropout, "a probability below 1")
        _require(self.num_latents >= 1, "num_latents", self.num_latents, "at least 1")
        written = {*self.condition, *(f"{one}_probability" for one in self.condition)}  # by annotate
        _require(len(written) == 2 * len(self.condition), "condition", self.condition, "each column once, and no X_probability beside X")

    @property
    def answers_labels(self) -> bool:
        """Whether labels are hidden and predicted as genes are; the uniform graph hides nothing."""
        return bool(self.condition) and self.graph == "absorbing"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the weights are fitted."""

    num_epochs: int = 100
    """Passes over the training cells."""
    min_steps: int = 0
    """Take at least this many steps: few cells are then passed over more often than --num_epochs says."""
    batch_size: int | None = None
    """Cells per step and process; from --model if not given (small and medium: 32, large: 64; on a GPU up to 1,024 and 512, of many cells)."""
    learning_rate: float | None = None
    """Learning rate of AdamW, constant after the warm-up, for the laws of genes. The network gets five times as much (less beyond 128 channels, in
    proportion), the vectors of genes ten times, the laws of labels twenty times. From --model if not given (small: 1e-4, medium: 5e-4, large: 2e-4; on a GPU more, with the batch)."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on matrices only."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    ema_decay: float = 0.999
    """Decay per step of the averaged weights that are validated and used; 0 turns averaging off."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up before a step."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Arithmetic of the network; weights and loss stay float32."""
    compile: bool = False
    """Compile the network with torch.compile."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name in ("min_steps", "warmup_steps", "weight_decay", "grad_clip"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.learning_rate is None or self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "a decay between 0 and 1, such as 0.999")

    def epochs_of(self, n_batches: int) -> int:
        """Return how many epochs to train, given the batches of one."""
        return max(self.num_epochs, -(-self.min_steps // max(1, -(-n_batches // self.gradient_accumulation_steps))))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it is followed."""

    checkpoint_dir: str = "experiments/rnaseq_diffusion"
    """Directory of the run: checkpoints, args.json, history.json, metrics.jsonl."""
    resume: str | None = None
    """Resume from this checkpoint file or directory of a run; `auto` finds the newest whole one in --checkpoint_dir, and
    starts anew where there is none yet."""
    overwrite: bool = False
    """Start anew in a directory that holds a run, deleting that run."""
    seed: int = 0
    """Seed of the split, the order of cells, the masks and the weights."""
    num_threads: int = 0
    """CPU threads for the network, per process; 0 leaves torch's choice."""
    checkpoint_every: str | None = None
    """Also save a checkpoint every so many steps (`500`) or minutes (`10min`); after epochs only if not given."""
    keep_checkpoints: int = 3
    """How many of the checkpoints of --checkpoint_every to keep."""
    early_stopping: int = 0
    """Stop after this many epochs without a better validation loss; 0 never stops early."""
    log_with: Literal["auto", "tensorboard", "wandb", "none"] = "auto"
    """Where the curves go besides history.json; auto: tensorboard if it is installed. wandb writes files for `wandb sync`,
    unless WANDB_MODE=online."""
    progress: bool = True
    """Show bars, and a line after each epoch; the curves are in files in any case."""
    dry_run: bool = False
    """Say parameters, memory, steps and time, and train nothing."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        _require(self.num_threads >= 0, "num_threads", self.num_threads, "0 or more")
        _require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "at least 1")
        _require(self.early_stopping >= 0, "early_stopping", self.early_stopping, "0 or more")
        self.checkpoint_interval()

    def checkpoint_interval(self) -> tuple[int | None, float | None]:
        """`checkpoint_every` as (steps, seconds), one of which is None, or both."""
        text = self.checkpoint_every
        if text is None:
            return None, None
        try:
            if text.endswith("min") and float(text[:-3]) > 0:
                return None, 60 * float(text[:-3])
            if int(text) > 0:
                return int(text), None
        except ValueError:
            pass
        raise SettingError(f"--checkpoint_every is {text!r}; expected steps such as 500 or minutes such as 10min.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a score-entropy diffusion model on single-cell counts."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def batch_size(self) -> int:
        """Cells per step and process; as on a CPU where that is not settled."""
        return int(self.optim.batch_size or TRAINING_DEFAULTS[self.model.model]["batch_size"])

    @property
    def learning_rate(self) -> float:
        """Learning rate after the warm-up; as on a CPU where that is not settled."""
        return float(self.optim.learning_rate or TRAINING_DEFAULTS[self.model.model]["learning_rate"])

    def settled(self, *, on_gpu: bool, n_cells: int) -> TrainConfig:
        """Return the settings with batch size and learning rate, where they were not given, for a device and so many training cells of a process."""
        batch, rate = self.batch_size, self.learning_rate
        if on_gpu and self.optim.batch_size is None:
            fits = 1 << max(1, n_cells // GPU_STEPS).bit_length() - 1  # a power of two
            batch = max(batch, min(GPU_BATCH[self.model.model], fits))
        if on_gpu and self.optim.learning_rate is None:
            times = (batch / TRAINING_DEFAULTS[self.model.model]["batch_size"]) ** 0.5
            rate = float(f"{max(rate, min(GPU_RATE, rate * times)):.2g}")
        return dataclasses.replace(self, optim=dataclasses.replace(self.optim, batch_size=batch, learning_rate=rate))

    def to_flat(self) -> dict[str, Any]:
        """All settings as one dictionary of flag name to plain value, as in args.json; paths without what is private in them."""
        flat = {k: v for part in dataclasses.asdict(self).values() for k, v in part.items()}
        flat |= {"batch_size": self.batch_size, "learning_rate": self.learning_rate}
        for name in PATHS:
            value = flat[name]
            flat[name] = tuple(map(recorded_path, value)) if isinstance(value, tuple) else value and recorded_path(value)
        return flat

    @classmethod
    def from_flat(cls, flat: dict[str, Any]) -> TrainConfig:
        """Return the inverse of `to_flat`; missing settings take their defaults.

        Raises
        ------
        UserError
            If a name is not a setting.
        """
        parts: dict[str, dict[str, Any]] = {}
        left = dict(flat)
        for name, section in SECTIONS.items():
            parts[name] = {f.name: left.pop(f.name) for f in dataclasses.fields(section) if f.name in left}
        if left:
            raise SettingError(f"unknown settings {sorted(left)}; `sedd train --help` lists those there are.")
        for part in parts.values():  # JSON knows no tuples
            part.update({name: tuple(value) for name, value in part.items() if isinstance(value, list)})
            for name in PATHS.intersection(part):
                value = part[name]
                part[name] = tuple(map(os.path.expanduser, value)) if isinstance(value, tuple) else value and os.path.expanduser(value)
        return cls(**{name: section(**parts[name]) for name, section in SECTIONS.items()})


PATHS = {"data_path", "cache_dir", "genes", "gene_embeddings", "checkpoint_dir", "resume"}
SECTIONS: dict[str, Any] = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "run": RunConfig}


def bound_is_given(settings: dict[str, Any]) -> str:
    """Return what a run's bound of a validation cell is given of it: `nothing`, or as `cell_type, total`.

    Parameters
    ----------
    settings
        The flat settings of a run, as in args.json; what is not there counts as not given.
    """
    given = [*map(str, settings.get("condition") or ()), *(["total"] if settings.get("condition_library_size") else [])]
    return ", ".join(given) or "nothing"
