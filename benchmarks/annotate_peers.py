"""scVI and scANVI on what annotate.py exports: labels with genes missing as zeros, counts of genes that are hidden, reconstruction loss.

    python benchmarks/annotate.py --data D --label L --export FOLDER                # sedd, regression, kNN; writes what they were given
    OTHER/python benchmarks/annotate_peers.py FOLDER                                # an environment with scvi-tools
    python benchmarks/annotate.py --peers FOLDER                                    # scores the answers, puts them into the record

The same training cells, and the same validation cells for stopping early and for choosing one of `SETTINGS`: by the nats of their labels (scANVI, and
kNN in the latent space of scVI), by the ELBO for what has no labels. Cells of training without a label are unlabelled to scANVI. Neither is given a batch.
Hidden counts: the encoder sees zeros for genes that are not shown, and the law of the decoder is at the total of the shown genes over their decoded share.
"""

from __future__ import annotations

import json
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flags import Flags

SETTINGS: list[dict[str, Any]] = [
    {"n_latent": n, "n_layers": layers, "gene_likelihood": law} for n, layers, law in ((10, 1, "nb"), (10, 2, "nb"), (20, 2, "nb"))
]
NEIGHBOURS, ALWAYS_HIDDEN, DRAWS = (5, 10, 20, 40), 0.1, 25
UNKNOWN = "no label"


def nats(p: np.ndarray, true: np.ndarray) -> float:
    """Mean negative log-probability of the true labels; no probability counts as less than 1e-6."""
    return float(-np.log(np.maximum(p[np.arange(len(true)), true], 1e-6)).mean())


class Vae:
    """scVI with one setting, and scANVI on it if there are labels; `labels` are numbers, -1 where there is none."""

    def __init__(self, fit: np.ndarray, val: np.ndarray, setting: dict[str, Any], seed: int, labels: np.ndarray | None = None) -> None:
        import anndata
        import scvi
        import torch

        torch.set_num_threads(1)
        scvi.settings.seed = seed
        self.torch, self.anndata = torch, anndata
        adata = anndata.AnnData(np.concatenate([fit, val]).astype(np.float32))
        names = [UNKNOWN] * len(adata) if labels is None else [f"{k:04d}" if k >= 0 else UNKNOWN for k in labels] + [UNKNOWN] * len(val)
        adata.obs["label"] = names
        scvi.model.SCVI.setup_anndata(adata, labels_key="label")
        self.model = scvi.model.SCVI(adata, **setting)
        rows = [np.arange(len(fit)), np.arange(len(fit), len(adata))]
        stops = {"early_stopping": True, "early_stopping_patience": 20, "check_val_every_n_epoch": 1, "accelerator": "cpu", "enable_progress_bar": False}
        self.model.train(max_epochs=400, datasplitter_kwargs={"external_indexing": rows}, **stops)
        self.elbo = float(self.model.history["elbo_validation"].min().iloc[0])
        self.labelled = None
        if labels is not None:
            self.labelled = scvi.model.SCANVI.from_scvi_model(self.model, unlabeled_category=UNKNOWN)
            self.labelled.train(accelerator="cpu", enable_progress_bar=False, check_val_every_n_epoch=1)

    def _adata(self, counts: np.ndarray) -> Any:
        adata = self.anndata.AnnData(counts.astype(np.float32))
        adata.obs["label"] = UNKNOWN
        return adata

    def latent(self, counts: np.ndarray) -> np.ndarray:
        """Means of the posterior of z."""
        return np.asarray(self.model.get_latent_representation(self._adata(counts)))

    def predict(self, counts: np.ndarray, n_labels: int) -> np.ndarray:
        """Probabilities of labels by scANVI, (n, n_labels)."""
        assert self.labelled is not None
        found = self.labelled.predict(self._adata(counts), soft=True)
        p = np.zeros((len(counts), n_labels))
        for name in found.columns:
            if name != UNKNOWN:
                p[:, int(name)] = found[name]
        return p / np.maximum(p.sum(1, keepdims=True), 1e-12)

    def _laws(self, counts: np.ndarray, shown: np.ndarray | None = None, chunk: int = 50) -> Any:
        """Blocks of rows with the laws of their counts, (DRAWS, rows, genes)."""
        torch, module = self.torch, self.model.module.eval()
        for start in range(0, len(counts), chunk):
            rows = slice(start, start + chunk)
            x = torch.as_tensor(counts[rows].astype(np.float32))
            seen = x if shown is None else x * torch.as_tensor(shown.astype(np.float32))
            batch = torch.zeros(len(x), 1, dtype=torch.long)
            with torch.no_grad():
                code = module.inference(seen, batch, n_samples=DRAWS)
                law = module.generative(code["z"], code["library"], batch)["px"]
                if shown is not None:
                    share = law.scale[..., torch.as_tensor(shown)].sum(-1, keepdim=True)
                    total = torch.log(seen.sum(1, keepdim=True).clamp_min(1) / share)
                    law = module.generative(code["z"], total, batch)["px"]
                yield rows, law.log_prob(x)

    def reconstruction(self, counts: np.ndarray) -> np.ndarray:
        """Reconstruction loss of each cell, nats, mean over draws of z."""
        return np.concatenate([-log_p.sum(-1).mean(0).numpy() for _, log_p in self._laws(counts)])

    def hidden(self, counts: np.ndarray, shown: np.ndarray, asked: np.ndarray) -> float:
        """Nats per count of the genes asked, of which none is shown; probabilities are means over draws of z."""
        found = [(self.torch.logsumexp(log_p[..., asked], 0) - np.log(DRAWS)).numpy() for _, log_p in self._laws(counts, shown)]
        return float(-np.concatenate(found).mean())


