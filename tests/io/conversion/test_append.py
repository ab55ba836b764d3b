"""Cells appended to a store: as if all had been converted together, without touching the shards that are full."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sedd.errors import SeddWarning, UserError
from sedd.io.conversion import append, extend
from sedd.io.convert import convert
from sedd.io.loader import CellLoader
from sedd.io.store import CellStore, store_facts
from sedd.io.verify import verify
from tests.io.conversion.test_convert_disturbed import in_small_shards
from tests.io.conversion.test_convert_killed import changes_of, files_of, processes, run
from tests.io.h5ads import counts, write

__all__ = ["processes"]
pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


def table(n: int, seed: int, **columns: Any) -> pd.DataFrame:
    """Cells' tables whose columns have other categories, types and missing values in each."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(rng.choice(["a", "b", f"only{seed}"], n), categories=["b", "a", f"only{seed}", "unused"]),
            "depth": rng.random(n).astype(np.float32),
            "number": rng.integers(0, 9, n) if seed % 2 else rng.random(n),
            "text": rng.choice(["x", "y"], n).astype(object),
            "maybe": pd.array(rng.choice([1, 2], n), dtype="Int64"),
            "flag": rng.random(n) < 0.5,
            f"own{seed}": rng.random(n),
            **columns,
        },
        index=[f"s{seed}_{k}" for k in range(n)],
    )
    obs.loc[obs.index[::7], "text"] = None
    obs.loc[obs.index[::5], "maybe"] = pd.NA
    return obs


