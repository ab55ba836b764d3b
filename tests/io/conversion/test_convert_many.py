"""Several inputs: genes are matched by name, cells follow each other or are shuffled together."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from sedd.errors import SeddWarning, UserError
from sedd.io.convert import convert
from sedd.io.verify import verify
from tests.io.h5ads import counts, write

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")

LAYOUTS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda matrix: matrix.toarray()}


def frame_of(matrix: sparse.csr_matrix, genes: list[str]) -> pd.DataFrame:
    return pd.DataFrame(matrix.toarray(), columns=genes)


@given(
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=2, max_size=3),
    join=st.sampled_from(["inner", "outer"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_inputs_are_joined_by_gene_name(
    tmp_path_factory: pytest.TempPathFactory, layouts: list[str], join: str, shuffle: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(seed)
    paths, frames = [], []
    for number, layout in enumerate(layouts):
        matrix = counts(20 + number, 12, seed=seed + number)
        genes = [f"g{k}" for k in rng.permutation(18)[:12]]
        genes[0] = "common"
        paths.append(write(folder / f"{number}.h5ad", LAYOUTS[layout](matrix), genes=genes))
        frames.append(frame_of(matrix, genes))
    store = convert(paths, folder / "o.zarr", join=join, shuffle=shuffle, seed=seed, progress=False)
    expected = pd.concat(frames, join=join).fillna(0)[list(store.var_names)].to_numpy()
    read = ad.read_zarr(store.path)
    order = read.obs["sedd_cell"].to_numpy() if shuffle else np.arange(len(expected))
    np.testing.assert_array_equal(read.X.toarray(), expected[order])
    assert set(store.var_names) == set(pd.concat(frames, join=join).columns)
    sources = np.repeat([f"{k}.h5ad" for k in range(len(paths))], [len(frame) for frame in frames])
    assert list(read.obs["source"]) == list(sources[order])
    assert verify(store.path, against=paths)["cells"] == len(expected)


def test_stored_zeros_are_said_of_no_input_that_has_none(tmp_path: Path) -> None:
    tidy, untidy = counts(20, 12, seed=1), counts(20, 12, seed=2)
    untidy.data[::3] = 0
    paths = [write(tmp_path / f"{name}.h5ad", matrix) for name, matrix in (("tidy", tidy), ("untidy", untidy))]
    with pytest.warns(SeddWarning, match="one or several of the 2 inputs: has stored zeros"):
        convert(paths, tmp_path / "o.zarr", progress=False)


def test_one_input_in_its_own_order_is_not_spilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sedd.io.conversion.spill.spill_span", None)
    paths = [write(tmp_path / f"{k}.h5ad", counts(seed=k)) for k in range(2)]
    store = convert(paths, tmp_path / "o.zarr", progress=False)
    np.testing.assert_array_equal(
        ad.read_zarr(store.path).X.toarray(), np.concatenate([counts(seed=k).toarray() for k in range(2)])
    )


def test_genes_asked_for_come_in_the_order_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    (tmp_path / "genes.txt").write_text("gene7\ngene2\nabsent\ngene30\n")
    with pytest.warns(SeddWarning, match="1 of the 4 genes asked for are not there"):
        store = convert(path, tmp_path / "a.zarr", genes=tmp_path / "genes.txt", progress=False)
    assert store.var_names.tolist() == ["gene7", "gene2", "gene30"]
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), counts().toarray()[:, [7, 2, 30]])


def test_inputs_without_a_gene_in_common_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "a.h5ad", counts())
    two = write(tmp_path / "b.h5ad", counts(), genes=[f"ENSG{k}" for k in range(40)])
    with pytest.raises(UserError, match=r"no gene in common.*'ENSG0'.*'gene0'"):
        convert([one, two], tmp_path / "o.zarr", progress=False)
    with pytest.raises(UserError, match="none of the 1 genes"):
        convert(one, tmp_path / "o.zarr", genes=["nothing"], progress=False)
    with pytest.raises(UserError, match="inner or outer"):
        convert(one, tmp_path / "o.zarr", join="left", progress=False)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_limit_cells_takes_the_first(tmp_path: Path, layout: str, shuffle: bool) -> None:
    path = write(tmp_path / "a.h5ad", LAYOUTS[layout](counts()))
    store = convert(path, tmp_path / "a.zarr", limit_cells=23, shuffle=shuffle, progress=False)
    order = store.obs["sedd_cell"].to_numpy() if shuffle else np.arange(23)
    assert sorted(order) == list(range(23))
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), counts().toarray()[order])
    verify(store.path, against=path)


def test_columns_of_obs_are_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    assert list(convert(path, tmp_path / "a.zarr", obs=["kind"], progress=False).obs.columns) == ["kind"]
    with pytest.raises(UserError, match=r"no column 'age'; it has kind"):
        convert(path, tmp_path / "b.zarr", obs=["age"], progress=False)


def test_dry_run_tells_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    assert convert(path, tmp_path / "a.zarr", dry_run=True) is None
    told = capsys.readouterr().out
    assert "70 cells x 40 genes" in told
    assert "uint8" in told
    assert "MB" in told
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5ad"]


def test_nearly_integers_are_rounded_and_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", sparse.csr_matrix(counts().toarray() * (1 + 1e-8)))
    with pytest.warns(SeddWarning, match=r"values were within 1e-06 of an integer and were rounded"):
        store = convert(path, tmp_path / "a.zarr", progress=False)
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), counts().toarray())


def test_raw_is_converted_with_its_own_genes(tmp_path: Path) -> None:
    adata = ad.AnnData(counts().astype(np.float32))
    adata.raw = adata.copy()
    adata = adata[:, :10].copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    store = convert(tmp_path / "a.h5ad", tmp_path / "a.zarr", raw=True, progress=False)
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), counts().toarray())


def test_a_budget_too_small_for_a_conversion_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", counts(20, 5))
    for budget in ("1MB", "63MiB", 1000):
        with pytest.raises(UserError, match="expected at least 64MiB"):
            convert(source, tmp_path / "a.zarr", memory_budget=budget)
    with pytest.raises(UserError, match="'lots' is not a size"):
        convert(source, tmp_path / "a.zarr", memory_budget="lots")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad"]


@pytest.mark.parametrize("shuffle", [False, True])
def test_layers_asked_for_are_kept_beside_the_matrix(tmp_path: Path, shuffle: bool) -> None:
    inputs, spliced, scaled = [], [], []
    for number in range(2):
        matrix = counts(30, 12, seed=number)
        file = ad.AnnData(matrix, layers={"spliced": matrix * 2, "scaled": matrix * 0.25, "left": matrix * 3})
        file.obs_names = [f"{number}-{k}" for k in range(30)]
        file.write_h5ad(tmp_path / f"{number}.h5ad")
        inputs.append(tmp_path / f"{number}.h5ad")
        spliced.append((matrix * 2).toarray())
        scaled.append((matrix * 0.25).toarray())
    store = convert(inputs, tmp_path / "o.zarr", shuffle=shuffle, keep_layers=["spliced", "scaled"], progress=False)
    read = ad.read_zarr(store.path)
    order = read.obs["sedd_cell"].to_numpy() if shuffle else np.arange(60)
    assert sorted(filter(None, read.layers)) == ["scaled", "spliced"]
    np.testing.assert_array_equal(read.layers["spliced"].toarray(), np.concatenate(spliced)[order])
    np.testing.assert_array_equal(read.layers["scaled"].toarray(), np.concatenate(scaled)[order])
    assert read.layers["spliced"].dtype == np.uint8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.h5ad", "1.h5ad", "o.zarr"]
    verify(store.path, against=inputs)
    shard = tmp_path / "o.zarr/layers/spliced/data/c/0"
    damaged = bytearray(shard.read_bytes())
    damaged[10] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match="layers/spliced/data: chunk 0"):
        verify(store.path)
    with pytest.raises(UserError, match="has no layers/none"):
        convert(inputs, tmp_path / "p.zarr", keep_layers=["none"], progress=False)
    assert not list(tmp_path.glob("p.zarr*"))


@pytest.mark.filterwarnings("default::sedd.errors.SeddWarning")
def test_what_an_input_of_an_outer_join_lacks_is_said_of_that_input(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.h5ad", counts(20, 12), genes=[f"g{k}" for k in range(12)])
    part = write(tmp_path / "part.h5ad", counts(20, 9, seed=1), genes=[f"g{k}" for k in range(3, 12)])
    with pytest.warns(SeddWarning, match=r"part\.h5ad: lacks 3 of the 12 genes \(first: 'g0'\); in its cells they are unknown, not 0") as found:
        convert([whole, part], tmp_path / "o.zarr", join="outer", progress=False)
    assert not [w for w in found if "whole.h5ad: lacks" in str(w.message)]
