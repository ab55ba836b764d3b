"""A trained model as its users meet it: the averaged weights with the genes, the binning and the split that belong to them."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from sedd import checkpoint
from sedd.binning import UNBOUNDED, Binning
from sedd.config import TrainConfig, bound_is_given
from sedd.errors import DamagedFileError, UserError, counted
from sedd.graph import AbsorbingGraph, UniformGraph, make_graph
from sedd.inference.export import is_part_of_export, read_export, write_export
from sedd.inference.hub import push
from sedd.io.loading.selection import label_text
from sedd.model import SEDDTransformer
from sedd.noise import Noise, make_noise
from sedd.processes import default_device
from sedd.sampling import AnalyticSampler, EulerSampler, make_sampler


@dataclass(frozen=True, repr=False)
class Pretrained:
    """A model ready to use.

    Attributes
    ----------
    path
        The checkpoint it came from.
    model
        On its device, in evaluation mode, with the averaged weights when there are any.
    genes : (n_vars,) str
        The panel, in the order of the model's genes.
    binning
        How counts become tokens and back.
    noise, graph
        The forward process that the model was trained for.
    categories
        For each condition column its labels; label k is condition k + 1.
    histogram : (n_vars, n_bins) int64
        How many training cells have each token of each gene.
    libraries : (q,) float32
        Quantiles of the training cells' total counts over the panel.
    state
        The rest of the checkpoint.
    run
        What keeps the temporary directory of the run that trained it, if it is in one: that is deleted with the model.
    """

    path: Path
    model: SEDDTransformer
    genes: np.ndarray
    binning: Binning
    noise: Noise
    graph: AbsorbingGraph | UniformGraph
    categories: dict[str, list[str]]
    histogram: sp.csr_array
    libraries: np.ndarray
    state: dict[str, Any]
    run: object = field(default=None, compare=False)

    def __repr__(self) -> str:
        """Show what `describe` tells, not the weights."""
        return self.describe()

    @property
    def config(self) -> TrainConfig:
        """The settings of the run."""
        return TrainConfig.from_flat(self.state["args"])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def sampler(self, name: str, **settings: Any) -> AnalyticSampler | EulerSampler:
        """Return the reverse process of the model (`sedd.sampling.make_sampler`)."""
        return make_sampler(name, self.model, self.graph, self.noise, **settings)

    @classmethod
    def load(cls, path: Pretrained | str | Path, *, device: str | torch.device | None = None) -> Pretrained:
        """Read the checkpoint that `path` names (`sedd.checkpoint.find`), or an exported model.

        Parameters
        ----------
        path
            A checkpoint, the directory of a run, that of an exported model, or a loaded model, which is returned unchanged.
        device
            Where to put the model; this process's GPU if there is one.

        Returns
        -------
        model : Pretrained

        Raises
        ------
        UserError
            If there is no checkpoint, or it is damaged.

        Examples
        --------
        >>> model = sedd.Pretrained.load("my_model")  # doctest: +SKIP
        """
        if isinstance(path, Pretrained):
            return path
        if not isinstance(path, str | os.PathLike):
            raise UserError(
                f"the model is a {type(path).__name__}; expected a checkpoint, the directory of a run or a loaded model, and the data after it."
            )
        if is_part_of_export(path):
            return cls._of(Path(path), read_export(path), device)
        file = checkpoint.find(path)
        return cls._of(file, checkpoint.load(file), device)

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model into a local directory that can be handed on: safetensors, settings, panel and a card.

        Parameters
        ----------
        directory
            Where to.
        overwrite
            Replace an exported model that is there.

        Returns
        -------
        directory

        Raises
        ------
        UserError
            If the directory exists and is not to be replaced, or if genes were added to the model.

        Examples
        --------
        >>> model.save_pretrained("my_model")  # doctest: +SKIP
        """
        if list(self.genes) != list(self.state["genes"]):
            raise UserError(f"{self.path}: genes were added to this model; export it as it was trained and add them after loading.")
        return write_export(
            self.state,
            self.model.state_dict(),
            directory,
            source=self.path,
            n_parameters=sum(p.numel() for p in self.model.parameters()),
            overwrite=overwrite,
        )

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the model to the Hugging Face Hub: the files that `save_pretrained` writes, which name no folder of yours.

        `sedd.Pretrained.load(huggingface_hub.snapshot_download(repo_id))` reads it elsewhere.

        Parameters
        ----------
        repo_id
            The repository, as in `"ada/blood"`. It is made if there is none; the files replace those of the same name.
        private
            Whether a new repository is seen by its owners alone. The visibility of one that is there stays.
        token
            Proof of who you are; that of `hf auth login` or of the variable `HF_TOKEN` if not given.

        Returns
        -------
        url
            Of the repository.

        Raises
        ------
        UserError
            If `huggingface_hub` is not installed, the upload failed, or genes were added to the model.

        Examples
        --------
        >>> model.push_to_hub("ada/blood")  # doctest: +SKIP
        """
        with tempfile.TemporaryDirectory(prefix="sedd-") as folder:
            return push(self.save_pretrained(Path(folder, "model")), repo_id, private=private, token=token)

    @classmethod
    def _of(cls, file: Path, state: dict[str, Any], device: str | torch.device | None) -> Pretrained:
        device = device or default_device()
        try:
            model = _built(state["model_config"], state["model"])
            model.load_state_dict(state["model"])
            if state["ema"] is not None:
                model.load_state_dict(state["ema"]["average"], strict=False)
            binning = Binning.from_dict(state["binning"])
            histogram = checkpoint.unpack_histogram(state["histogram"])
            genes = np.array([str(name) for name in state["genes"]], dtype=object)
            if not genes.size == model.n_vars == histogram.shape[0]:
                raise ValueError(f"{genes.size} genes and {histogram.shape[0]} histograms for a network of {model.n_vars}")
            if [len(labels) for labels in state["categories"].values()] != model.config["condition_sizes"]:
                raise ValueError("it has other numbers of labels")
            return cls(
                path=file,
                model=model.to(device).eval(),
                genes=genes,
                binning=binning,
                noise=make_noise(state["args"]["noise"]),
                graph=make_graph(state["args"].get("graph", "absorbing"), binning.n_bins),
                categories=state["categories"],
                histogram=histogram,
                libraries=state["libraries"].numpy(),
                state=state,
            )
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise DamagedFileError(f"{file}: the weights do not fit the model it describes ({reason[:200]}). Copy it again, or export it again.") from error

    @property
    def knows_masks(self) -> bool:
        """Whether it was trained to predict hidden genes, as under the absorbing graph."""
        return isinstance(self.graph, AbsorbingGraph)

    def check_knows_masks(self, wanted: str) -> None:
        """Check that the model predicts hidden genes.

        Parameters
        ----------
        wanted
            What needs it, as the beginning of a sentence.

        Raises
        ------
        UserError
            If it was trained with the uniform graph.
        """
        if not self.knows_masks:
            raise UserError(
                f"{wanted} needs a model that predicts hidden genes, and {self.path} was trained with --graph uniform, which "
                "hides none; expected one trained with --graph absorbing."
            )

    def sigma(self, masked: torch.Tensor) -> torch.Tensor:
        """Return the noise level at which the given share of genes is masked, (B,), for cells masked like `masked` (B, n_vars)."""
        return self.noise.sigma_at(masked.sum(1).double() / masked.shape[1]).float()

    def describe(self) -> str:
        """Return a few lines for people: what it is, what it was trained on, how well it does."""
        state, model = self.state, self.model.config
        data, split = state["data"], state["split"]
        history = state["history"]
        last = history[-1] if history else None
        n_parameters = sum(p.numel() for p in self.model.parameters())
        lines = [
            f"checkpoint  {self.path} (epoch {state['epoch']}, step {state['step']})",
            f"model       {model['attention']} attention, {model['hidden_dim']} wide, {model['num_layers']} layers, "
            f"{model['num_heads']} heads; {n_parameters:,} parameters",
            f"genes       {len(self.genes)}: {', '.join(self.genes[:5])}, ...",
            f"values      {self.binning.describe()}",
            f"diffusion   {self.config.model.graph} graph, {self.config.model.noise} noise, {self.config.model.objective}",
            f"data        {data['path']}: {counted(data['n_obs'], 'cell')}, {split['n_train']} trained on, {split['n_val']} held out",
        ]
        for column, labels in self.categories.items():
            lines.append(f"condition   {column}: {', '.join(labels)}")
        if last is not None:
            lines.append(f"validation  {last['val_nelbo']:.1f} nats per cell, given {bound_is_given(state['args'])}, after epoch {last['epoch']}")
        return "\n".join(lines)

    def condition_codes(self, column: str, labels: np.ndarray, *, asked: bool = False) -> np.ndarray:
        """Labels of a condition column, of the data or `asked` for, as the model's codes, (n,) int64; missing ones are 0.

        Raises
        ------
        UserError
            If a label was not there in training; the known ones are listed.
        """
        known = self.categories[column]
        index = {label_text(label): k + 1 for k, label in enumerate(known)}
        codes = np.zeros(len(labels), np.int64)
        for i, label in enumerate(labels):
            if pd.isna(label):
                continue
            code = index.get(label_text(label))
            if code is None:
                without = f", or leave {column} out (--drop obs/{column}, or missing in that cell): the model then does without"
                raise UserError(
                    f"{column}={str(label)!r} was not there in training; known: {', '.join(map(repr, known))}. Use one of these{'' if asked else without}."
                )
            codes[i] = code
        return codes


def _built(sizes: dict[str, Any], weights: dict[str, torch.Tensor]) -> SEDDTransformer:
    """Return a model of these sizes, for which memory is taken only once the weights are found to be of them.

    A file of a kilobyte can describe a network of a terabyte.
    """
    most = sum(value.numel() for value in weights.values())
    for name, value in sizes.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > (len(weights) if name == "num_layers" else most) and (name, number) != ("n_bins", UNBOUNDED):
                raise ValueError(f"{name} is {number}, and there are {len(weights)} tensors of {most} numbers")
    with torch.device("meta"):  # of which tensors have a shape and no numbers
        described = {name: list(value.shape) for name, value in SEDDTransformer(**sizes).state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    for name in sorted(described.keys() | found.keys()):
        if described.get(name) != found.get(name):
            raise ValueError(f"{name} is of shape {described.get(name)} by its description and {found.get(name)} in the file")
    return SEDDTransformer(**sizes)