def write_rich(path: Path, n: int, seed: int, n_vars: int = 40, **columns: Any) -> str:
    """Write a file with tables, an embedding and a layer."""
    rng = np.random.default_rng(seed)
    matrix = counts(n, n_vars, seed=seed)
    adata = ad.AnnData(
        matrix,
        obs=table(n, seed, **columns),
        var=pd.DataFrame({"length": np.arange(n_vars)}, index=[f"gene{k}" for k in range(n_vars)]),
        layers={"spliced": sparse.csr_matrix(matrix.toarray() // 2)},
        obsm={"X_pca": rng.random((n, 3)), **({"X_umap": rng.random((n, 2))} if seed == 1 else {})},
        uns={"title": f"file {seed}", "same": 7},
    )
    adata.write_h5ad(path)
    return str(path)


def same_statistics(one: CellStore, other: CellStore) -> None:
    assert one.fingerprint == other.fingerprint
    assert (one.nnz, one.max_value, one.dtype) == (other.nnz, other.max_value, other.dtype)
    for name, values in one.cell_table().items():
        np.testing.assert_array_equal(values, other.cell_table()[name])
        assert values.dtype == other.cell_table()[name].dtype
    pd.testing.assert_frame_equal(one.gene_stats(), other.gene_stats())
    if one.is_counts:
        assert (one.gene_histogram() != other.gene_histogram()).nnz == 0


@pytest.mark.parametrize("layers", [(), ("spliced",)])
def test_a_grown_store_is_what_a_conversion_of_all_inputs_makes(layers: tuple[str, ...], tmp_path: Path) -> None:
    paths = [write_rich(tmp_path / f"{seed}.h5ad", n, seed) for seed, n in ((1, 300), (2, 90), (3, 40))]
    convert(paths[0], tmp_path / "grown.zarr", keep_layers=layers, progress=False)
    for path in paths[1:]:
        grown = convert(path, tmp_path / "grown.zarr", append=True, progress=False)
    together = convert(paths, tmp_path / "together.zarr", keep_layers=layers, progress=False)
    assert isinstance(grown, CellStore)
    assert isinstance(together, CellStore)
    same_statistics(grown, together)
    mine, theirs = (ad.read_zarr(store.path) for store in (grown, together))
    pd.testing.assert_frame_equal(mine.obs, theirs.obs)
    pd.testing.assert_frame_equal(mine.var, theirs.var)
    files = [ad.read_h5ad(path) for path in paths]
    np.testing.assert_array_equal(mine.X.toarray(), np.vstack([file.X.toarray() for file in files]))
    for name in layers:
        np.testing.assert_array_equal(
            mine.layers[name].toarray(), np.vstack([file.layers[name].toarray() for file in files])
        )
    np.testing.assert_array_equal(mine.obsm["X_pca"], np.vstack([file.obsm["X_pca"] for file in files]))
    np.testing.assert_array_equal(mine.obsm["X_umap"][:300], files[0].obsm["X_umap"])
    assert np.isnan(mine.obsm["X_umap"][300:]).all()
    assert (mine.uns["title"], mine.uns["same"]) == ("file 1", 7)
    assert mine.obs["source"].tolist() == ["1.h5ad"] * 300 + ["2.h5ad"] * 90 + ["3.h5ad"] * 40
    assert verify(grown.path, paths)["cells"] == 430
    assert store_facts(grown.path)["cells when it grew"] == [300, 390]


@pytest.mark.parametrize("codec", ["lz4", pytest.param("zstd", marks=pytest.mark.slow), pytest.param("none", marks=pytest.mark.slow)])
def test_full_shards_stay_the_same_files_and_open_readers_read_on(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_shards(monkeypatch)
    paths = [write(tmp_path / f"{seed}.h5ad", counts(n, 60, seed=seed)) for seed, n in ((1, 200), (2, 90), (3, 40), (4, 1))]
    output = tmp_path / "a.zarr"
    store = convert(paths[0], output, codec=codec, progress=False)
    assert isinstance(store, CellStore)
    expected = ad.read_h5ad(paths[0]).X.toarray()
    with CellLoader(store, batch_size=7, split="all", mask=None, shuffle=False, dtype="float32") as loader:
        batches = iter(loader)
        seen = [next(batches).tokens.numpy()]
        for k, path in enumerate(paths[1:]):
            length = store.x_arrays["data"].shards[0]
            full = [output / "X" / name / "c" / str(n) for name in ("data", "indices") for n in range(store.nnz // length)]
            assert len(full) >= 4
            before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in full}
            convert(path, output, append=True, progress=False)
            assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in full} == before
            seen += [batch.tokens.numpy() for batch in itertools.islice(batches, 5 * (k + 1))]
            store.close()
            indptr, indices, data = store.read_rows(0, 200)
            np.testing.assert_array_equal(sparse.csr_matrix((data, indices, indptr), (200, 60)).toarray(), expected)
        seen += [batch.tokens.numpy() for batch in batches]
    np.testing.assert_array_equal(np.concatenate(seen), expected)
    grown = ad.read_zarr(output)  # by zarr-python
    np.testing.assert_array_equal(grown.X.toarray(), np.vstack([ad.read_h5ad(path).X.toarray() for path in paths]))
    assert verify(output, paths)["cells"] == 331


@pytest.mark.parametrize("layout", ["csc", "dense", "untidy", "float", "other order"])
def test_input_of_any_layout_is_appended(layout: str, tmp_path: Path) -> None:
    first, matrix = counts(120, 40, seed=1), counts(50, 40, seed=2)
    genes = [f"gene{k}" for k in range(40)]
    second: Any = {"csc": matrix.tocsc(), "dense": matrix.toarray(), "float": matrix.astype(np.float64)}.get(layout, matrix)
    if layout == "untidy":
        second = matrix.copy()
        for row in range(50):
            own = slice(second.indptr[row], second.indptr[row + 1])
            second.indices[own], second.data[own] = second.indices[own][::-1].copy(), second.data[own][::-1].copy()
        second.has_sorted_indices = False
    order = np.arange(40)[::-1] if layout == "other order" else np.arange(40)
    second = second[:, order] if layout == "other order" else second
    a, b = write(tmp_path / "a.h5ad", first), write(tmp_path / "b.h5ad", second, [genes[k] for k in order])
    convert(a, tmp_path / "a.zarr", progress=False)
    convert(b, tmp_path / "a.zarr", append=True, progress=False)
    np.testing.assert_array_equal(
        ad.read_zarr(tmp_path / "a.zarr").X.toarray(), np.vstack([first.toarray(), matrix.toarray()])
    )
    verify(tmp_path / "a.zarr", [a, b])


def test_real_values_and_raw_are_appended(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths, real, raw = [], [], []
    for n in (60, 25):
        adata = ad.AnnData(sparse.csr_matrix(np.round(rng.standard_normal((n, 30)) * (rng.random((n, 30)) < 0.3), 3)))
        whole = ad.AnnData(counts(n, 50, seed=n))
        adata.raw = whole
        paths.append(str(tmp_path / f"{n}.h5ad"))
        adata.write_h5ad(paths[-1])
        real.append(adata.X.toarray().astype(np.float32))
        raw.append(whole.X.toarray())
    for name, options, expected in (("real", {"values": "real"}, real), ("raw", {"raw": True}, raw)):
        convert(paths[0], tmp_path / f"{name}.zarr", progress=False, **options)
        grown = convert(paths[1], tmp_path / f"{name}.zarr", append=True, progress=False)
        together = convert(paths, tmp_path / f"{name}-2.zarr", progress=False, **options)
        np.testing.assert_array_equal(ad.read_zarr(tmp_path / f"{name}.zarr").X.toarray(), np.vstack(expected))
        assert isinstance(grown, CellStore)
        assert isinstance(together, CellStore)
        assert grown.fingerprint == together.fingerprint
        np.testing.assert_allclose(grown.gene_stats(), together.gene_stats(), rtol=1e-12)
        verify(grown.path, paths)


def test_a_store_of_several_inputs_keeps_its_sources_and_names_new_ones_apart(tmp_path: Path) -> None:
    paths = []
    for folder, seed in (("x", 1), ("y", 2), ("z", 3)):
        (tmp_path / folder).mkdir()
        paths.append(write_rich(tmp_path / folder / "a.h5ad", 30, seed, source=["theirs"] * 30))
    convert(paths[:2], tmp_path / "a.zarr", progress=False)
    convert(paths[2], tmp_path / "a.zarr", append=True, progress=False)
    obs = CellStore(tmp_path / "a.zarr").obs
    assert obs["source"].tolist() == ["theirs"] * 90
    assert obs["sedd_source"].tolist() == ["x/a.h5ad"] * 30 + ["y/a.h5ad"] * 30 + ["a.h5ad"] * 30
    assert obs.columns.tolist() == CellStore(convert(paths, tmp_path / "b.zarr", progress=False).path).obs.columns.tolist()


@pytest.mark.parametrize("how", [{"shuffle": True}])
def test_cells_come_after_those_of_a_reordered_store_and_that_is_said(how: dict[str, Any], tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / f"{seed}.h5ad", counts(n, 40, seed=seed)) for seed, n in ((1, 90), (2, 30), (3, 20)))
    convert([a, b], tmp_path / "a.zarr", progress=False, **how)
    with pytest.warns(SeddWarning, match="the appended cells come after the others"):
        grown = convert(c, tmp_path / "a.zarr", append=True, limit_cells=15, progress=False)
    assert isinstance(grown, CellStore)
    assert grown.obs["sedd_cell"].tolist()[120:] == list(range(120, 135))
    np.testing.assert_array_equal(ad.read_zarr(grown.path).X[120:].toarray(), ad.read_h5ad(c).X[:15].toarray())
    verify(grown.path, [a, b, c])


@pytest.mark.parametrize("same", [True, False])
def test_an_order_of_categories_is_kept_if_it_is_the_same_and_its_loss_is_reported(
    same: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    paths = []
    for seed, stages in ((1, ["late", "early"]), (2, ["late", "early"] if same else ["early", "adult"])):
        obs = pd.DataFrame({"stage": pd.Categorical([stages[k % 2] for k in range(20)], stages, ordered=True)}, [f"{seed}_{k}" for k in range(20)])
        ad.AnnData(counts(20, 40, seed=seed), obs=obs).write_h5ad(tmp_path / f"{seed}.h5ad")
        paths.append(str(tmp_path / f"{seed}.h5ad"))
    convert(paths[0], tmp_path / "a.zarr", progress=False)
    grown = convert(paths[1], tmp_path / "a.zarr", append=True, progress=False)
    together = convert(paths, tmp_path / "b.zarr", progress=False)
    assert isinstance(grown, CellStore)
    assert isinstance(together, CellStore)
    pd.testing.assert_frame_equal(grown.obs, together.obs)
    assert getattr(grown.obs["stage"].dtype, "ordered", False) == same
    assert any("stage: has no order of categories any more" in str(one.message) for one in recwarn) == (not same)


def test_genes_that_an_input_lacks_are_refused_or_by_outer_have_no_counts(tmp_path: Path) -> None:
    names = [f"gene{k}" for k in range(40)]
    a = write(tmp_path / "a.h5ad", counts(60, 40, seed=1))
    b = write(tmp_path / "b.h5ad", counts(30, 40, seed=2)[:, 5:], [*names[5:39], "new"])
    before = convert(a, tmp_path / "a.zarr", progress=False)
    assert isinstance(before, CellStore)
    with pytest.raises(UserError, match=r"lacks 6 of the 40 genes .*'gene0'.*--join outer"):
        convert(b, tmp_path / "a.zarr", append=True, progress=False)
    assert not Path(f"{tmp_path}/a.zarr.partial").exists()
    assert CellStore(before.path).fingerprint == before.fingerprint
    with pytest.warns(SeddWarning, match="1 of its 35 genes are not in"):
        grown = convert(b, tmp_path / "a.zarr", append=True, join="outer", progress=False)
    assert isinstance(grown, CellStore)
    expected = np.zeros((90, 40))
    expected[:60] = ad.read_h5ad(a).X.toarray()
    expected[60:, 5:39] = ad.read_h5ad(b).X.toarray()[:, :34]
    np.testing.assert_array_equal(ad.read_zarr(grown.path).X.toarray(), expected)
    verify(grown.path, [a, b])


def refused(folder: Path, paths: str | list[str], match: str, **options: Any) -> None:
    """Appending to `a.zarr` fails with one clear line and leaves everything as it was."""
    before = files_of(str(folder / "a.zarr"))
    with pytest.raises(UserError, match=match) as caught:
        convert(paths, folder / "a.zarr", append=True, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert files_of(str(folder / "a.zarr")) == before
    assert not (folder / "a.zarr.partial").exists()


def test_what_cannot_be_appended_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    a = write_rich(tmp_path / "a.h5ad", 60, 1)
    convert(a, tmp_path / "a.zarr", keep_layers=("spliced",), obs=("kind",), progress=False)
    other = write(tmp_path / "other.h5ad", counts(20, 40), [f"ENSG{k}" for k in range(40)])
    refused(tmp_path, other, "has no gene in common")
    plain = write(tmp_path / "plain.h5ad", counts(20, 40, seed=5))
    refused(tmp_path, plain, "has no layers/spliced")
    refused(tmp_path, a, r"is in .*a\.zarr already, as .*a\.h5ad\. Nothing was appended")
    copy = shutil.copyfile(a, tmp_path / "copy.h5ad")
    os.utime(copy, (1, 1))
    refused(tmp_path, str(copy), r"every one of the 60 cells is in .* already, by name and by counts")
    b = write_rich(tmp_path / "b.h5ad", 20, 2)
    refused(tmp_path, [b, b], r"b\.h5ad: is given twice")
    for flag in ({"layer": "spliced"}, {"codec": "zstd"}, {"shuffle": True}, {"values": "real"}, {"genes": ["gene1"]}):
        refused(tmp_path, b, f"--{next(iter(flag))}: .* was made with another", **flag)
    refused(tmp_path, b, "--append keeps the store that --overwrite would replace", overwrite=True)
    real = ad.read_h5ad(b)
    real.X = real.X.astype(np.float32) * 0.37
    real.write_h5ad(tmp_path / "real.h5ad")
    refused(tmp_path, str(tmp_path / "real.h5ad"), r"non-integer values .* holds the counts of X of its files")
    large = ad.read_h5ad(b)
    dense = large.X.toarray()
    dense[7, 5] = 300
    large.X = sparse.csr_matrix(dense)
    large.write_h5ad(tmp_path / "large.h5ad")
    refused(tmp_path, [b, str(tmp_path / "large.h5ad")], r"large\.h5ad: X has 300 at cell 7 \('s2_7'\), gene 'gene5', .* up to 255")
    large.X, large.layers["spliced"] = real.X * 0, real.X
    large.X = sparse.csr_matrix(np.ones((20, 40)))
    large.write_h5ad(tmp_path / "reallayer.h5ad")
    refused(tmp_path, str(tmp_path / "reallayer.h5ad"), "layers/spliced has real values")
    few = ad.read_h5ad(b)
    del few.obs["kind"]
    few.write_h5ad(tmp_path / "few.h5ad")
    refused(tmp_path, str(tmp_path / "few.h5ad"), "obs has no column 'kind'")
    with pytest.raises(UserError, match="no such store to append to"):
        convert(b, tmp_path / "none.zarr", append=True, progress=False)
    assert not (tmp_path / "none.zarr.partial").exists()
    with pytest.raises(UserError, match="cannot be appended to there"):
        convert(b, "memory://a.zarr", append=True, progress=False)
    with (tmp_path / "a.zarr" / "X" / "data" / "c" / "0").open("r+b") as file:
        file.seek(3)
        byte = file.read(1)
        file.seek(3)
        file.write(bytes([byte[0] ^ 1]))
    refused(tmp_path, b, "checksum is wrong, so nothing was appended")


def test_tables_that_were_not_read_before_need_the_store_to_be_opened_again(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{seed}.h5ad", counts(30, 40, seed=seed)) for seed in (1, 2))
    read, unread = (convert(a, tmp_path / "a.zarr", progress=False, resume=again) for again in (False, True))
    assert isinstance(read, CellStore)
    assert isinstance(unread, CellStore)
    before = read.obs.copy()
    convert(b, tmp_path / "a.zarr", append=True, progress=False)
    pd.testing.assert_frame_equal(read.obs, before)
    with pytest.raises(UserError, match=r"changed since it was opened, so obs cannot be read any more. Open it again"):
        _ = unread.obs
    assert len(CellStore(unread.path).obs) == 60


def test_a_full_disk_leaves_the_store_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (write(tmp_path / f"{seed}.h5ad", counts(30, 40, seed=seed)) for seed in (1, 2))
    convert(a, tmp_path / "a.zarr", progress=False)
    before = files_of(str(tmp_path / "a.zarr"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(append, "extend_shard", full)
        with pytest.raises(UserError, match=r"No space left on device\); it is as it was.*--append --resume"):
            convert(b, tmp_path / "a.zarr", append=True, progress=False)
    assert files_of(str(tmp_path / "a.zarr")) == before
    with pytest.raises(UserError, match="exists already"):
        convert(a, tmp_path / "a.zarr", progress=False)
    convert(b, tmp_path / "a.zarr", append=True, resume=True, progress=False)
    verify(tmp_path / "a.zarr", [a, b])
    assert not (tmp_path / "a.zarr.partial").exists()


def test_a_store_that_is_a_link_grows_where_it_is(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{seed}.h5ad", counts(30, 40, seed=seed)) for seed in (1, 2))
    (tmp_path / "disk").mkdir()
    convert(a, tmp_path / "disk" / "a.zarr", progress=False)
    (tmp_path / "link.zarr").symlink_to(tmp_path / "disk" / "a.zarr")
    convert(b, tmp_path / "link.zarr", append=True, progress=False)
    assert (tmp_path / "link.zarr").is_symlink()
    assert CellStore(tmp_path / "disk" / "a.zarr").n_obs == 60


@pytest.mark.parametrize("missing", ["exchange", "link"])
def test_file_systems_that_lack_links_or_exchanges_do_too(
    missing: str, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (write(tmp_path / f"{seed}.h5ad", counts(90, 40, seed=seed)) for seed in (1, 2))
    assert run(processes, a, str(tmp_path / "a.zarr")) == "done"
    in_small_shards(monkeypatch)
    if missing == "link":

        link = os.link

        def no_link(old: str, new: str) -> None:  # zarr makes its metadata by links, and has its own way where there are none
            if "/c/" in str(new):
                raise PermissionError
            link(old, new)

        monkeypatch.setattr(extend.os, "link", no_link)
        convert(b, tmp_path / "a.zarr", append=True, progress=False)
    else:
        kept, output = tmp_path / "kept.zarr", str(tmp_path / "a.zarr")
        shutil.copytree(output, kept)
        options = {"append": True, "exchange": False}
        changes, _ = changes_of(processes, b, output, **options)
        shutil.rmtree(output)
        kept.rename(output)
        between = changes.index("os.rename .partial/store")
        assert changes_of(processes, b, output, between, **options)[1] == -signal.SIGKILL
        assert not Path(output).exists()  # the one moment that is not safe, where names cannot be exchanged
        assert run(processes, b, output, resume=True, **options) == "done"
    assert verify(tmp_path / "a.zarr", [a, b])["cells"] == 180
    assert not (tmp_path / "a.zarr.partial").exists()


STAGES = {"added.zarr": "convert", "store/X": "shards", "store/layers": "shards", "store": "tables"}


def stage(changes: list[str]) -> str:
    """What an append that has made these changes is about to do."""
    noted = sum("os.rename .partial/.append.json" in change for change in changes[:-1])
    if noted > 1:
        return "clean up"
    path = changes[-1].partition(".partial/")[2]
    return next((name for start, name in STAGES.items() if path.startswith(start)), "plan")


@pytest.mark.slow
def test_twenty_kills_of_appends_leave_the_old_store_and_resume(processes: Any, tmp_path: Path) -> None:
    """Kill -9 appends at their changes, every stage in turn: the old store verifies throughout, and they resume to the same bytes."""
    a = write_rich(tmp_path / "a.h5ad", 200, 1)
    b = write_rich(tmp_path / "b.h5ad", 60, 2)
    output, kept = str(tmp_path / "a.zarr"), str(tmp_path / "kept.zarr")
    assert run(processes, a, kept, keep_layers=("spliced",)) == "done"
    shutil.copytree(kept, output)
    changes, status = changes_of(processes, b, output, append=True)
    assert status == 0
    expected, old = files_of(output), files_of(kept)
    verify(output, [a, b])
    places: dict[str, list[int]] = {}
    for number in range(len(changes)):
        places.setdefault(stage(changes[: number + 1]), []).append(number)
    assert places.keys() == {"plan", "clean up", *STAGES.values()}
    rng = random.Random(0)
    fell = []
    for _, numbers in zip(range(20), itertools.cycle(places.values()), strict=False):
        shutil.rmtree(output)
        shutil.copytree(kept, output)
        made, status = changes_of(processes, b, output, rng.choice(numbers), append=True)
        assert status == -signal.SIGKILL
        fell.append(stage(made))
        there = files_of(output)
        assert there == (expected if fell[-1] == "clean up" else old)
        verify(output, [a, b] if there == expected else [a])
        if there == old and Path(f"{output}.partial/append.json").exists():
            assert "pass --append --resume" in run(processes, b, output, append=True).lower()
            assert "changed since" in run(processes, a, output, append=True, resume=True)
        assert run(processes, b, output, append=True, resume=True) == "done"
        assert files_of(output) == expected
        assert not Path(f"{output}.partial").exists()
    print("killed before:", dict(Counter(fell)))
    assert len(set(fell)) >= len(places) - 1
    assert "already" in run(processes, b, output, append=True)


def test_two_appends_at_once_do_not_mix(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{seed}.h5ad", counts(30, 40, seed=seed)) for seed in (1, 2))
    convert(a, tmp_path / "a.zarr", progress=False)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from sedd.io.outputs import only_writer\n"
         f"with only_writer({str(tmp_path / 'a.zarr')!r}, wait=False): print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is writing it"):
        convert(b, tmp_path / "a.zarr", append=True, progress=False)
    holder.communicate("")
    convert(b, tmp_path / "a.zarr", append=True, progress=False)
    assert append.CellStore(tmp_path / "a.zarr").n_obs == 60


def test_a_dry_run_says_what_would_be_appended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write(tmp_path / f"{seed}.h5ad", counts(30, 40, seed=seed)) for seed in (1, 2))
    convert(a, tmp_path / "a.zarr", progress=False)
    before = files_of(str(tmp_path / "a.zarr"))
    assert convert(b, tmp_path / "a.zarr", append=True, dry_run=True, progress=False) is None
    assert "appended to the 30 cells that are there" in capsys.readouterr().out
    assert files_of(str(tmp_path / "a.zarr")) == before
