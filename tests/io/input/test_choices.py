"""What is taken of inputs: names, rounded counts, left-out elements; and what must not pass unsaid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sedd.cli import main
from sedd.errors import NegativeValuesError, SeddWarning, UserError
from sedd.inference.cells import Cells
from sedd.inference.sources import opened
from sedd.io.conversion.counts import to_counts
from sedd.io.conversion.genes import read_gene_list
from sedd.io.convert import convert, ensure_store
from sedd.io.input.base import strip_versions
from sedd.io.verify import verify
from tests.io.h5ads import counts
from tests.io.input.formats import cells, h5ad, tenx_3

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


def fractions(seed: int = 0) -> ad.AnnData:
    """Counts of which some are fractions."""
    adata = cells(counts(seed=seed))
    rng = np.random.default_rng(seed)
    chosen = rng.random(adata.X.nnz) < 0.3
    adata.X.data[chosen] += rng.choice([-0.75, -0.5, 0.25, 0.5], chosen.sum()).astype(np.float32)
    return adata


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_fractions_among_counts_are_named_and_rounded_when_asked(tmp_path: Path, layout: str) -> None:
    adata = fractions()
    expected = np.rint(adata.X.toarray())
    changed = int((adata.X.data != np.rint(adata.X.data)).sum())
    adata.X = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": adata.X.toarray()}[layout]
    path = h5ad(tmp_path / "a", adata)
    with pytest.raises(UserError, match=r"some are fractions, as SoupX or EM leave them. Pass --round to round them"):
        convert(path, tmp_path / "out.zarr", progress=False)
    with pytest.warns(SeddWarning, match=rf"{changed} values were fractions and were rounded; those below a half are now 0"):
        store = convert(path, tmp_path / "out.zarr", round=True, progress=False)
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), expected)
    assert store.nnz == np.count_nonzero(expected)
    assert verify(store.path, against=[path])["changed"] == []


@given(values=st.lists(st.one_of(st.floats(0, 1e5, width=32), st.integers(0, 300)), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_rounding_is_that_of_numpy(values: list[float]) -> None:
    array = np.array(values, np.float32)
    found = to_counts(array, np.dtype(np.uint8), rounding=True)
    assert found.bad == -1
    np.testing.assert_array_equal(found.values, np.rint(array))
    assert found.n_rounded == (array != np.rint(array)).sum()
    for wrong in (-0.25, np.nan, np.inf):
        assert to_counts(np.append(array, np.float32(wrong)), np.dtype(np.uint8), rounding=True).bad == array.size


def test_scaled_values_are_not_sent_to_a_binning_that_refuses_them(tmp_path: Path) -> None:
    adata = cells(counts())
    dense = adata.X.toarray()
    adata.X = ((dense - dense.mean(0)) / (dense.std(0) + 1)).astype(np.float32)
    path = h5ad(tmp_path / "a", adata)
    with pytest.raises(NegativeValuesError, match="it looks scaled") as caught:
        convert(path, tmp_path / "out.zarr", progress=False)
    assert "--binning" not in str(caught.value)
    adata.layers["counts"] = sparse.csr_matrix(dense)
    with pytest.raises(NegativeValuesError, match="Pass --layer counts, which holds counts"):
        convert(h5ad(tmp_path / "b", adata), tmp_path / "out.zarr", progress=False)


def unreadable(path: str, *places: str) -> None:
    """Put elements into a file that no anndata reads."""
    with h5py.File(path, "a") as file:
        for place in places:
            file.create_group(place).attrs.update({"encoding-type": "of-tomorrow", "encoding-version": "9.0"})
            group, name = place.split("/")
            if group in ("obs", "var"):
                file[group].attrs["column-order"] = [*file[group].attrs["column-order"], name]


@pytest.mark.parametrize("place", ["obsm/airr", "uns/tree", "obs/dates", "var/dates"])
def test_what_cannot_be_read_is_named_and_can_be_left_out(tmp_path: Path, place: str) -> None:
    adata = cells(counts())
    adata.obsm["X_pca"], adata.uns["note"] = np.ones((adata.n_obs, 2)), "kept"
    path = h5ad(tmp_path / "a", adata)
    unreadable(path, place)
    with pytest.raises(UserError, match=rf"cannot read {place} .* leave it out with --drop {place}") as caught:
        convert(path, tmp_path / "out.zarr", progress=False)
    assert "opy it again" not in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5ad"]
    read = ad.read_zarr(convert(path, tmp_path / "out.zarr", drop=(place,), progress=False).path)
    np.testing.assert_array_equal(read.X.toarray(), adata.X.toarray())
    pd.testing.assert_frame_equal(read.obs, adata.obs)
    np.testing.assert_array_equal(read.obsm["X_pca"], adata.obsm["X_pca"])
    assert read.uns["note"] == "kept"
    if place.split("/")[0] in ("obsm", "uns"):
        group = place.split("/")[0]
        read = ad.read_zarr(convert(path, tmp_path / "less.zarr", drop=(group,), progress=False).path)
        assert not set(read.obsm if group == "obsm" else read.uns) - {"sedd"}


def test_what_is_left_out_is_not_looked_at_for_names_of_genes_either(tmp_path: Path) -> None:
    one, other = cells(counts()), cells(counts(seed=3))
    other.var_names, other.obs_names = other.var["gene_ids"].tolist(), [f"other{k}" for k in range(other.n_obs)]
    paths = [h5ad(tmp_path / "one", one), h5ad(tmp_path / "other", other)]
    for path in paths:
        unreadable(path, "var/dates")
    with pytest.raises(UserError, match="Pass --gene_names gene_ids"):
        convert(paths, tmp_path / "out.zarr", drop=("var/dates",), progress=False)
    convert(paths[0], tmp_path / "out.zarr", drop=("var/dates",), progress=False)
    with pytest.raises(UserError, match="has no gene in common"):
        convert(paths[1], tmp_path / "out.zarr", append=True, drop=("var/dates",), progress=False)


@pytest.mark.parametrize("make", [h5ad, tenx_3], ids=["h5ad", "10x"])
def test_a_column_names_the_genes_and_is_left_out_then(make: Callable[..., str], tmp_path: Path) -> None:
    adata = cells(counts())
    path = make(tmp_path / "a", adata)
    if make is h5ad:
        unreadable(path, "var/dates")
    drop = ("var/dates", "var/gene_ids") if make is h5ad else ("var/gene_ids",)
    adata.var["None"] = 1.0
    plain = convert(make(tmp_path / "b", adata), tmp_path / "plain.zarr", drop=("var/None",) if make is h5ad else (), progress=False)
    assert "None" not in ad.read_zarr(plain.path).var
    read = ad.read_zarr(convert(path, tmp_path / "out.zarr", gene_names="gene_ids", drop=drop, progress=False).path)
    assert read.var_names.tolist() == adata.var["gene_ids"].tolist()
    assert read.var["var_names"].tolist() == adata.var_names.tolist()
    assert "gene_ids" not in read.var
    np.testing.assert_array_equal(read.X.toarray(), adata.X.toarray())
    assert verify(tmp_path / "out.zarr", path, progress=False) is not None


def test_leaving_out_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    adata = cells(counts())
    adata.obsm["X_pca"] = np.ones((adata.n_obs, 2))
    path = h5ad(tmp_path / "a", adata)
    for drop, says in (("obsm/X_pac", "has no obsm/X_pac .*there are: obsm/X_pca"), ("X", "expected obsm, uns, or an element"), ("obs", "expected obsm, uns")):
        with pytest.raises(UserError, match=says):
            convert(path, tmp_path / "out.zarr", drop=(drop,), progress=False)


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ("gene A\ng2\n", ["gene A", "g2"]),
        ("g1\tENSG1\ng2\tENSG2\n", ["g1", "g2"]),
        ("\ufeffg1\r\ng2\r\n\r\n", ["g1", "g2"]),
        (" g1 \n\n\tx\ng1\n", ["g1"]),
    ],
)
def test_a_list_of_genes_is_read_by_one_rule(tmp_path: Path, raw: str, names: list[str]) -> None:
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "genes.txt").write_bytes(raw.removeprefix("\ufeff" if encoding == "utf-16" else "").encode(encoding))
        assert read_gene_list(tmp_path / "genes.txt") == names


def test_a_list_of_genes_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_bytes(b"g1\ncaf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8 text .byte 0xe9 in line 2"):
        read_gene_list(tmp_path / "genes.txt")
    (tmp_path / "genes.txt").write_bytes("gène".encode("utf-16")[:-1])
    with pytest.raises(UserError, match="not UTF-16 text"):
        read_gene_list(tmp_path / "genes.txt")


@given(st.from_regex(r"ENS[A-Z]{0,3}[GT][0-9]{11}(_PAR_Y)?", fullmatch=True), st.integers(0, 99))
def test_only_versions_of_identifiers_are_taken_off(name: str, version: int) -> None:
    own, _, rest = name.partition("_")
    versioned = f"{own}.{version}" + (f"_{rest}" if rest else "")
    assert strip_versions([versioned, name]) == [name, name]
    others = ["RP11-34P13.7", "HLA-DRB1", "AC012345.1", "ENSEMBL.1", "7SK.2"]
    assert strip_versions(others) == others


def test_names_that_a_column_lacks_stay_those_of_the_index(tmp_path: Path) -> None:
    adata = cells(counts())
    names = pd.Series([f"sym{k}" for k in range(adata.n_vars)], adata.var_names, dtype=object)
    names.iloc[3], names.iloc[5] = None, ""
    adata.var["symbol"] = pd.Categorical(names)
    store = convert(h5ad(tmp_path / "a", adata), tmp_path / "out.zarr", gene_names="symbol", progress=False)
    expected = [name if k not in (3, 5) else f"gene{k}" for k, name in enumerate(f"sym{k}" for k in range(adata.n_vars))]
    assert store.var_names.tolist() == expected


def two(tmp_path: Path, in_common: int) -> tuple[str, str]:
    one, other = cells(counts()), cells(counts(seed=3))
    other.obs_names = [f"other{k}" for k in range(other.n_obs)]
    other.var["symbol"] = other.var_names
    other.var_names = [*other.var_names[:in_common], *(f"x{k}" for k in range(other.n_vars - in_common))]
    return h5ad(tmp_path / "one", one), h5ad(tmp_path / "other", other)


@pytest.mark.parametrize("join", ["inner", "outer"])
@pytest.mark.parametrize(("in_common", "said"), [(0, "no gene"), (1, "1 of its 40 genes"), (3, "3 of its 40 genes")])
def test_inputs_with_hardly_a_gene_in_common_are_refused_with_a_way_out(tmp_path: Path, join: str, in_common: int, said: str) -> None:
    paths = two(tmp_path, in_common)
    with pytest.raises(UserError, match=rf"has {said} in common .* Pass --gene_names symbol"):
        convert(paths, tmp_path / "out.zarr", join=join, progress=False)
    assert not list(tmp_path.glob("out*"))
    with pytest.warns(SeddWarning, match="one.h5ad: var has no column 'symbol'; the names of its index are used"):
        store = convert(paths, tmp_path / "out.zarr", join=join, gene_names="symbol", progress=False)
    assert store.n_vars == 40


def test_few_genes_in_common_are_mentioned_and_chosen_ones_are_taken(tmp_path: Path) -> None:
    paths = two(tmp_path, 10)
    with pytest.warns(SeddWarning, match="has 10 of its 40 genes in common"):
        assert convert(paths, tmp_path / "out.zarr", progress=False).n_vars == 10
    paths = two(tmp_path, 1)
    assert convert(paths, tmp_path / "one.zarr", genes=["gene0"], progress=False).n_vars == 1


def test_versions_are_suggested_where_they_keep_genes_apart(tmp_path: Path) -> None:
    one, other = cells(counts()), cells(counts(seed=3))
    one.var_names = one.var["gene_ids"].tolist()
    other.var_names = [name.split(".")[0] for name in other.var["gene_ids"]]
    other.obs_names = [f"other{k}" for k in range(other.n_obs)]
    paths = [h5ad(tmp_path / "one", one[:, 1:].copy()), h5ad(tmp_path / "other", other)]
    with pytest.raises(UserError, match="Pass --strip_version"):
        convert(paths, tmp_path / "out.zarr", progress=False)
    assert convert(paths, tmp_path / "out.zarr", strip_version=True, progress=False).n_vars == 39


@pytest.mark.parametrize(
    ("spell", "way_out"),
    [
        (str.lower, r"40 names of .* if capitals did not matter"),
        (lambda name: f"GRCh38_{name}", r"40 names of .* without what stands before: .*removeprefix\('GRCh38_'\)"),
        (lambda name: f"mm10___{name}", r"removeprefix\('mm10___'\)"),
        (lambda name: f"{name}x", "Do both use the same kind of names"),
    ],
)
def test_names_that_are_spelled_in_another_way_are_noticed(spell: Callable[[str], str], way_out: str, tmp_path: Path) -> None:
    one, other = cells(counts()), cells(counts(seed=3))
    one.var_names = one.var_names.str.upper()
    other.var_names = [spell(name) for name in one.var_names]
    other.obs_names = [f"other{k}" for k in range(other.n_obs)]
    paths = [h5ad(tmp_path / "one", one), h5ad(tmp_path / "other", other)]
    for pair in (paths, paths[::-1]):
        with pytest.raises(UserError, match=way_out if pair is paths or "remove" not in way_out else "before it|removeprefix"):
            convert(pair, tmp_path / "out.zarr", progress=False)
    convert(paths[0], tmp_path / "store.zarr", progress=False)
    with pytest.raises(UserError, match=way_out):
        convert(paths[1], tmp_path / "store.zarr", append=True, progress=False)


def test_the_same_input_twice_is_an_error_by_whatever_name(tmp_path: Path) -> None:
    path = Path(h5ad(tmp_path / "a", cells(counts())))
    (tmp_path / "link.h5ad").symlink_to(path)
    (tmp_path / "folder").mkdir()
    for other in (path, tmp_path / "link.h5ad", tmp_path / "folder" / ".." / "a.h5ad"):
        with pytest.raises(UserError, match="is given twice|are the same input"):
            convert([path, other], tmp_path / "out.zarr", progress=False)
    with pytest.raises(UserError, match=r"a name that ends in .zarr. Name the output last"):
        convert(path, tmp_path / "b.h5ad", progress=False)
    store = convert(path, tmp_path / "out.zarr", progress=False)
    with pytest.raises(UserError, match="is an input; expected another name for the store"):
        convert(store.path, store.path, overwrite=True, progress=False)
    assert ad.read_zarr(store.path).n_obs == 70


def test_names_of_inputs_are_as_many_as_these(tmp_path: Path) -> None:
    path = h5ad(tmp_path / "a", cells(counts()))
    with pytest.raises(UserError, match=r"--keys names 2 inputs \(x y\), but 1 are given"):
        convert(path, tmp_path / "out.zarr", keys=("x", "y"), progress=False)
    with pytest.raises(UserError, match="names the same input twice"):
        convert(path, tmp_path / "out.zarr", keys=("x", "x"), progress=False)
    store = convert(path, tmp_path / "out.zarr", keys=("x",), progress=False)
    assert set(store.obs["source"]) == {"x"}


def test_each_choice_of_settings_has_an_automatic_store_of_its_own(tmp_path: Path) -> None:
    one, other = two(tmp_path, 40)
    tenx = tenx_3(tmp_path / "b", cells(counts()))
    made = [
        ensure_store(one, progress=False),
        ensure_store(one, gene_names="gene_ids", progress=False),
        ensure_store(one, gene_names="gene_ids", strip_version=True, progress=False),
        ensure_store([one, other], progress=False),
        ensure_store([one, other], keys=("a", "b"), progress=False),
        ensure_store(tenx, progress=False),
    ]
    assert len({store.path for store in made}) == len(made)
    assert Path(made[0].path).name == "one.sedd.zarr"
    assert Path(made[5].path).name == "b.h5.sedd.zarr"
    stamps = [(Path(store.path) / "zarr.json").stat().st_mtime_ns for store in made]
    assert ensure_store([one, other], keys=("a", "b"), progress=False).path == made[4].path
    assert [(Path(store.path) / "zarr.json").stat().st_mtime_ns for store in made] == stamps


def test_a_store_refuses_settings_that_it_was_not_made_with(tmp_path: Path) -> None:
    adata = cells(counts())
    adata.layers["counts"] = adata.X.copy()
    path = h5ad(tmp_path / "a", adata)
    store = convert(path, tmp_path / "out.zarr", layer="counts", progress=False)
    assert ensure_store(store.path, layer="counts", progress=False).path == store.path
    for settings_, said in (({"layer": "cuonts"}, "--layer cuonts"), ({"gene_names": "gene_ids"}, "--gene_names gene_ids"), ({"raw": True}, "--raw")):
        with pytest.raises(UserError, match=rf"is a store, made without `{said}`"):
            ensure_store(store.path, progress=False, **settings_)  # type: ignore[arg-type]


def test_x_is_the_name_of_x_wherever_a_layer_is_asked_for(tmp_path: Path) -> None:
    """It is what messages offer; a layer that is called X goes before it."""
    adata = cells(counts())
    path = h5ad(tmp_path / "a", adata)
    plain = ensure_store(path, progress=False)
    named = ensure_store(path, layer="X", progress=False)
    assert ensure_store(named.path, layer="X", progress=False).fingerprint == named.fingerprint
    rows = np.arange(plain.n_obs)
    for here, there in zip(plain.read_cells(rows), named.read_cells(rows), strict=True):
        np.testing.assert_array_equal(here, there)
    convert([path], tmp_path / "kept.zarr", layer="X", progress=False)
    adata.obs_names = [f"more{i}" for i in range(adata.n_obs)]
    grown = convert([h5ad(tmp_path / "b", adata)], tmp_path / "kept.zarr", append=True, progress=False)
    assert grown is not None
    assert grown.n_obs == 2 * adata.n_obs
    adata.layers["X"] = adata.X * 2
    called = ensure_store(h5ad(tmp_path / "c", adata), layer="X", progress=False)
    np.testing.assert_array_equal(called.read_cells(rows)[2], 2 * plain.read_cells(rows)[2])


def test_messages_offer_only_what_holds_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not what tasks of sedd made, of which some is whole numbers; and as a shell takes it."""
    adata = cells(counts())
    shape, log = adata.shape, np.log1p(adata.X.toarray())
    adata.layers["my counts"] = adata.X.copy()
    others = {"log": log, "nothing": np.zeros(shape), "sedd_hidden": np.ones(shape, np.uint8), "sedd_sample_0": adata.X.copy()}
    adata.layers.update(others)
    adata.X = sparse.csr_matrix(log)
    path = h5ad(tmp_path / "a", adata)
    with pytest.raises(UserError, match=r"Pass --layer 'my counts', which holds counts, or keep"):
        convert(path, tmp_path / "a.zarr", progress=False)
    assert main(["info", path]) == 0
    assert f"sedd train --data_path {path} --layer 'my counts'" in capsys.readouterr().out
    for data in (ad.read_h5ad(path), path):
        with opened(data) as source, pytest.raises(UserError, match=r"Pass where they are: --layer 'my counts'\.$"):
            Cells(source, adata.var_names.to_numpy()).counts(0, 9)
    del adata.layers["my counts"]
    for data in (adata, h5ad(tmp_path / "b", adata)):
        with opened(data) as source, pytest.raises(UserError, match=r"None of its other matrices looks like counts \(.*--layer log"):
            Cells(source, adata.var_names.to_numpy()).counts(0, 9)
    adata.X = adata.layers["sedd_sample_0"]
    adata.layers["bad"] = log
    with pytest.raises(UserError, match=r"Pass --layer X, which holds counts"):
        convert(h5ad(tmp_path / "c", adata), tmp_path / "a.zarr", layer="bad", progress=False)
