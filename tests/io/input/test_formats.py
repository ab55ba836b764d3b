"""Every format gives the same store, by every way of naming genes; what cannot be read is named."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from sedd.cli import main
from sedd.errors import SeddWarning, UserError
from sedd.inference.output_place import check_output
from sedd.io.convert import convert
from sedd.io.input.opening import input_fingerprint, open_input
from sedd.io.verify import verify
from tests.io.h5ads import counts
from tests.io.input.formats import TYPES, WRITERS, cells, h5ad, h5mu, loom, mtx_2, mtx_3, tenx_2, tenx_3, zarr_2

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")

every_format = pytest.mark.parametrize("kind", WRITERS)


@every_format
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_format_gives_the_same_store(tmp_path: Path, kind: str, shuffle: bool) -> None:
    adata = cells(counts())
    path = WRITERS[kind](tmp_path / "in", adata)
    store = convert(path, tmp_path / "out.zarr", shuffle=shuffle, progress=False)
    read = ad.read_zarr(store.path)
    order = read.obs["sedd_cell"].to_numpy() if shuffle else np.arange(adata.n_obs)
    np.testing.assert_array_equal(read.X.toarray(), adata.X.toarray()[order])
    assert read.var_names.tolist() == adata.var_names.tolist()
    assert read.obs_names.tolist() == adata.obs_names[order].tolist()
    assert read.var["gene_ids"].tolist() == adata.var["gene_ids"].tolist()
    if "10x" not in kind and "mtx" not in kind:
        assert read.obs["batch"].tolist() == adata.obs["batch"].to_numpy()[order].tolist()
    assert verify(store.path, against=[path])["changed"] == []


@every_format
def test_names_come_from_a_column_without_versions_in_every_format(tmp_path: Path, kind: str) -> None:
    adata = cells(counts())
    path = WRITERS[kind](tmp_path / "in", adata)
    store = convert(path, tmp_path / "out.zarr", gene_names="gene_ids", strip_version=True, progress=False)
    assert store.var_names.tolist() == [name.split(".")[0] for name in adata.var["gene_ids"]]
    assert store.var["var_names"].tolist() == adata.var_names.tolist()
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), adata.X.toarray())
    with pytest.raises(UserError, match=r"no column 'symbol' for --gene_names; its columns are: .*gene_ids"):
        convert(path, tmp_path / "no.zarr", gene_names="symbol", progress=False)
    assert not list(tmp_path.glob("no.zarr*"))


@every_format
@given(
    n_obs=st.integers(1, 30), n_vars=st.integers(1, 20), density=st.sampled_from([0.05, 0.5, 1.0]), largest=st.sampled_from([1, 255, 256, 70000]),
    seed=st.integers(0, 99), lo=st.floats(0, 1), hi=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_every_format_are_those_of_scipy(
    tmp_path_factory: pytest.TempPathFactory, kind: str, n_obs: int, n_vars: int, density: float, largest: int, seed: int, lo: float, hi: float
) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, largest + 1, (n_obs, n_vars)) * (rng.random((n_obs, n_vars)) < density)
    path = WRITERS[kind](tmp_path_factory.mktemp("any") / "in", cells(sparse.csr_matrix(dense)))
    first, last = sorted((int(lo * n_obs), int(hi * n_obs)))
    with open_input(path) as file:
        assert (file.n_obs, file.n_vars()) == dense.shape
        indptr, indices, values = file.matrix().read_rows(first, last)
    got = sparse.csr_matrix((values, indices, indptr), shape=(last - first, n_vars)).toarray()
    np.testing.assert_array_equal(got, dense[first:last])


@pytest.mark.parametrize("writer", [tenx_3, mtx_3])
def test_of_several_types_of_features_genes_are_taken_and_others_can_be(tmp_path: Path, writer) -> None:  # type: ignore[no-untyped-def]
    adata = cells(counts())
    own = np.array(TYPES)[(np.arange(adata.n_vars) % 5 == 4).astype(int)]
    adata.var["feature_types"] = own
    path = writer(tmp_path / "in", adata)
    for modality, taken in ((None, TYPES[0]), *((name, name) for name in TYPES)):
        with pytest.warns(SeddWarning, match="features are of another type"):
            store = convert(path, tmp_path / f"{modality}.zarr", modality=modality, progress=False)
        np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), adata.X.toarray()[:, own == taken])
        assert store.var_names.tolist() == adata.var_names[own == taken].tolist()
        assert set(store.var["feature_types"]) == {taken}
        assert verify(store.path, against=[path])["changed"] == []
    with pytest.raises(UserError, match=r"no features of type 'Peaks' .*'Gene Expression', 'Antibody Capture'"):
        convert(path, tmp_path / "no.zarr", modality="Peaks", progress=False)


def test_an_h5ad_of_genes_and_antibodies_says_that_both_are_taken(tmp_path: Path) -> None:
    adata = cells(counts())
    adata.var["feature_types"] = np.array(TYPES)[(np.arange(adata.n_vars) % 5 == 4).astype(int)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.warns(SeddWarning, match=r"2 types of features .*all taken as genes.*adata.var\['feature_types'\] == 'Gene Expression'"):
        store = convert(tmp_path / "a.h5ad", tmp_path / "a.zarr", progress=False)
    assert store.n_vars == adata.n_vars


def test_a_modality_of_mudata_is_named_when_there_are_several(tmp_path: Path) -> None:
    rna, adt = cells(counts()), cells(counts(n_vars=7, seed=5))
    path = h5mu(tmp_path / "in", rna)
    with h5py.File(path, "a") as file:
        ad.io.write_elem(file["mod"], "adt", adt)
    with pytest.raises(UserError, match=r"is MuData .* modalities (adt, rna|rna, adt); choose one with --modality"):
        convert(path, tmp_path / "out.zarr", progress=False)
    with pytest.raises(UserError, match="no modality 'atac'"):
        convert(path, tmp_path / "out.zarr", modality="atac", progress=False)
    store = convert(path, tmp_path / "out.zarr", modality="adt", progress=False)
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), adt.X.toarray())
    with pytest.raises(UserError, match="has no modalities; leave --modality rna out"):
        convert(h5ad(tmp_path / "plain", rna), tmp_path / "no.zarr", modality="rna", progress=False)


def test_inputs_that_need_other_choices_are_converted_alone_and_then_together(tmp_path: Path) -> None:
    one, two = cells(counts()), cells(counts(seed=5))
    plain = h5ad(tmp_path / "plain", one)
    with h5py.File(several := h5mu(tmp_path / "several", two), "a") as file:
        ad.io.write_elem(file["mod"], "adt", cells(counts(n_vars=7)))
    two.layers["counts"], two.X = two.X.copy(), two.X * np.float32(0.3)
    layered = h5ad(tmp_path / "layered", two)
    for other, chosen in ((several, {"modality": "rna"}), (several, {}), (layered, {"layer": "counts"})):
        with pytest.raises(UserError, match="One choice holds for all inputs: where they differ, convert each alone and give the stores"):
            convert([plain, other], tmp_path / "out.zarr", progress=False, **chosen)  # type: ignore[arg-type]
    alone = convert(layered, tmp_path / "alone.zarr", layer="counts", progress=False)
    both = ad.read_zarr(convert([plain, alone.path], tmp_path / "both.zarr", progress=False).path)
    grown = convert(plain, tmp_path / "grown.zarr", progress=False).path
    with pytest.raises(UserError, match="--layer: .* convert the file alone and append that store"):
        convert(layered, grown, layer="counts", append=True, progress=False)
    convert(alone.path, grown, append=True, progress=False)
    for found in (both, ad.read_zarr(grown)):
        np.testing.assert_array_equal(found.X.toarray(), np.concatenate([one.X.toarray(), two.layers["counts"].toarray()]))


def test_a_table_of_text_comes_with_the_line_that_makes_an_h5ad_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adata = cells(counts())
    monkeypatch.chdir(tmp_path)
    adata.to_df().T.to_csv("genes.tsv.gz", sep="\t")
    with pytest.raises(UserError, match="is a file of text") as found:
        convert("genes.tsv.gz", "out.zarr", progress=False)
    line = re.search(r"In Python (.*) makes one of a table", str(found.value))
    assert line is not None
    exec("import anndata, pandas; " + line[1].replace("index_col=0)", "index_col=0).T"))
    store = convert("genes.h5ad", "out.zarr", progress=False)
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), adata.X.toarray())


def test_a_layer_of_a_loom_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    adata = cells(counts())
    path = loom(tmp_path / "in", adata)
    store = convert(path, tmp_path / "out.zarr", layer="spliced", progress=False)
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), adata.X.toarray())
    with pytest.raises(UserError, match="has no layers/unspliced; it has X, --layer spliced"):
        convert(path, tmp_path / "no.zarr", layer="unspliced", progress=False)


def test_one_genome_of_several_is_named(tmp_path: Path) -> None:
    adata = cells(counts())
    path = tenx_2(tmp_path / "in", adata)
    with h5py.File(path, "a") as file:
        file.copy("GRCh38", "mm10")
        file["mm10/data"][:] = 1
    with pytest.raises(UserError, match="holds the genomes GRCh38, mm10; choose one with --modality"):
        convert(path, tmp_path / "out.zarr", progress=False)
    store = convert(path, tmp_path / "out.zarr", modality="mm10", progress=False)
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), adata.X.toarray() > 0)


def test_formats_are_joined(tmp_path: Path) -> None:
    one, two = cells(counts()), cells(counts(seed=7))[:, ::-1].copy()
    two.obs_names = [f"other{i}" for i in range(two.n_obs)]
    inputs = [tenx_3(tmp_path / "a", one), zarr_2(tmp_path / "b", two)]
    store = convert(inputs, tmp_path / "out.zarr", keys=("first", "second"), progress=False)
    expected = ad.concat([one, two], label="source", keys=["first", "second"])
    read = ad.read_zarr(store.path)
    np.testing.assert_array_equal(read.X.toarray(), expected[:, read.var_names].X.toarray())
    assert read.obs["source"].tolist() == expected.obs["source"].tolist()


def test_a_folder_of_several_matrices_is_not_guessed_about(tmp_path: Path) -> None:
    path = Path(mtx_2(tmp_path / "in", cells(counts())))
    for name in ("matrix.mtx", "genes.tsv", "barcodes.tsv"):
        (path.parent / f"GSM2_{name}").write_bytes((path.parent / f"GSM1_{name}").read_bytes())
    with pytest.raises(UserError, match=r"several matrices \(GSM1_matrix.mtx, GSM2_matrix.mtx\)"):
        convert(path.parent, tmp_path / "out.zarr", progress=False)
    (path.parent / "GSM2_barcodes.tsv").unlink()
    with pytest.raises(UserError, match=r"none of GSM2_barcodes.tsv, GSM2_barcodes.tsv.gz"):
        convert(path.parent / "GSM2_matrix.mtx", tmp_path / "out.zarr", progress=False)


def test_a_matrix_of_cells_by_genes_is_refused(tmp_path: Path) -> None:
    path = Path(mtx_2(tmp_path / "in", cells(counts(20, 9))))
    names = (path.parent / "GSM1_genes.tsv").read_text().splitlines()
    (path.parent / "GSM1_genes.tsv").write_text("\n".join(names[:-1]) + "\n")
    with pytest.raises(UserError, match=r"is 9 x 20, but GSM1_genes.tsv has 8 rows and GSM1_barcodes.tsv 20"):
        convert(path, tmp_path / "out.zarr", progress=False)


@every_format
def test_an_input_is_known_by_all_of_its_files(tmp_path: Path, kind: str) -> None:
    path = Path(WRITERS[kind](tmp_path / "in", cells(counts())))
    root = path.parent if kind == "mtx v2" else path
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    seen = {input_fingerprint(str(path))}
    for number, file in enumerate(files):
        os.utime(file, ns=(number, number))
        seen.add(input_fingerprint(str(path)))
    assert len(seen) == len(files) + 1


def test_what_is_no_input_is_named_for_what_it_is(tmp_path: Path) -> None:
    whole = h5ad(tmp_path / "a", cells(counts()))
    zipped = tmp_path / "a.h5ad.gz"
    zipped.write_bytes(gzip.compress(Path(whole).read_bytes()))
    archive = tmp_path / "z.zarr.zip"
    archive.write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "empty.h5ad").touch()
    (tmp_path / "seurat.rds").write_bytes(b"\x1f\x8b of R")
    with h5py.File(tmp_path / "s.h5seurat", "w") as file:
        file.create_group("assays")
    (tmp_path / "folder").mkdir()
    says = {
        zipped: "compressed with gzip.*gunzip",
        archive: "zip archive",
        tmp_path / "empty.h5ad": r"empty \(0 bytes\)",
        tmp_path / "seurat.rds": "file of R",
        tmp_path / "s.h5seurat": "found assays.*SeuratDisk",
        tmp_path / "folder": "neither a Zarr store nor a matrix.mtx",
        tmp_path / "absent.loom": "there is no such file",
    }
    for path, said in says.items():
        with pytest.raises(UserError, match=said):
            convert(path, tmp_path / "out.zarr", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_a_locked_file_is_said_to_be_locked(tmp_path: Path) -> None:
    path = h5ad(tmp_path / "a", cells(counts()))
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import h5py, sys; f = h5py.File({path!r}, 'r+'); print('open', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == b"open"
    try:
        with pytest.raises(UserError, match="is locked, as another program has it open for writing"):
            convert(path, tmp_path / "out.zarr", progress=False)
    finally:
        holder.communicate(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert convert(path, tmp_path / "out.zarr", progress=False) is not None


@every_format
def test_an_input_of_every_format_is_described(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    adata = cells(counts())
    path = WRITERS[kind](tmp_path / "in", adata)
    assert main(["info", path]) == 0
    said = capsys.readouterr().out
    layout = "dense" if kind == "loom" else "csr"
    for word in ("cell0, cell1, cell2", "gene0, gene1, gene2", "gene_ids", f"counts (70 x 40, {layout}"):
        assert word in said
    assert f"sedd train --data_path {path}" in said


def test_a_description_says_which_matrix_holds_counts_and_what_may_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = cells(counts())
    adata.layers["raw counts"] = adata.X.copy()
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray() * np.float32(1.7)))
    adata.var = adata.var.assign(feature_name=adata.var_names).set_index("gene_ids")
    path = h5ad(tmp_path / "a", adata)
    assert main(["info", path]) == 0
    said = capsys.readouterr().out
    assert "no counts: it looks log-normalised" in said
    assert f"sedd train --data_path {path} --layer 'raw counts'; with --gene_names feature_name" in said
    with h5py.File(path, "a") as file:
        del file["layers/raw counts"]
    assert main(["info", path]) == 0
    assert "none of its matrices looks like counts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "looks", "way"),
    [(-1, "counts of which some are negative", "set them to 0"), (1.5, "counts of which some are fractions", "--round")],
)
def test_single_values_among_counts_are_called_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, looks: str, way: str
) -> None:
    adata = cells(counts())
    adata.X.data[0] = value
    adata.obs_names = ["same", *adata.obs_names[1:-1], "same"]
    path = h5ad(tmp_path / "a", adata)
    assert main(["info", path]) == 0
    said = capsys.readouterr().out
    assert f"no counts: it looks like {looks}" in said
    assert "; 1 repeated" in said
    assert (f"sedd train --data_path {path} --round" in said) == (way == "--round")
    with pytest.raises(UserError, match=f"it looks like {looks}.*{way}") as refused:
        convert(path, tmp_path / "out.zarr", progress=False)
    assert "scaled" not in said + str(refused.value)


def test_whole_numbers_too_large_for_counts_are_not_called_fractions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = cells(counts())
    adata.X = adata.X.astype(np.int64)
    adata.X.data[0] = 1 << 33
    assert main(["info", h5ad(tmp_path / "a", adata)]) == 0
    said = capsys.readouterr().out
    assert "too large for counts (such as 8589934592; the limit is 4294967295)" in said
    assert "--round" not in said


def test_every_modality_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = h5mu(tmp_path / "in", cells(counts()))
    with h5py.File(path, "a") as file:
        ad.io.write_elem(file["mod"], "adt", cells(counts(n_vars=7, seed=5)))
    assert main(["info", path]) == 0
    said = capsys.readouterr().out
    for word in ("70 x 40", "70 x 7", f"sedd train --data_path {path} --modality adt"):
        assert word in said


def test_info_says_of_what_is_no_input_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h5ad(tmp_path / "a", cells(counts()))
    wanted = {"m.csv": "is a file of text", "m.csv.gz": "is a file of text", "m.h5ad.gz": "is compressed with gzip", "m.zip": "is a zip archive", "m": "no HDF5"}
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.write(tmp_path / "a.h5ad", "a.h5ad")
    (tmp_path / "m.csv").write_text("cell,gene\na,1\n")
    (tmp_path / "m").write_text("cell,gene\na,1\n")
    for name, source in (("m.csv.gz", "m.csv"), ("m.h5ad.gz", "a.h5ad")):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / source).read_bytes()))
    for name, said in wanted.items():
        for arguments in (["info", str(tmp_path / name)], ["convert", str(tmp_path / name), str(tmp_path / "b.zarr")]):
            assert main(arguments) == 2
            assert said in capsys.readouterr().err


def test_a_slash_at_the_end_of_a_path_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = h5ad(tmp_path / "a", cells(counts()))
    for arguments in (["info", f"{path}/"], ["convert", f"{path}/", str(tmp_path / "b.zarr")], ["info", f"{tmp_path}/b.zarr/"]):
        assert main(arguments) == 0, capsys.readouterr().err
    with pytest.raises(UserError, match="is the data itself"):
        check_output(path, overwrite=True, data=f"{path}/")


def test_a_link_to_nowhere_and_a_home_that_is_not_expanded_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").symlink_to("gone.h5ad")
    with pytest.raises(UserError, match="is a link to gone.h5ad, which is not there"):
        open_input(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match="~ stands for a home in shells only"):
        open_input("~/a.h5ad")


def test_names_with_slashes_in_a_loom_are_read(tmp_path: Path) -> None:
    adata = cells(counts())
    path = loom(tmp_path / "a", adata)
    with h5py.File(path, "r+") as file:
        file["layers/un/spliced"] = file["matrix"][:] * 2
        file["col_attrs/G1/S"] = np.arange(adata.n_obs)
    store = convert(path, tmp_path / "a.zarr", layer="un/spliced", progress=False)
    assert store is not None
    assert np.array_equal(store.obs["G1/S"], np.arange(adata.n_obs))
    assert store.nnz == adata.X.nnz and ad.read_zarr(store.path).X.sum() == 2 * adata.X.sum()


def test_an_attribute_of_records_in_a_loom_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    adata = cells(counts())
    path = loom(tmp_path / "a", adata)
    with h5py.File(path, "r+") as file:
        file["col_attrs/pair"] = np.zeros(adata.n_obs, [("a", "i4"), ("b", "f4")])
    with pytest.raises(UserError, match=r"col_attrs/pair \(it holds records of a, b, which no column can\). Leave it out with --drop obs/pair"):
        convert(path, tmp_path / "a.zarr", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["a.loom"]
    store = convert(path, tmp_path / "a.zarr", progress=False, drop=("obs/pair",))
    assert store is not None and store.n_obs == adata.n_obs