def labels(given: Any, seed: int, trials: int) -> dict[str, Any]:
    """Answer for one exported record of labels."""
    from sklearn.neighbors import KNeighborsClassifier

    fit, val, y, n = given["fit"], given["val"], given["y"], int(given["n_labels"])
    known, asked = given["y_val"] >= 0, {}
    for k, setting in enumerate(SETTINGS[:trials]):
        start = time.perf_counter()
        vae = Vae(fit, val, setting, seed, y)
        asked[k, "scANVI"] = (nats(vae.predict(val[known], n), given["y_val"][known]), lambda x, vae=vae: vae.predict(x, n))
        places = vae.latent(fit[y >= 0])
        for neighbours in NEIGHBOURS:
            near = KNeighborsClassifier(min(neighbours, len(places))).fit(places, y[y >= 0])

            def predict(x: np.ndarray, vae: Vae = vae, near: Any = near) -> np.ndarray:
                p = np.zeros((len(x), n))
                p[:, near.classes_] = near.predict_proba(vae.latent(x))
                return p

            asked[k, f"scVI {neighbours}"] = (nats(predict(val[known]), given["y_val"][known]), predict)
        asked[k, "elbo"] = (vae.elbo, vae)
        print(setting, f"{time.perf_counter() - start:.0f} s", {name: round(v[0], 4) for (j, name), v in asked.items() if j == k}, flush=True)

    def best(name: str) -> tuple[str, Any]:
        (k, which), (_, made) = min(((key, v) for key, v in asked.items() if key[1].startswith(name)), key=lambda item: item[1][0])
        return f"{SETTINGS[k]} {which}", made

    (scanvi, by_scanvi), (scvi, by_scvi), (elbo, vae) = best("scANVI"), best("scVI "), best("elbo")
    test, n_genes = given["test"], given["test"].shape[1]
    always = np.random.default_rng(seed).permutation(n_genes)[: round(ALWAYS_HIDDEN * n_genes)]
    out: dict[str, Any] = {"chosen": json.dumps({"scANVI": scanvi, "scVI, kNN": scvi, "hidden counts": elbo})}
    out |= {"scANVI": np.stack([by_scanvi(test * there) for there in given["there"]]), "scVI, kNN": np.stack([by_scvi(test * there) for there in given["there"]])}
    shown = given["there"].copy()
    shown[:, always] = False
    out["hidden"] = np.array([vae.hidden(test, one, always) for one in shown])
    return out


def unusual(given: Any, seed: int, trials: int) -> dict[str, Any]:
    """Reconstruction losses of usual cells and of each kind."""
    made = []
    for setting in SETTINGS[:trials]:
        start = time.perf_counter()
        made.append(Vae(given["fit"], given["val"], setting, seed))
        print(setting, f"{time.perf_counter() - start:.0f} s, ELBO {made[-1].elbo:.1f}", flush=True)
    best = int(np.argmin([vae.elbo for vae in made]))
    names = [name for name in given if name == "usual" or name.startswith("kind ")]
    return {"chosen": json.dumps(SETTINGS[best]), **{name: made[best].reconstruction(given[name]) for name in names}}


def main() -> None:
    """Answer whatever in the folder has no answer yet."""
    parser = Flags(__doc__)
    parser.add_argument("folder", type=Path, help="where the questions are, and the answers go")
    parser.add_argument("--trials", help="settings that are tried, the first of the list", type=int, default=len(SETTINGS))
    parser.add_argument("--only", default="", help="text that the names of records to answer have in them")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    (args.folder / "answers").mkdir(exist_ok=True)
    for path in sorted(args.folder.glob("*.npz")):
        output = args.folder / "answers" / path.name
        if output.exists() or args.only not in path.name:
            continue
        kind, _, seed = path.stem.split("; ")
        print(path.stem, flush=True)
        with np.load(path) as arrays:
            found = {"labels": labels, "unusual": unusual}[kind](dict(arrays), int(seed), args.trials)
        np.savez_compressed(output, **found, trials=args.trials, version=f"scvi-tools {version('scvi-tools')}")


if __name__ == "__main__":
    main()
