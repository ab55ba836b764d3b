"""Run scVI or MAGIC on a prepared task, in an interpreter of its own that need not have sedd installed.

Reads `task.npz` (written by quality.py) and writes the peer's answers to an .npz file that quality.py scores. Arrays only
in both directions, so the two interpreters share no package.
"""

from __future__ import annotations

import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flags import Flags
from scipy import sparse

FRACTIONS = (15, 30, 50)


def counts(task: np.lib.npyio.NpzFile, name: str) -> sparse.csr_matrix:
    """A CSR matrix that quality.py stored as three arrays and a shape."""
    parts = tuple(task[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
    return sparse.csr_matrix(parts, shape=tuple(task[f"{name}_shape"])).astype(np.float32)


def run_magic(task: np.lib.npyio.NpzFile, seed: int, options: dict[str, object]) -> dict[str, np.ndarray]:
    """MAGIC with its defaults on square roots; `reverse` takes the root before scaling by library size."""
    import magic

    def smooth(x: sparse.csr_matrix) -> np.ndarray:
        dense = x.toarray().astype(np.float64)
        if options["reverse"]:
            dense = np.sqrt(dense)
        size = np.maximum(dense.sum(axis=1, keepdims=True), 1e-12)
        dense = dense / size if options["reverse"] else np.sqrt(dense / size)
        out = magic.MAGIC(random_state=seed, verbose=0, n_jobs=1).fit_transform(dense, genes="all_genes")
        out = np.maximum(np.asarray(out), 0)
        return (out * size) ** 2 if options["reverse"] else out**2 * size

    answers = {"denoised": smooth(counts(task, "kept")).astype(np.float32)}
    train, test = counts(task, "train"), counts(task, "test").toarray()
    for fraction in FRACTIONS:
        visible = sparse.csr_matrix(np.where(task[f"hidden_{fraction}"], 0, test))
        answers[f"mean_{fraction}"] = smooth(sparse.vstack([train, visible]).tocsr())[train.shape[0] :].astype(
            np.float32
        )
    return answers


class Scvi:
    """scVI trained with early stopping on 10 % of the cells it is given, the best epoch's weights kept."""

    def __init__(
        self, x: sparse.csr_matrix, seed: int, likelihood: str, observed_library: bool, kl_warmup: int
    ) -> None:
        import anndata
        import scvi
        import torch
        from scvi.train import SaveCheckpoint

        torch.set_num_threads(1)
        scvi.settings.seed = seed
        adata = anndata.AnnData(x)
        scvi.model.SCVI.setup_anndata(adata)
        self.model = scvi.model.SCVI(
            adata, n_latent=10, gene_likelihood=likelihood, use_observed_lib_size=observed_library
        )
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            self.model.train(
                max_epochs=400,
                accelerator="cpu",
                early_stopping=True,
                early_stopping_patience=20,
                check_val_every_n_epoch=1,
                enable_checkpointing=True,
                callbacks=[SaveCheckpoint(dirpath=folder, monitor="elbo_validation", load_best_on_end=True)],
                plan_kwargs={"n_epochs_kl_warmup": kl_warmup},
                enable_progress_bar=False,
            )
        self.seconds = time.perf_counter() - start
        validation = self.model.history["elbo_validation"]["elbo_validation"]
        self.best_epoch = int(validation.idxmin())
        self.best_elbo = float(validation.min())
        self.module = self.model.module.eval()
        self.observed_library = observed_library
        self.torch = torch

    def encode(self, x: np.ndarray, samples: int) -> dict:
        """Posterior draws of z (and of the library, where it is modelled) for a block of cells."""
        t = self.torch.as_tensor(np.asarray(x, np.float32))
        batch = self.torch.zeros(len(t), 1, dtype=self.torch.long)
        out = self.module.inference(t, batch, n_samples=samples)
        out["batch"] = batch
        return out

    def decode(self, z: object, library: object, n_cells: int) -> object:
        """The count distribution; `library` is the log total, shape (..., n_cells, 1)."""
        batch = self.torch.zeros(n_cells, 1, dtype=self.torch.long)
        return self.module.generative(z, library, batch)["px"]

    def bound(self, x: np.ndarray, samples: int = 300, chunk: int = 20) -> tuple[np.ndarray, np.ndarray]:
        """Negative ELBO and negative importance-weighted log likelihood of each cell, nats."""
        torch = self.torch
        elbo, weighted = [], []
        with torch.no_grad():
            for start in range(0, len(x), chunk):
                block = torch.as_tensor(np.asarray(x[start : start + chunk], np.float32))
                out = self.encode(block, samples)
                px = self.decode(out["z"], out["library"], len(block))
                log_w = px.log_prob(block).sum(-1)
                prior = torch.distributions.Normal(0.0, 1.0)
                log_w += (prior.log_prob(out["z"]) - out["qz"].log_prob(out["z"])).sum(-1)
                if not self.observed_library:
                    mean, var = self.module._compute_local_library_params(out["batch"])
                    pl = torch.distributions.Normal(mean, var.sqrt())
                    log_w += (pl.log_prob(out["library"]) - out["ql"].log_prob(out["library"])).sum(-1)
                elbo.append(-log_w.mean(0))
                weighted.append(-(torch.logsumexp(log_w, 0) - np.log(samples)))
        return torch.cat(elbo).numpy(), torch.cat(weighted).numpy()

    def latent(self, x: np.ndarray) -> np.ndarray:
        """Posterior mean of z."""
        with self.torch.no_grad():
            return self.encode(x, 1)["qz"].loc.numpy()

    def rates(self, x: np.ndarray, samples: int = 25, chunk: int = 200) -> np.ndarray:
        """Expected counts at the cell's own total, averaged over the posterior."""
        out = []
        with self.torch.no_grad():
            for start in range(0, len(x), chunk):
                block = x[start : start + chunk]
                code = self.encode(block, samples)
                out.append(self.decode(code["z"], code["library"], len(block)).mean.mean(0).numpy())
        return np.concatenate(out)

    def impute(self, x: np.ndarray, hidden: np.ndarray, samples: int = 50, rounds: int = 4) -> dict[str, np.ndarray]:
        """Predictive mean, log probability and cdf of the hidden entries given the visible ones.

        Hidden entries are first filled with predictions, a few rounds, so that the encoder meets a whole cell. Posterior
        draws are then weighted by how well they explain the visible genes (self-normalised importance sampling), and the
        library is the visible total over the visible share of the decoded profile. This is kinder to scVI than zeros.
        """
        torch = self.torch
        gene_share = self.train_share
        mean, log_prob, below = (np.zeros(x.shape, np.float32) for _ in range(3))
        with torch.no_grad():
            for start in range(0, len(x), 10):
                rows = slice(start, start + 10)
                truth, mask = x[rows].astype(np.float32), hidden[rows]
                visible_total = np.where(mask, 0, truth).sum(1, keepdims=True)
                expected = visible_total / ((~mask) @ gene_share)[:, None] * gene_share
                for _ in range(rounds):
                    code = self.encode(np.where(mask, expected, truth), 25)
                    scale = self.decode(code["z"], code["library"], len(truth)).scale.mean(0).numpy()
                    expected = visible_total * scale / (scale * ~mask).sum(1, keepdims=True)
                code = self.encode(np.where(mask, expected, truth), samples)
                scale = self.decode(code["z"], code["library"], len(truth)).scale
                see = torch.as_tensor(~mask)
                share = (scale * see).sum(-1, keepdim=True)
                library = torch.log(torch.as_tensor(np.maximum(visible_total, 1)) / share)
                px = self.decode(code["z"], library, len(truth))
                target = torch.as_tensor(truth)
                lp = px.log_prob(target)
                prior = torch.distributions.Normal(0.0, 1.0)
                log_w = (lp * see).sum(-1) + (prior.log_prob(code["z"]) - code["qz"].log_prob(code["z"])).sum(-1)
                log_w = log_w - torch.logsumexp(log_w, 0)
                mean[rows] = (log_w.exp()[..., None] * px.mean).sum(0).numpy()
                log_prob[rows] = torch.logsumexp(lp + log_w[..., None], 0).numpy()
                below[rows] = self._below(px, truth, mask, log_w)
        return {"mean": mean, "log_prob": log_prob, "cdf_below": below}

    def _below(self, px: object, truth: np.ndarray, mask: np.ndarray, log_w: object) -> np.ndarray:
        """P(X < true) at the hidden entries, by summing the mixture's probabilities of the smaller counts."""
        torch = self.torch
        total = torch.zeros(truth.shape)
        target = torch.as_tensor(truth)
        weight = log_w.exp()[..., None]
        for value in range(int(truth[mask].max(initial=0))):
            need = np.flatnonzero(((truth > value) & mask).any(axis=0))
            part = type(px)(
                mu=px.mu[..., need],
                theta=px.theta.expand(px.mu.shape)[..., need],
                **({"zi_logits": px.zi_logits[..., need]} if hasattr(px, "zi_logits") else {}),
            )
            p = (part.log_prob(torch.full((1,), float(value))).exp() * weight).sum(0)
            total[:, need] += torch.where(target[:, need] > value, p, torch.zeros(()))
        return total.numpy()

    def generate(self, n: int, totals: np.ndarray, seed: int, latent_of: np.ndarray | None = None) -> np.ndarray:
        """Counts from the prior or, given cells, from their posterior (the aggregate posterior)."""
        torch = self.torch
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        pick = rng.integers(len(totals), size=n)
        with torch.no_grad():
            z = torch.randn(n, 10) if latent_of is None else self.encode(latent_of[pick], 1)["z"].reshape(n, 10)
            if self.observed_library:
                library = torch.log(torch.as_tensor(totals[pick], dtype=torch.float32))[:, None]
            else:
                mean, var = self.module._compute_local_library_params(torch.zeros(n, 1, dtype=torch.long))
                library = mean + var.sqrt() * torch.randn(n, 1)
            return self.decode(z, library, n).sample().numpy().astype(np.int32)


def run_scvi(task: np.lib.npyio.NpzFile, seed: int, options: dict[str, object]) -> dict[str, np.ndarray]:
    """Everything that scVI is asked: imputation, likelihood, generation, embedding and, from a fit of its own, denoising."""
    likelihood, warmup = str(options["likelihood"]), int(options["kl_warmup"])
    train, test = counts(task, "train"), counts(task, "test").toarray()
    totals = np.asarray(train.sum(axis=1)).ravel()
    model = Scvi(train, seed, likelihood, True, warmup)
    model.train_share = np.asarray(train.sum(axis=0)).ravel() / train.sum()
    answers: dict[str, np.ndarray] = {}
    answers["elbo"], answers["iw"] = model.bound(test)
    answers["latent_train"], answers["latent_test"] = model.latent(train.toarray()), model.latent(test)
    answers["prior"] = model.generate(len(test), totals, seed)
    answers["posterior"] = model.generate(len(test), totals, seed, train.toarray())
    for fraction in FRACTIONS:
        for key, value in model.impute(test, task[f"hidden_{fraction}"]).items():
            answers[f"{key}_{fraction}"] = value
    log = {"observed": [model.best_epoch, model.best_elbo, model.seconds]}
    if options.get("modelled_library"):
        free = Scvi(train, seed, likelihood, False, warmup)
        answers["elbo_library_modelled"], answers["iw_library_modelled"] = free.bound(test)
        log["modelled"] = [free.best_epoch, free.best_elbo, free.seconds]
    kept = counts(task, "kept")
    denoiser = Scvi(kept, seed, likelihood, True, warmup)
    answers["denoised"] = denoiser.rates(kept.toarray())
    log["denoising"] = [denoiser.best_epoch, denoiser.best_elbo, denoiser.seconds]
    answers["log"] = np.array(json.dumps(log))
    return answers


def main() -> None:
    parser = Flags(__doc__)
    parser.add_argument("method", choices=["scvi", "magic"])
    parser.add_argument("task", type=Path)
    parser.add_argument("output", help="where the answers go, an .npz", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: likelihood, kl_warmup, reverse...")
    args = parser.parse_args()
    package = {"scvi": "scvi-tools", "magic": "magic-impute"}[args.method]
    start = time.perf_counter()
    with np.load(args.task, allow_pickle=False) as task:
        answers = {"scvi": run_scvi, "magic": run_magic}[args.method](task, args.seed, args.options)
    answers["seconds"] = np.array(time.perf_counter() - start)
    answers["version"] = np.array(f"{package} {version(package)}")
    np.savez(args.output, **answers)


if __name__ == "__main__":
    main()
