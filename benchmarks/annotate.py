"""Labels and surprise on held-out cells: how right, how well calibrated, with how many genes missing, beside what else there is.

    python benchmarks/annotate.py --data baron_mouse.h5ad --label cell_type1 --leave_out alpha ductal
    python benchmarks/annotate.py --tables
    python benchmarks/annotate.py --figure docs/figures/missing.png

A fifth of the cells is the test part and looked at once. Of the others sedd holds 15 % out as its validation cells; the peers are trained
on the same training cells and panel (2,000 variable genes of the training cells), and each one's setting is chosen by its likelihood on
the same validation cells: logistic regression (5 strengths), kNN in 50 principal components (4 numbers of neighbours). sedd has one
setting, its best epoch chosen by the bound. Each of the shares of the panel is missing in three random ways; the genes missing are 0
to the peers, or logistic regression is trained again on the genes that are there. A fixed tenth of the panel is hidden always, to see how well counts of genes that are not there are predicted.

With `--test_where COLUMN=VALUE` the test part is these cells instead; with `--labelled N` only N cells of each label have theirs.

For surprise a type is left out of training (the model is trained again), and two test cells are added up, or added and thinned to
half of the counts, or a cell's counts drawn anew from half its own profile and half the mean of all ("ambient"). AUROC of each
score against the test cells of the training's types. Writes `benchmarks/results/annotate.json`.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from common import RESULTS, machine, with_record, write_result
from flags import Flags
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor

import sedd
from sedd import metrics as m
from sedd.cli import main as command
from sedd.errors import SeddWarning
from sedd.metrics.baselines import CountBaselines

RESULT = RESULTS / "annotate.json"
SHARES, WAYS, ALWAYS_HIDDEN, BINS = (0.0, 0.1, 0.3, 0.5, 0.7), 3, 0.1, 15
FLAGS = ["--val_fraction", "0.15", "--batch_size", "16", "--learning_rate", "2e-4", "--ema_decay", "0.995", "--warmup_steps", "50"]
FLAGS += ["--hidden_dim", "128", "--num_layers", "3", "--num_heads", "4", "--num_latents", "1", "--num_threads", "1", "--log_with", "none"]
UNDATED = "2026-11-26"
"""When records that do not say it were made."""
STRENGTHS, NEIGHBOURS, COMPONENTS = (0.003, 0.01, 0.03, 0.1, 0.3), (5, 10, 20, 40), 50


def calibration_error(p: np.ndarray, true: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: the mean distance of confidence from accuracy over bins of confidence of equal width."""
    confidence, right = p.max(1), p.argmax(1) == true
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(sum(abs(right[at == k].sum() - confidence[at == k].sum()) for k in range(bins)) / len(true))


def nats(p: np.ndarray, true: np.ndarray) -> float:
    """Mean negative log-probability of the true labels; no probability counts as less than 1e-6."""
    return float(-np.log(np.maximum(p[np.arange(len(true)), true], 1e-6)).mean())


