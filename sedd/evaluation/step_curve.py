"""How much more sampling steps help: generation metrics at a few numbers of steps, beside those of real cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from sedd import tasks
from sedd.inference.pretrained import Pretrained
from sedd.metrics import fit_pca, gaussian_w2, generation_split, log_cp10k, mmd2_unbiased, real_or_fake_auc

_CELLS = 500  # a point needs; distances depend on the number of cells, so all points have the same


def step_curve(
    model: Pretrained,
    made: ad.AnnData,
    real: sp.csr_matrix,
    train: sp.csr_matrix,
    known: np.ndarray,
    steps: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Generate cells in few steps and compare them with held-out ones.

    Parameters
    ----------
    model
        A loaded model.
    made
        Generated cells, whose own number of steps is a point too if they were drawn without conditions and by the
        plain reverse process.
    real, train
        Held-out cells and training cells over the known genes.
    known : (n_vars,) bool
        Genes of the panel that the data have.
    steps
        Numbers of steps to try.
    batch_size, seed, progress
        As in `sedd.tasks.generate`.

    Returns
    -------
    points : list of dict
        `steps` and the metrics, by number of steps; 0 steps are the real training cells, what a perfect model gets.
    """
    anchor, outside = generation_split(train.shape[0], real.shape[0])
    pca = fit_pca(train[outside], seed=seed)
    plain = _plain_steps(made)
    n = min(_CELLS, real.shape[0], len(anchor), *([made.n_obs] if plain else []))
    sets = {0: train[anchor[:n]]}
    for number in sorted({step for step in steps if step != plain}):
        cells = tasks.generate(model, n, num_steps=number, batch_size=batch_size, seed=seed, progress=progress)
        sets[number] = sp.csr_matrix(cells.X)[:, known]
    if plain:
        sets[plain] = sp.csr_matrix(made[:n, model.genes[known]].X)
    held_out = pca.transform(log_cp10k(real[:n]))
    points = []
    for number, cells in sorted(sets.items()):
        at = pca.transform(log_cp10k(cells))
        found = {"w2": gaussian_w2(held_out, at), "mmd2": mmd2_unbiased(held_out, at)}
        found["auc"] = real_or_fake_auc(held_out, at, seed=seed, trees=50)
        points.append({"steps": number, **{name: float(value) for name, value in found.items()}})
    return points


def _plain_steps(made: ad.AnnData) -> int | None:
    """In how many steps the cells were drawn, if nothing else about them is out of the ordinary."""
    said = made.uns.get("sedd", {})
    ordinary = {"task": "generate", "sampler": "analytic", "temperature": 1.0, "guidance": 1.0}
    if made.obs.shape[1] or any(said.get(name) != value for name, value in ordinary.items()):
        return None
    return int(np.asarray(said["num_steps"]))
