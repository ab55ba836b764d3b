"""What a store says of genes that its files lack, against the sets of their names."""

from __future__ import annotations

import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sedd.errors import SeddWarning
from sedd.io import CellStore, convert
from sedd.io.store import store_facts

GENES = [f"g{k}" for k in range(9)]
WANTED = st.lists(st.sampled_from(GENES), min_size=3, unique=True)
PANELS = st.lists(st.sampled_from(GENES[4:]), unique=True).flatmap(lambda more: st.permutations([*GENES[:4], *more]))


def write(path: Path, genes: list[str], seed: int, n_obs: int = 7) -> str:
    rng = np.random.default_rng(seed)
    cells = ad.AnnData(sp.csr_matrix(rng.poisson(1.5, (n_obs, len(genes))).astype(np.float32)))
    cells.var_names, cells.obs_names = genes, [f"{path.stem}-{k}" for k in range(n_obs)]
    cells.write_h5ad(path)
    return str(path)


def said(store: CellStore) -> dict[str, set[str]]:
    """Which genes each cell lacks by what the store says, by its name."""
    names, genes = list(store.obs_names()), np.array(store.var_names)
    if store.lacking is None:
        return {str(name): set() for name in names}
    codes = store.lacking.codes(store.obs_column(store.lacking.column))
    table = np.concatenate([store.lacking.among(genes), np.zeros((1, len(genes)), bool)])
    return {str(name): set(genes[table[code]]) for name, code in zip(names, codes, strict=True)}


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    panels=st.lists(PANELS, min_size=2, max_size=3),
    later=st.none() | PANELS,
    shuffle=st.booleans(),
    frequent=st.booleans(),
    own_source=st.booleans(),
    wanted=st.none() | WANTED,
)
@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
def test_each_cell_lacks_what_its_file_does(
    panels: list[list[str]], later: list[str] | None, shuffle: bool, frequent: bool, own_source: bool, wanted: list[str] | None
) -> None:
    kept = list(dict.fromkeys(name for panel in panels for name in panel))
    kept = kept if wanted is None else [name for name in wanted if name in kept]
    assume(kept and (later is None or {*kept} & {*later}))
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder) / f"f{k}.h5ad", genes, k) for k, genes in enumerate(panels)]
        if own_source:  # a column of this name is the files' own, and where a cell is from has another
            for path in paths[:1]:
                cells = ad.read_h5ad(path)
                cells.obs["source"] = "lab"
                cells.write_h5ad(path)
        asked = {} if wanted is None else {"genes": wanted}
        store = convert(
            paths, f"{folder}/o.zarr", join="outer", shuffle=shuffle, gene_order="frequent" if frequent else "input", progress=False, **asked
        )
        if later is not None:
            panels = [*panels, later]
            store = convert(write(Path(folder) / "f9.h5ad", later, 9), f"{folder}/o.zarr", append=True, progress=False)
        expected = {
            f"{stem}-{k}": set(kept) - set(panel)
            for stem, panel in zip([*(f"f{k}" for k in range(len(paths))), "f9"], panels, strict=False) for k in range(7)
        }  # fmt: skip
        assert said(store) == expected
        # Chosen genes of it as a store of their own say the same of these.
        again = convert(f"{folder}/o.zarr", f"{folder}/again.zarr", genes=sorted(kept)[:3], progress=False)
        assert said(again) == {name: lacks & set(sorted(kept)[:3]) for name, lacks in expected.items()}


@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
def test_files_that_have_all_genes_lack_none(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.h5ad", GENES, 0), write(tmp_path / "b.h5ad", GENES[::-1][:5], 1)]
    assert convert(paths[:1], tmp_path / "one.zarr", progress=False).lacking is None
    with pytest.warns(SeddWarning, match=r"4 of their 9 genes are left out, as not all have them \(first: 'g0', which .*b\.h5ad lacks\)"):
        inner = convert(paths, tmp_path / "inner.zarr", progress=False)
    assert inner.lacking is None
    grown = convert(paths[1], tmp_path / "one.zarr", append=True, join="outer", progress=False)
    assert grown.lacking is not None
    assert grown.lacking.genes.tolist() == GENES[:4]
    assert grown.lacking.inputs == ["b.h5ad"]
    assert store_facts(grown.path)["genes lacking"] == ["b.h5ad: 4"]