def judged(p: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy, calibration error and nats."""
    return {"accuracy": float((p.argmax(1) == true).mean()), "ece": calibration_error(p, true), "nats": nats(p, true)}


def auroc_row(kind: str, method: str, usual: np.ndarray, strange: np.ndarray) -> dict[str, Any]:
    """How well a score tells strange cells from usual ones."""
    auroc = float(roc_auc_score(np.repeat([0, 1], [len(usual), len(strange)]), np.concatenate([usual, strange])))
    # Which way the library goes nobody knows before: the better one.
    return {"kind": kind, "method": method, "auroc": max(auroc, 1 - auroc) if method == "library" else auroc, "n": len(strange)}


def counts_of(adata: ad.AnnData, genes: np.ndarray) -> np.ndarray:
    """Counts of the panel, (n, genes) float64."""
    return np.asarray(sparse.csr_array(adata[:, genes].X).todense(), np.float64)


def log_cp10k(counts: np.ndarray) -> np.ndarray:
    """Natural logarithms of one plus counts per ten thousand of the cell."""
    return np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)


class Peers:
    """Logistic regression and kNN on log CP10k, settings chosen on validation cells."""

    def __init__(self, train: np.ndarray, y: np.ndarray, val: np.ndarray, y_val: np.ndarray, n_labels: int, everything: np.ndarray) -> None:
        self.n = n_labels
        counts, train, val = train, log_cp10k(train), log_cp10k(val)
        self.pca = PCA(min(COMPONENTS, len(train) - 1), random_state=0).fit(log_cp10k(everything))

        def regression(strength: float, there: slice | np.ndarray = slice(None)) -> Callable[[np.ndarray], np.ndarray]:
            own = train if isinstance(there, slice) else log_cp10k(counts[:, there])
            scale = own.std(0) + 0.1
            model = LogisticRegression(C=strength, max_iter=300).fit(own / scale, y)
            return lambda x: self._all(model, x / scale)

        def neighbours(k: int) -> Callable[[np.ndarray], np.ndarray]:
            model = KNeighborsClassifier(min(k, len(train))).fit(self.pca.transform(train), y)
            return lambda x: self._all(model, self.pca.transform(x))

        def best(make: Callable[[Any], Callable[[np.ndarray], np.ndarray]], settings: tuple[Any, ...]) -> tuple[Any, Any]:
            made = {setting: make(setting) for setting in settings}
            chosen = min(made, key=lambda setting: nats(made[setting](val), y_val))
            return chosen, made[chosen]
        found = {"logistic regression": best(regression, STRENGTHS), "kNN": best(neighbours, NEIGHBOURS)}
        self.chosen = {name: setting for name, (setting, _) in found.items()}
        self.models = {name: model for name, (_, model) in found.items()}
        self.again = lambda there: regression(self.chosen["logistic regression"], there)

    def _all(self, model: Any, x: np.ndarray) -> np.ndarray:
        p = np.zeros((len(x), self.n))
        p[:, model.classes_] = model.predict_proba(x)
        return p


def train(adata: ad.AnnData, label: list[str], steps: int, seed: int, folder: Path) -> sedd.Pretrained:
    """Train on cells with the labels of some columns."""
    folder.mkdir()
    adata.write_h5ad(folder / "train.h5ad")
    flags = ["--condition", *label] if label else []
    flags += ["--genes", "2000", "--num_epochs", "1", "--min_steps", str(steps), "--seed", str(seed), "--checkpoint_dir", str(folder / "run")]
    if command(["train", "--data_path", str(folder / "train.h5ad"), *FLAGS, *flags]):
        raise SystemExit("training failed")
    return sedd.Pretrained.load(folder / "run")


def parts_of(model: sedd.Pretrained, adata: ad.AnnData) -> tuple[ad.AnnData, ad.AnnData]:
    """The cells that the model was trained on and those that it was validated on."""
    names = (sedd.embed(model, adata, cells=part, progress=False).obs_names for part in ("train", "val"))
    first, second = (adata[list(some)] for some in names)
    return first, second


def labels_with_genes_missing(
    model: sedd.Pretrained, own: ad.AnnData, test: ad.AnnData, column: str, seed: int, export: Path | None
) -> dict[str, Any]:
    """Accuracy, calibration and nats of labels, and nats of hidden counts, by the share of the panel that is missing."""
    genes, names = model.genes, model.categories[column]
    code = {name: k for k, name in enumerate(names)}
    fit, val = parts_of(model, own)
    known = [part[part.obs[column].notna().to_numpy()] for part in (fit, val)]
    (x, y), (x_val, y_val) = ((counts_of(part, genes), np.array([code[v] for v in part.obs[column].astype(str)])) for part in known)
    peers = Peers(x, y, x_val, y_val, len(names), counts_of(fit, genes))
    counts, true = counts_of(test, genes), np.array([code[v] for v in test.obs[column].astype(str)])
    rng, rows = np.random.default_rng(seed), []
    always = rng.permutation(len(genes))[: round(ALWAYS_HIDDEN * len(genes))]
    others = np.setdiff1d(np.arange(len(genes)), always)
    fitted = CountBaselines.fit(sparse.csr_matrix(counts_of(fit, genes)))
    asked: list[tuple[float, np.ndarray]] = []
    for share in SHARES:
        for _ in range(WAYS if share else 1):
            gone = rng.choice(others, round(share * len(genes)), replace=False)
            there = np.ones(len(genes), bool)
            there[gone] = False
            asked.append((share, there))
            p = {"sedd": sedd.annotate(model, test[:, genes[there]].copy(), progress=False).obsm[f"sedd_{column}_probability"]}
            p |= {name: predict(log_cp10k(counts * there)) for name, predict in peers.models.items()}
            if share:
                p["logistic regression, trained again"] = peers.again(there)(log_cp10k(counts[:, there]))
            for name, probabilities in p.items():
                rows.append({"missing": share, "method": name, **judged(probabilities, true)})
            shown = there.copy()
            shown[always] = False
            rows += [{"missing": share, "method": k, "hidden_nats": v} for k, v in hidden_counts(model, fitted, counts, shown, always).items()]
    if export is not None:
        given = {"fit": counts_of(fit, genes), "y": coded(fit.obs[column], code), "val": counts_of(val, genes), "y_val": coded(val.obs[column], code)}
        given |= {"test": counts, "true": true, "shares": np.array([k for k, _ in asked]), "there": np.stack([k for _, k in asked])}
        np.savez_compressed(export, **given, n_labels=len(names))
    return {"rows": rows, "chosen": peers.chosen, "n_train": len(y), "n_test": len(true), "n_labels": len(names)}


def coded(labels: Any, code: dict[str, int]) -> np.ndarray:
    """Numbers of labels, -1 where there is none."""
    return np.array([code.get(str(value), -1) for value in labels])


def hidden_counts(
    model: sedd.Pretrained, fitted: CountBaselines, counts: np.ndarray, shown: np.ndarray, asked: np.ndarray
) -> dict[str, float]:
    """Nats per count of the genes `asked` (of which none is shown): of the model, and of an NB of each gene's mean times the library."""
    tokens = torch.from_numpy(model.binning.tokens(counts).astype(np.int64))
    tokens[:, ~shown] = model.binning.n_bins
    cells, genes = (torch.from_numpy(x.ravel()) for x in np.meshgrid(np.arange(len(counts)), asked, indexing="ij"))
    true = counts[:, asked].astype(np.int64)
    with torch.no_grad():
        readout = model.model.readout(tokens, model.sigma(tokens == model.binning.n_bins))[cells, genes]
    log_p = model.model.head.distribution(readout, genes, torch.from_numpy(true.ravel()))[0]
    hidden = np.broadcast_to(~shown, counts.shape)
    library = m.visible_library(sparse.csr_matrix(counts), hidden, fitted.share)
    naive = fitted.log_probs(asked[None, :], true, library[:, None])["NB, library-scaled"]
    return {"sedd": float(-log_p.mean()), "NB, library-scaled": float(-naive.mean())}


class Scores:
    """What tells an unusual cell, each larger for a more unusual one."""

    def __init__(self, model: sedd.Pretrained, own: ad.AnnData) -> None:
        self.model, genes = model, model.genes
        self.fit, self.val = parts_of(model, own)
        x = log_cp10k(counts_of(self.fit, genes))
        self.pca = PCA(COMPONENTS, random_state=0).fit(x)
        places = self.pca.transform(x)
        self.outlier = LocalOutlierFactor(n_neighbors=20, novelty=True).fit(places)
        self.neighbours = KNeighborsClassifier(20).fit(places, np.zeros(len(x)))

    def of(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Score cells, (n, genes) counts of the panel."""
        genes = self.model.genes
        adata = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)))
        adata.var_names = genes
        obs = sedd.score(self.model, adata, reference=self.val[:, genes].copy(), progress=False).obs
        places = self.pca.transform(log_cp10k(counts))
        return {
            "sedd surprise": obs["sedd_surprise"].to_numpy(),
            "sedd nats": obs["sedd_nats"].to_numpy(),
            "library": counts.sum(1),
            "LOF in PCA": -self.outlier.score_samples(places),
            "kNN distance in PCA": self.neighbours.kneighbors(places)[0].mean(1),
        }


def unusual(scores: Scores, test: np.ndarray, left_out: dict[str, np.ndarray], seed: int, export: Path | None) -> list[dict[str, Any]]:
    """AUROC of each score for made cells and for cells of types left out, against test cells."""
    rng = np.random.default_rng(seed)
    usual = scores.of(test)
    pairs = rng.permuted(np.tile(np.arange(len(test)), (2, 1)), axis=1)
    doublets = test[pairs[0]] + test[pairs[1]]
    profile = test.sum(0) / test.sum()
    mixed = np.stack([rng.multinomial(int(n), 0.5 * cell / max(n, 1) + 0.5 * profile) for cell, n in zip(test, test.sum(1), strict=True)])
    kinds = {"doublets": doublets, "doublets of usual depth": rng.binomial(doublets.astype(int), 0.5), "half ambient": mixed, **left_out}
    rows = []
    if export is not None:
        fit, val = (counts_of(part, scores.model.genes) for part in (scores.fit, scores.val))
        np.savez_compressed(export, fit=fit, val=val, usual=test, **{f"kind {kind}": cells for kind, cells in kinds.items()})
    for kind, cells in kinds.items():
        found = scores.of(cells.astype(np.float64))
        rows += [auroc_row(kind, name, usual[name], score) for name, score in found.items()]
    return rows


def split(adata: ad.AnnData, where: str | None) -> tuple[ad.AnnData, ad.AnnData]:
    """Training and test part: a fifth at random, or the cells of one value of a column."""
    if where is not None:
        column, _, value = where.partition("=")
        test = (adata.obs[column].astype(str) == value).to_numpy()
    else:
        test = np.zeros(adata.n_obs, bool)
        test[np.random.default_rng(0).permutation(adata.n_obs)[round(0.8 * adata.n_obs) :]] = True
    return adata[~test].copy(), adata[test].copy()


def exported(folder: Path | None, kind: str, name: str, seed: int) -> Path | None:
    """Where the peers find what a record's methods were given."""
    return None if folder is None else folder / f"{kind}; {name.replace('/', '_')}; {seed}.npz"


def with_peers(records: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The records with rows of scVI and scANVI in place of those they had, from what annotate_peers.py answered."""
    out = []
    for record in records:
        given, answers = (exported(part, record["kind"], record["name"], record["seed"]) for part in (folder, folder / "answers"))
        if record["kind"] == "labels" and given is not None and answers is not None and answers.exists():
            with np.load(given) as asked, np.load(answers) as found:
                rows = [row for row in record["rows"] if not row["method"].startswith("sc")]
                for k, share in enumerate(asked["shares"].tolist()):
                    for name in ("scVI, kNN", "scANVI"):
                        rows.append({"missing": share, "method": name, **judged(found[name][k], asked["true"])})
                    rows.append({"missing": share, "method": "scVI", "hidden_nats": float(found["hidden"][k])})
                record = {**record, "rows": rows, "chosen": record["chosen"] | json.loads(str(found["chosen"])), "peers": str(found["version"])}
        if record["kind"] == "unusual":
            rows = [row for row in record["rows"] if not row["method"].startswith("sc")]
            for part in [record["name"], *(f"{record['name']}, without {k}" for k in record.get("left_out", []))]:
                answers = exported(folder / "answers", "unusual", part, record["seed"])
                if answers is not None and answers.exists():
                    with np.load(answers) as found:
                        kinds = [k for k in found.files if k.startswith("kind left out" if part != record["name"] else "kind ")]
                        rows += [auroc_row(k.removeprefix("kind "), "scVI reconstruction", found["usual"], found[k]) for k in kinds]
                        record = {**record, "peers": str(found["version"]), "trials of peers": int(found["trials"])}
            record = {**record, "rows": rows}
        out.append(record)
    return out


def seeds(records: list[dict[str, Any]]) -> str:
    """How many there are and when they were measured, in words."""
    days = sorted({r.get("date", UNDATED) for r in records})
    return ("one seed" if len(records) == 1 else f"{len(records)} seeds") + ", measured " + " and ".join(days)


def tables(records: list[dict[str, Any]]) -> str:
    """The tables of the page, Markdown."""
    lines = []
    by = lambda rows, *keys: {key: [r for r in rows if tuple(r[k] for k in keys) == key] for key in dict.fromkeys(tuple(r[k] for k in keys) for r in rows)}  # noqa: E731
    for (task,), some in by([r for r in records if r["kind"] == "labels"], "name").items():
        rows = [row for record in some for row in record["rows"]]
        n = f"{some[0]['n_train']} labelled training cells, {some[0]['n_test']} test cells"
        lines += [f"**{task}**: {n}, {some[0]['n_labels']} labels, {seeds(some)}", ""]
        lines += ["| share of the panel missing | " + " | ".join(f"{s:.0%}" for s in SHARES) + " |", "|---|" + "---|" * len(SHARES)]
        for metric, words in (("accuracy", "accuracy"), ("ece", "calibration error"), ("nats", "nats per label"), ("hidden_nats", "nats per hidden count")):
            for (method,), own in by([r for r in rows if metric in r], "method").items():
                values = [[r[metric] for r in own if r["missing"] == s] for s in SHARES]
                lines.append(f"| {words}: {method} | " + " | ".join(f"{np.mean(v):.3f}" if v else "" for v in values) + " |")
        lines.append("")
    for (name,), some in by([r for r in records if r["kind"] == "unusual"], "name").items():
        rows = [row for record in some for row in record["rows"]]
        methods = list(dict.fromkeys(r["method"] for r in rows))
        lines += [f"**{name}**: AUROC, {seeds(some)}", "", "| | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
        for (kind,), own in by(rows, "kind").items():
            values = [[r["auroc"] for r in own if r["method"] == method] for method in methods]
            lines.append(f"| {kind} | " + " | ".join(f"{np.mean(v):.3f}" if v else "" for v in values) + " |")
        lines.append("")
    return "\n".join(lines)


def figure(records: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy, calibration and nats of hidden counts against the share that is missing, a row a data set."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["name"] for r in records if r["kind"] == "labels" and r["name"] in ("baron_mouse", "pbmc3k", "kang_pbmc_ifnb")))
    colours = {"sedd": "#0b6e99", "logistic regression": "#b5651d", "logistic regression, trained again": "#d9a066", "kNN": "0.5", "NB, library-scaled": "0.5"}
    colours |= {"scANVI": "#7a4f9a", "scVI, kNN": "#b9a0cc", "scVI": "#b9a0cc"}
    drawing, axes = plt.subplots(len(names), 3, figsize=(9, 2.3 * len(names)), layout="constrained", sharex=True, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        rows = [one for r in records if (r["kind"], r["name"]) == ("labels", name) for one in r["rows"]]
        for axis, metric, title in zip(row, ("accuracy", "ece", "hidden_nats"), ("accuracy", "calibration error", "nats per hidden count"), strict=True):
            for method in dict.fromkeys(r["method"] for r in rows if metric in r):
                points = {s: [r[metric] for r in rows if metric in r and (r["method"], r["missing"]) == (method, s)] for s in SHARES}
                there = [s for s, values in points.items() if values]
                axis.plot([100 * s for s in there], [np.mean(points[s]) for s in there], "o-", ms=3, color=colours[method], label=method)
            axis.set_title(f"{name}: {title}", fontsize=8)
        row[0].legend(frameon=False, fontsize=6)
    for axis in axes[-1]:
        axis.set_xlabel("share of the panel missing, %", fontsize=8)
    drawing.savefig(path, dpi=130)


def main() -> None:
    parser = Flags(__doc__)
    parser.add_argument("--data")
    parser.add_argument("--label", help="obs column to predict")
    parser.add_argument("--also", nargs="*", default=[], help="further condition columns")
    parser.add_argument("--test_where", help="COLUMN=VALUE of the test cells")
    parser.add_argument("--labelled", type=int, help="cells of each label that have theirs")
    parser.add_argument("--leave_out", nargs="*", help="types to leave out of training, for AUROC; none measures made cells alone")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--export", type=Path, help="folder to write what peers are given, for annotate_peers.py")
    parser.add_argument("--peers", type=Path, help="put the answers of annotate_peers.py, of what was exported to this folder, into the records")
    parser.add_argument("--tables", action="store_true", help="print the tables of what was measured")
    parser.add_argument("--figure", type=Path, help="draw the curves of what was measured")
    args = parser.parse_args()
    if args.tables:
        print(tables(json.loads(RESULT.read_text())))
        return
    if args.peers:
        write_result(RESULT, with_peers(json.loads(RESULT.read_text()), args.peers))
        return
    if args.figure:
        figure(json.loads(RESULT.read_text()), args.figure)
        return
    warnings.simplefilter("ignore", SeddWarning)
    torch.set_num_threads(1)
    adata = ad.read_h5ad(args.data)
    adata.X = sparse.csr_matrix(adata.X)
    adata = adata[adata.obs[args.label].notna().to_numpy()].copy()
    adata.obs[args.label] = adata.obs[args.label].astype(str).astype("category")
    own, test = split(adata, args.test_where)
    own.obs[args.label] = own.obs[args.label].cat.remove_unused_categories()
    test = test[test.obs[args.label].isin(own.obs[args.label].cat.categories).to_numpy()].copy()
    name = Path(args.data).stem + (f", tested on {args.test_where}" if args.test_where else "")
    name += f", {args.labelled} labels of each" if args.labelled else ""
    if args.export:
        args.export.mkdir(parents=True, exist_ok=True)
    settings = {"steps": args.steps, "label": args.label, "also": args.also, "machine": machine()}
    settings["date"] = datetime.date.today().isoformat()
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            given = own.copy()
            if args.labelled:
                rng, kept = np.random.default_rng(seed), []
                for rows in given.obs.groupby(args.label, observed=True).indices.values():
                    kept += list(rng.permutation(rows)[: args.labelled])
                given.obs.loc[~np.isin(np.arange(given.n_obs), kept), args.label] = np.nan
            model = train(given, [args.label, *args.also], args.steps, seed, Path(folder, "all"))
            if args.leave_out is None:
                found = labels_with_genes_missing(model, given, test, args.label, seed, exported(args.export, "labels", name, seed))
                record = {"kind": "labels", "name": name, "seed": seed, **found, **settings}
            else:
                made = unusual(Scores(model, given), counts_of(test, model.genes), {}, seed, exported(args.export, "unusual", name, seed))
                for kind in args.leave_out:
                    rest, others = (part[(part.obs[args.label] != kind).to_numpy()].copy() for part in (own, test))
                    strange = adata[(adata.obs[args.label] == kind).to_numpy()]
                    without = train(rest, [args.label, *args.also], args.steps, seed, Path(folder, kind.replace("/", "_")))
                    out = exported(args.export, "unusual", f"{name}, without {kind}", seed)
                    strangers = {f"left out: {kind}": counts_of(strange, without.genes)}
                    rows = unusual(Scores(without, rest), counts_of(others, without.genes), strangers, seed, out)
                    made += [row for row in rows if row["kind"].startswith("left out")]
                record = {"kind": "unusual", "name": name, "seed": seed, "left_out": args.leave_out, "rows": made, **settings}
        write_result(RESULT, with_record(RESULT, record, ("kind", "name", "seed")))
        print(tables([record]))


if __name__ == "__main__":
    main()
