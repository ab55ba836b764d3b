"""scVI's answers for the marks of `network.py`, in an interpreter of its own that need not have sedd installed.

    PYTHON_OF_SCVI benchmarks/network_scvi.py cells.npz answers.npz

Reads `trained` and `real` (cells, genes), `hidden` (of `real`), bool, and `seed`; writes `made`, cells from the prior of scVI trained with
early stopping, and `mean`, its predictions of what is hidden given the rest.
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from flags import Flags
from quality_peers import Scvi
from scipy import sparse

CELLS = 500


def main() -> None:
    """Train scVI, draw cells and predict what is hidden."""
    parser = Flags(__doc__)
    parser.add_argument("cells", help="the .npz that the benchmark wrote")
    parser.add_argument("answers")
    words = parser.parse_args()
    with np.load(words.cells, allow_pickle=False) as task:
        trained, real, hidden, seed = task["trained"], task["real"], task["hidden"], int(task["seed"])
    model = Scvi(sparse.csr_matrix(trained.astype(np.float32)), seed, "nb", observed_library=True, kl_warmup=50)
    model.train_share = trained.sum(0) / trained.sum()
    np.savez(
        words.answers,
        made=model.generate(CELLS, trained.sum(1), seed),
        mean=model.impute(real, hidden)["mean"],
        seconds=model.seconds,
        version=f"scvi-tools {version('scvi-tools')}",
    )


if __name__ == "__main__":
    main()
