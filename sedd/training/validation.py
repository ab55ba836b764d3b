"""What is measured on the validation cells after each epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator

from sedd.config import TrainConfig
from sedd.graph import AbsorbingGraph, Graph
from sedd.io.loader import CellLoader
from sedd.kernels.mask import exact_mask, masked_count
from sedd.likelihood import CellBatch, nelbo
from sedd.loss import hide
from sedd.model import SEDDTransformer
from sedd.noise import Noise
from sedd.training.parallel import Ranks
from sedd.training.run_data import Panel

N_MASKS = 2
"""Masks per validation cell of the bound; the same ones in every epoch, so that epochs compare on the same draws. More of them cost more
than a tenth of an epoch, and the estimate varies with the cells more than with the masks."""


class Validator:
    """Measures a model on this rank's share of the validation cells.

    Parameters
    ----------
    config, panel, accelerator, noise, graph
        Of the run.
    """

    def __init__(
        self, config: TrainConfig, panel: Panel, accelerator: Accelerator, noise: Noise, graph: Graph
    ) -> None:
        self._config = config
        self._panel = panel
        self._accelerator = accelerator
        self._noise = noise
        self._graph = graph
        self._loader = CellLoader(
            panel.store,
            batch_size=min(max(64, config.batch_size), 4 * config.batch_size),  # without gradients four times as many fit
            split=panel.val_cells,
            genes=panel.genes,
            binning=panel.binning,
            mask=None,
            labels=panel.labels,
            shuffle=False,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            threads=1,
            memory_budget=config.data.memory_budget,
            pin_memory=accelerator.device.type == "cuda",
        )

    @property
    def wait_seconds(self) -> float:
        """Time that validation has waited for cells so far."""
        return self._loader.wait_seconds

    def close(self) -> None:
        """Release the loader."""
        self._loader.close()

    @torch.no_grad()
    def run(self, model: SEDDTransformer, *, stop: Callable[[], bool], in_step: Ranks | None = None) -> torch.Tensor:
        """Return sums over this rank's cells.

        They are: cells, nats, nats squared, hidden entries, their negative log score, their error, labels that are asked for, their
        negative log score, how many are right. Only the absorbing graph hides entries. Labels are asked for given all genes, and given no other label.

        Parameters
        ----------
        model
            With the weights to validate.
        stop
            Asked between batches; when true the rest is left out.
        in_step
            The processes of a model whose weights they divide: all of them take as many batches, and stop when one does.
        """
        sums = torch.zeros(9, dtype=torch.float64)
        training = model.training
        model.eval()
        try:
            batches = self._batches()
            while True:
                batch, stopped = next(batches, None), stop()
                left = batch is not None
                if in_step is not None:
                    left, stopped = map(bool, in_step.largest(left, stopped))
                if stopped or not left:
                    break
                found = self._sums(model, self._nobody(model) if batch is None else batch)
                if batch is not None:
                    sums += found
        finally:
            model.train(training)
        return sums

    def _sums(self, model: SEDDTransformer, batch: CellBatch) -> torch.Tensor:
        with self._accelerator.autocast():
            nats = nelbo(model, self._graph, self._noise, [batch], n_masks=N_MASKS, seed=self._config.run.seed).per_cell
        mine = [len(nats), float(nats.sum()), float((nats**2).sum())]
        recovered = self._recovery(model, batch) if isinstance(self._graph, AbsorbingGraph) else [0, 0, 0]
        return torch.tensor([*mine, *recovered, *self._labels(model, batch)], dtype=torch.float64)

    def _nobody(self, model: SEDDTransformer) -> CellBatch:
        """Return a cell without counts, for a process that has none left while others have."""
        device, columns = self._accelerator.device, len(model.config["condition_sizes"])
        condition = torch.zeros(1, columns, dtype=torch.int64, device=device) if columns else None
        library = torch.zeros(1, device=device) if model.config["condition_library"] else None
        return CellBatch(torch.zeros(1, model.n_vars, dtype=torch.int32, device=device), condition, library, torch.zeros(1, dtype=torch.int64))

    def _recovery(self, model: SEDDTransformer, batch: CellBatch) -> list[float]:
        """How many entries were hidden, the sum of their negative log scores, that of their errors."""
        seed, n_vars, device = self._config.run.seed, len(self._panel.genes), self._accelerator.device
        count = masked_count(self._config.model.mask_ratio, n_vars)
        assert batch.cell is not None
        masked = torch.from_numpy(exact_mask(seed, 0, batch.cell.numpy(), n_vars, count)).to(device)
        everywhere = batch.with_missing(masked)
        shown = hide(batch.tokens, everywhere, self._graph.mask_token)
        sigma = self._noise.sigma_at(everywhere.double().mean(1)).float()
        masked = masked if batch.missing is None else masked & ~batch.missing
        given: dict[str, Any] = {"condition": batch.condition}  # not the total: it would give away what is hidden
        with self._accelerator.autocast():
            readout = model.readout(shown, sigma, **given)
        log_prob = model.head.log_prob(readout, batch.tokens, masked)
        mean, _ = model.expectation_of(readout, shown)
        error = (mean - model.values_of(batch.tokens)).abs()[masked]
        return [float(x) for x in (masked.sum(), -log_prob[masked].sum(), error.sum())]

    def _labels(self, model: SEDDTransformer, batch: CellBatch) -> list[float]:
        """How many labels are known, the sum of their negative log scores, how many are the most probable."""
        if not model.config["answer_labels"] or batch.condition is None:
            return [0, 0, 0]
        tokens, share = batch.tokens, torch.zeros(len(batch.tokens), device=batch.tokens.device)
        if batch.missing is not None:
            tokens, share = hide(tokens, batch.missing, self._graph.mask_token), batch.missing.double().mean(1)
        with self._accelerator.autocast():
            laws = model.label_laws(tokens, self._noise.sigma_at(share).float())
        found = torch.zeros(3, dtype=torch.float64)
        for law, labels in zip(laws, batch.condition.T, strict=True):
            rows = labels.nonzero()[:, 0]
            law, true = law[rows], labels[rows] - 1
            score = law.gather(1, true[:, None]).sum()
            found += torch.tensor([len(rows), -float(score), float((law.argmax(1) == true).sum())])
        return [float(x) for x in found]

    def _batches(self) -> Iterator[CellBatch]:
        device = self._accelerator.device
        self._loader.set_epoch(0)
        for batch in self._loader:
            there = batch.to(device)
            condition, library = self._panel.conditions(there, self._config.model)
            lacking = self._panel.lacking
            yield CellBatch(there.tokens, condition, library, batch.cell, None if lacking is None else lacking.of(there))

    def summary(self, sums: torch.Tensor, ranks: Ranks) -> dict[str, float]:
        """Means over the validation cells of all ranks, each of which must call this.

        Returns
        -------
        dict with val_nelbo (nats per cell, given its labels and total if the model takes them), val_nelbo_se (its standard error),
        val_nelbo_per_gene; where entries are hidden val_nll (nats per hidden entry) and val_mae (mean absolute error of hidden
        entries, counts); where labels are answered val_label_nll (nats per label, given all genes) and val_label_accuracy
        """
        cells, nats, squares, entries, nll, error, labels, label_nll, right = ranks.total(sums).tolist()
        mean = nats / cells
        variance = max(squares / cells - mean**2, 0.0)
        found = {
            "val_nelbo": mean,
            "val_nelbo_se": (variance / max(cells - 1, 1)) ** 0.5,
            "val_nelbo_per_gene": mean / len(self._panel.genes),
        }
        if entries:
            found |= {"val_nll": nll / entries, "val_mae": error / entries}
        return found | {"val_label_nll": label_nll / labels, "val_label_accuracy": right / labels} if labels else found
