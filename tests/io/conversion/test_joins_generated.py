"""Counts of several inputs, whatever their genes, layouts and types, are joined as anndata alone joins them."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from sedd.errors import UserError
from sedd.io.convert import convert

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")

LAYOUTS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}
GENES = ["TP53", "gène", "G1/S", "", "nan", "a b", "ENSG0001.2", "7", "07", "x" * 40, "_", "A"]


@st.composite
def inputs(draw: Any) -> list[ad.AnnData]:
    """Two or three data sets of the same kind of counts with genes of their own, in orders of their own."""
    found = []
    for number in range(draw(st.integers(2, 3))):
        genes = draw(st.lists(st.sampled_from([name for name in GENES if name]), min_size=1, unique=True))
        rng = np.random.default_rng(draw(st.integers(0, 999)))
        n = draw(st.integers(1, 9))
        values = rng.negative_binomial(0.4, 0.05, (n, len(genes))) * draw(st.sampled_from([1, 1, 300, 70_000]))
        matrix = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](values.astype(draw(st.sampled_from(["float32", "int64", "uint32"]))))
        cells = pd.DataFrame(index=[f"{number}-{k}" for k in range(n)])
        found.append(ad.AnnData(matrix, obs=cells, var=pd.DataFrame(index=genes)))
    return found


@given(data=inputs(), join=st.sampled_from(["inner", "outer"]), shuffle=st.booleans())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_are_joined_as_anndata_joins_them(
    tmp_path_factory: pytest.TempPathFactory, data: list[ad.AnnData], join: str, shuffle: bool
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    paths = [folder / f"{k}.h5ad" for k in range(len(data))]
    for adata, path in zip(data, paths, strict=True):
        with ad.settings.override(disallow_forward_slash_in_h5ad=False):
            adata.write_h5ad(path)
    expected = ad.concat(data, join=join, fill_value=0).to_df()
    common = set.intersection(*(set(adata.var_names) for adata in data))
    given = {"join": join, "shuffle": shuffle, "progress": False}
    apart = any(not {*data[0].var_names} & {*adata.var_names} for adata in data[1:])
    if apart or (join == "inner" and not common):  # rather a mistake; it is said, and nothing is left
        with pytest.raises(UserError, match="in common"):
            convert([str(path) for path in paths], folder / "o.zarr", **given)
        assert not (folder / "o.zarr").exists() and not (folder / "o.zarr.partial").exists()
        return
    store = convert([str(path) for path in paths], folder / "o.zarr", **given)
    found = ad.read_zarr(store.path).to_df()
    assert set(found.columns) == set(expected.columns)
    assert sorted(found.index) == sorted(expected.index)
    pd.testing.assert_frame_equal(found.loc[expected.index, expected.columns].astype("float64"), expected.astype("float64"), check_names=False)
