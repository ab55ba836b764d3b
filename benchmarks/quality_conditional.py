"""Cells generated type by type: are they of the type that was asked for, and do they look like it?

    python benchmarks/quality.py --data LABELLED.h5ad --label cell_type --name pbmc3k --export TRAIN.h5ad
    sedd train --data_path TRAIN.h5ad --config configs/quality.yaml --condition label --checkpoint_dir DIR
    python benchmarks/quality_conditional.py --data LABELLED.h5ad --label cell_type --name pbmc3k --checkpoint DIR

As many cells of each type are generated as are held out of it. A logistic regression on principal components of the real
training cells names them, beside the real test cells, whom it also misnames now and then. For types with enough test cells
the distance between generated and test cells stands beside that of real training cells of the type. Records go into
`benchmarks/results/quality_NAME.json` under the protocol "conditional".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import quality
import quality_sedd
from flags import Flags
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sedd import metrics as m
from sedd import tasks

ENOUGH = 40  # test cells of a type, below which a distance says little


def names(classifier: Any, cells: dict[str, Any]) -> quality.Record:
    """How many cells are named as asked for: on average over cells and over types, and type by type."""
    shares = {label: float((classifier.predict(m.log_cp10k(x)) == label).mean()) for label, x in cells.items()}
    sizes = np.array([cells[label].shape[0] for label in shares])
    return {
        "named_right": float(np.average(list(shares.values()), weights=sizes)),
        "named_right_per_type": float(np.mean(list(shares.values()))),
        "types": {label: round(share, 4) for label, share in shares.items()},
    }


def distances(pca: PCA, cells: dict[str, Any], test: dict[str, Any]) -> quality.Record:
    """Distances to the test cells of the same type, on average over the types that have enough of them."""
    large = [label for label in cells if test[label].shape[0] >= ENOUGH]
    placed = {label: [pca.transform(m.log_cp10k(x)) for x in (test[label], cells[label])] for label in large}
    return {
        "w2_within_types": float(np.mean([m.gaussian_w2(*placed[label]) for label in large])),
        "mmd2_within_types": float(np.mean([m.mmd2_unbiased(*placed[label]) for label in large])),
    }


def measure(task: quality.Task, checkpoint: Path, guidances: list[float], num_steps: int) -> Iterator[quality.Record]:
    """Score real cells and the model's cells with and without guidance."""
    assert task.labels is not None
    train_labels, test_labels = task.labels[task.train_rows], task.labels[task.test_rows]
    known = ~quality.unlabelled(train_labels)
    classifier = make_pipeline(
        PCA(50, random_state=task.seed), StandardScaler(), LogisticRegression(max_iter=2000, random_state=task.seed)
    ).fit(m.log_cp10k(task.train[known]), train_labels[known])
    anchor, outside = m.generation_split(task.train.shape[0], task.test.shape[0], 0)
    pca = m.fit_pca(task.train[outside])
    types = sorted(set(test_labels[~quality.unlabelled(test_labels)]))
    test = {label: task.test[test_labels == label] for label in types}
    head: quality.Record = {"protocol": "conditional", "seed": task.seed}
    yield {**head, "method": "real test cells (anchor)", **names(classifier, test)}
    real = {label: task.train[anchor[train_labels[anchor] == label]] for label in types}
    yield {**head, "method": "real training cells (anchor)", **distances(pca, real, test)}
    model = quality_sedd.Pretrained.load(checkpoint)
    order = quality_sedd.gene_order(model, task.genes)
    column = next(iter(model.categories))
    for guidance in guidances:
        made = {}
        for label in types:
            settings: dict[str, Any] = {"guidance": guidance, "num_steps": num_steps, "seed": task.seed}
            cells = tasks.generate(model, test[label].shape[0], where={column: label}, progress=False, **settings)
            made[label] = sparse.csr_array(cells.X)[:, order]
        found = {**names(classifier, made), **distances(pca, made, test), "num_steps": num_steps}
        yield {**head, "method": f"sedd, guidance {guidance:g}", **found}


def main() -> None:
    """Run the benchmark."""
    parser = Flags(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--label", required=True, help="obs column with cell types")
    parser.add_argument("--name", required=True, help="of the data set, in the name of the result")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a model conditioned on the label")
    parser.add_argument("--guidances", help="strengths of the guidance", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--num_steps", type=int, default=128)
    parser.add_argument("--n_genes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    task = quality.prepare(args.data, args.n_genes, args.label, args.seed)
    output = args.output or Path(__file__).parent / "results" / f"quality_{args.name}.json"
    for record in measure(task, args.checkpoint, args.guidances, args.num_steps):
        print(record, flush=True)
        quality.update(output, {}, [record])


if __name__ == "__main__":
    main()
