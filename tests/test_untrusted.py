"""Files that ask for memory they do not have or lead to other files: each ends in one line, with little memory, and gives nothing away."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, make_counts

from sedd import checkpoint
from sedd.cli import main
from sedd.errors import DamagedFileError, UserError, WrongFileError, without_secrets
from sedd.inference.pretrained import Pretrained
from sedd.io.convert import convert
from sedd.io.format.pickled import check_contents
from sedd.io.format.untrusted import check_zarr
from sedd.options import recorded_path

HUGE = 1 << 40
RUN = """
import json, resource, sys
import sedd.commands, sedd.inference.pretrained, sedd.io.convert, sedd.io.verify, sedd.tasks, sedd.io.store
from sedd.cli import main
import contextlib, io
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + (3 << 30), resource.RLIM_INFINITY))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, arguments in json.loads(sys.stdin.read()).items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except BaseException as error:
            code = repr(error)
    lines = [line for line in said.getvalue().splitlines() if line.strip() and not line.startswith("warning:") and "%|" not in line]
    print(json.dumps([name, code, lines, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10]))
"""
"""Runs commands with 3 GiB of addresses to spare, and prints code, lines and growth of the peak in MiB of each."""


def _set_shape(path: Path, shape: list[int]) -> None:
    own = path / "zarr.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "shape": shape}))
    root = next(folder for folder in path.parents if (folder / "uns").is_dir())
    top = json.loads((root / "zarr.json").read_text())
    top["consolidated_metadata"]["metadata"][str(path.relative_to(root))]["shape"] = shape
    (root / "zarr.json").write_text(json.dumps(top))


def _set_meta(store: Path, **values: object) -> None:
    import zarr

    node = zarr.open_group(store, mode="r+")["uns/sedd/meta"]
    node[()] = json.dumps({**json.loads(str(node[()])), **values})


def _export(folder: Path, change: Callable[[dict], None]) -> None:
    """Change config.json of an exported model, and sign it as one who wrote it would."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    del config["digest"]
    config["digest"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def _checkpoint(whole: Path, target: Path, **size: object) -> None:
    state = checkpoint.load(whole)
    state["model_config"] = {**state["model_config"], **size}
    torch.save(state, target)


@pytest.fixture(scope="module")
def ended(tiny_run: Path, tiny_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, list[str], int]]:
    """What commands say of files whose headers name a shape of 2**40."""
    folder = tmp_path_factory.mktemp("huge")
    commands: dict[str, list[str]] = {}
    whole = folder / "whole.zarr"
    convert([str(tiny_h5ad)], str(whole), progress=False)
    for name, array, shape in (
        ("store indptr", "X/indptr", [HUGE]), ("store data", "X/data", [HUGE]), ("store obs", "obs/depth", [HUGE]), ("store names", "obs/_index", [HUGE]),
    ):  # fmt: skip
        store = shutil.copytree(whole, folder / f"{name}.zarr")
        _set_shape(store / array, shape)
        commands[name] = ["verify", str(store)]
    for key in ("n_obs", "n_vars", "nnz"):
        store = shutil.copytree(whole, folder / f"{key}.zarr")
        _set_meta(store, **{key: HUGE})
        commands[f"store {key}"] = ["verify", str(store)]
    for name, dataset in (("h5ad names", "obs/_index"), ("h5ad column", "obs/depth"), ("h5ad indptr", "X/indptr"), ("h5ad data", "X/data")):
        path = Path(shutil.copy(tiny_h5ad, folder / f"{name}.h5ad"))
        with h5py.File(path, "r+") as file:
            if isinstance(file[dataset], h5py.Group):  # of names that may be missing
                dataset += "/values"
            attrs, dtype = dict(file[dataset].attrs), file[dataset].dtype
            del file[dataset]
            file.create_dataset(dataset, shape=(HUGE,), dtype=dtype, chunks=(1 << 16,)).attrs.update(attrs)
        commands[name] = ["convert", str(path), str(folder / "out.zarr")]
    path = Path(shutil.copy(tiny_h5ad, folder / "shape.h5ad"))
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = [HUGE, HUGE]
    commands["h5ad shape"] = ["convert", str(path), str(folder / "out.zarr")]
    path = Path(shutil.copy(tiny_h5ad, folder / "dense.h5ad"))
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", shape=(240, HUGE), dtype="f4", chunks=(1, 1 << 16)).attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    commands["h5ad dense"] = ["info", str(path)]
    with warnings.catch_warnings():
        for kind in (UserWarning, DeprecationWarning):  # anndata's, of the end of this format
            warnings.simplefilter("ignore", kind)
        with ad.settings.override(zarr_write_format=2):
            make_counts(20, 5).write_zarr(folder / "v2.zarr")
    (folder / "v2.zarr" / ".zmetadata").unlink(missing_ok=True)
    own = folder / "v2.zarr" / "obs" / "depth" / ".zarray"
    own.write_text(json.dumps({**json.loads(own.read_text()), "shape": [HUGE]}))
    commands["zarr 2"] = ["info", str(folder / "v2.zarr")]
    for name, size in (("hidden_dim", HUGE), ("num_layers", HUGE), ("n_vars", HUGE), ("condition_sizes", [HUGE]), ("gene_embedding_dim", HUGE)):
        _checkpoint(tiny_run / "best.pt", folder / f"{name}.pt", **{name: size})
        commands[f"checkpoint {name}"] = ["info", str(folder / f"{name}.pt")]
        Pretrained.load(tiny_run).save_pretrained(folder / f"export {name}")
        _export(folder / f"export {name}", lambda config, name=name, size=size: config["model_config"].update({name: size}))  # type: ignore[misc]
        commands[f"export {name}"] = ["info", str(folder / f"export {name}")]
    exported = folder / "header"
    Pretrained.load(tiny_run).save_pretrained(exported)
    weights = struct.pack("<Q", HUGE) + (exported / "model.safetensors").read_bytes()[8:]
    (exported / "model.safetensors").write_bytes(weights)
    _export(exported, lambda config: config["sha256"].update({"model.safetensors": hashlib.sha256(weights).hexdigest()}))
    commands["export header"] = ["info", str(exported)]
    Pretrained.load(tiny_run).save_pretrained(folder / "histogram")
    _export(folder / "histogram", lambda config: config.update(histogram_shape=[HUGE, HUGE]))
    commands["export histogram"] = ["info", str(folder / "histogram")]
    Pretrained.load(tiny_run).save_pretrained(folder / "deep")
    (folder / "deep" / "config.json").write_text("[" * 200_000)
    commands["export nested"] = ["info", str(folder / "deep")]
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(commands), capture_output=True, text=True, timeout=280, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    found = {name: (code, lines, peak) for name, code, lines, peak in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == commands.keys(), done.stderr[-2000:]
    return found


def test_a_header_of_2_to_the_40_ends_in_one_line_and_takes_no_memory(ended: dict[str, tuple[object, list[str], int]]) -> None:
    wrong = {name: found for name, found in ended.items() if found[0] != 2 or len(found[1]) != 1}
    assert not wrong
    assert max(peak for *_, peak in ended.values()) < 400


def _listed(content: bytes, path: Path, **parts: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        for name, data in parts.items():
            archive.writestr(f"archive/data/{name}", data)
    return path


def _tensor(n: int, *, shape: str, strides: str, kind: bytes = b"FloatStorage") -> bytes:
    """The list of contents of a tensor in a storage of `n` numbers, as torch writes one; all by eval: `(4,)`."""
    numbers = [b"\x8a" + bytes([8]) + struct.pack("<q", v) for v in (*eval(shape), *eval(strides))]
    half = len(numbers) // 2
    size, steps = (b"(" + b"".join(part) + b"t" for part in (numbers[:half], numbers[half:]))
    storage = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x8a\x08" + struct.pack("<q", n) + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + steps + b"\x89ccollections\nOrderedDict\n)RtR."


@pytest.mark.parametrize(
    ("n", "shape", "strides"),
    [(1 << 40, "(4,)", "(1,)"), (4, "(1 << 40,)", "(0,)"), (4, "(5,)", "(1,)"), (4, "(2,)", "(4,)"), (4, "(2, 3)", "(1, 1)"), (4, "(-1,)", "(1,)")],
)
def test_a_checkpoint_that_names_numbers_it_does_not_have_is_refused_before_torch_sees_it(n: int, shape: str, strides: str, tmp_path: Path) -> None:
    good = _listed(_tensor(4, shape="(2, 2)", strides="(2, 1)"), tmp_path / "good.pt", **{"0": b"\0" * 16})
    check_contents(good)
    path = _listed(_tensor(n, shape=shape, strides=strides), tmp_path / "bad.pt", **{"0": b"\0" * 16})
    with pytest.raises(ValueError, match="larger than its numbers|is said to have"):
        check_contents(path)
    with pytest.raises(DamagedFileError):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "listed",
    [
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        b"\x80\x02cbuiltins\nset\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R.",
        b"\x80\x02}r\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\x00\x00\x00\x00\x00\x01\x00\x00.",
        pickle.dumps(b"bytes", 4),
    ],
    ids=["bytearray", "set", "meta", "memo", "long bytes", "frame"],
)
def test_a_list_of_contents_that_asks_for_anything_else_is_refused(listed: bytes, tmp_path: Path) -> None:
    path = _listed(listed, tmp_path / "x.pt")
    with pytest.raises((pickle.UnpicklingError, ValueError)):  # by sedd's own look, whatever torch would do
        check_contents(path)
    with pytest.raises(UserError):
        checkpoint.load(path)


def test_a_packed_checkpoint_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tiny_run / "best.pt") as old, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(DamagedFileError, match="compressed"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_histogram_that_names_entries_outside_itself_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    state = checkpoint.load(tiny_run / "best.pt")
    state["histogram"]["indices"][0] = 1 << 30
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(DamagedFileError, match="fit"):
        Pretrained.load(tmp_path / "x.pt")


@pytest.mark.parametrize("where", ["file of a store", "folder of a store", "absolute", "pipe in a store"])
def test_a_link_out_of_a_store_is_not_followed(where: str, tiny_h5ad: Path, tmp_path: Path) -> None:
    store, secret = tmp_path / "cells.zarr", tmp_path / "secret"
    convert([str(tiny_h5ad)], str(tmp_path / "made.zarr"), progress=False)
    shutil.copytree(tmp_path / "made.zarr", store)  # one that this process did not look at before
    chunk = next((store / "obs" / "depth").rglob("0"))
    if where == "folder of a store":
        shutil.move(str(store / "obs" / "depth"), secret)
        (store / "obs" / "depth").symlink_to(secret)
    else:
        shutil.copy(chunk, secret)
        chunk.unlink()
        os.mkfifo(chunk) if where == "pipe in a store" else chunk.symlink_to(secret if where == "absolute" else os.path.relpath(secret, chunk.parent))
    for arguments in (["info", str(store)], ["verify", str(store)]):
        assert main(arguments) == 2
    if where != "pipe in a store":
        (tmp_path / "link.zarr").symlink_to(store)  # of the whole store, as people have them, leads nowhere else
        chunk.unlink() if not (store / "obs" / "depth").is_symlink() else (store / "obs" / "depth").unlink()
        shutil.move(secret, chunk if where != "folder of a store" else store / "obs" / "depth")
        assert main(["info", str(tmp_path / "link.zarr")]) == 0


@pytest.mark.parametrize("kind", ["external storage", "virtual"])
def test_an_h5ad_gives_nothing_away_of_other_files(kind: str, tiny_h5ad: Path, tmp_path: Path) -> None:
    path, secret = Path(shutil.copy(tiny_h5ad, tmp_path / "cells.h5ad")), tmp_path / "secret"
    with h5py.File(secret, "w") as other:
        other["x"] = np.arange(240.0)
    with h5py.File(path, "r+") as file:
        del file["obs/depth"]
        if kind == "external storage":
            file.create_dataset("obs/depth", shape=(240,), dtype="u1", external=[(str(secret), 0, 240)])
        else:
            layout = h5py.VirtualLayout((240,), "f8")
            layout[:] = h5py.VirtualSource(str(secret), "x", (240,))
            file.create_virtual_dataset("obs/depth", layout)
        file["obs/depth"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    for call in (lambda: convert([str(path)], str(tmp_path / "out.zarr"), progress=False), lambda: Pretrained and main(["info", str(path)])):
        if call.__code__.co_names[0] == "convert":
            with pytest.raises(WrongFileError, match=r"obs/depth is kept in another file"):
                call()
        else:
            assert call() == 2
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("where", ["absolute", "above", "through a neighbour", "missing, but in the working directory", "a neighbour's other storage"])
def test_a_link_of_an_h5ad_out_of_its_folder_is_refused(where: str, tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret.h5"
    folder.mkdir()
    path = Path(shutil.copy(tiny_h5ad, folder / "cells.h5ad"))
    with h5py.File(path) as file, h5py.File(secret, "w") as other:
        file.copy("obs/depth", other, "x")
    name = {"absolute": str(secret), "above": "../secret.h5", "missing, but in the working directory": "secret.h5"}.get(where, "near.h5")
    if where == "through a neighbour":
        with h5py.File(folder / "near.h5", "w") as near:
            near["x"] = h5py.ExternalLink("../secret.h5", "/x")
    elif where == "a neighbour's other storage":
        with h5py.File(folder / "near.h5", "w") as near:
            near.create_dataset("x", shape=(240,), dtype="u1", external=[(str(secret), 0, 240)])
    with h5py.File(path, "r+") as file:
        del file["obs/depth"]
        file["obs/depth"] = h5py.ExternalLink(name, "/x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongFileError, match=r"is kept in another file .*secret\.h5"):
        convert([str(path)], str(tmp_path / "out.zarr"), progress=False)
    assert main(["info", str(path)]) == 2
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/secret", "..", "obs/../../../secret"])
def test_a_column_named_like_a_path_stays_in_its_store(name: str, tmp_path: Path) -> None:
    cells = make_counts(40, 8)
    cells.obs[name] = 1.5
    path = tmp_path / "deep" / "er" / "cells.zarr"
    path.parent.mkdir(parents=True)
    table = cells.obs.drop(columns=name).assign(other=1.5)
    cells.obs = table
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        attrs = file["obs"].attrs
        attrs["column-order"] = np.array([str(c) for c in attrs["column-order"] if c != "other"] + [name], dtype=object)
        if "/" not in name and name != "..":
            file["obs"].move("other", name)
    before = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    code = main(["convert", str(tmp_path / "cells.h5ad"), str(path)])
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} - before
    assert code in (0, 2)
    assert all(place.startswith("deep/er/cells.zarr") for place in made)
    assert not list(Path("/etc").glob("secret"))


@pytest.mark.parametrize("version", [2, 3])
def test_an_array_that_is_encoded_by_pickle_is_refused(version: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cells.zarr"
    with warnings.catch_warnings():
        for kind in (UserWarning, DeprecationWarning):  # anndata's, of the end of the older format
            warnings.simplefilter("ignore", kind)
        with ad.settings.override(zarr_write_format=version):
            make_counts(20, 5).write_zarr(path)
    (path / ".zmetadata").unlink(missing_ok=True)
    own = path / "obs" / "depth" / (".zarray" if version == 2 else "zarr.json")
    described = json.loads(own.read_text())
    if version == 2:
        described["filters"] = [{"id": "pickle"}]
    else:
        top = json.loads((path / "zarr.json").read_text())
        top.pop("consolidated_metadata", None)
        (path / "zarr.json").write_text(json.dumps(top))
        described["codecs"] = [{"name": "numcodecs.pickle", "configuration": {"id": "pickle"}}, *described["codecs"]]
    own.write_text(json.dumps(described))
    chunk = path / "obs" / "depth" / ("0" if version == 2 else "c/0")
    chunk.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    assert main(["info", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pickle" in said
    assert main(["convert", str(path), str(tmp_path / "out.zarr")]) == 2
    assert not (tmp_path / "ran").exists()


def test_a_codec_of_pickle_is_refused_by_sedd_whatever_zarr_would_do(tmp_path: Path) -> None:
    import numcodecs

    metadata = SimpleNamespace(zarr_format=2, filters=[numcodecs.Pickle()], compressor=None)
    array = SimpleNamespace(metadata=metadata, shape=(1,), chunks=(1,), shards=None, dtype=np.dtype("O"), nbytes_stored=lambda: 8)
    with pytest.raises(WrongFileError, match="x is encoded by pickle"):
        check_zarr(str(tmp_path), SimpleNamespace(members=lambda max_depth: [("x", array)]))


def test_a_store_that_names_a_column_outside_itself_is_refused(tiny_h5ad: Path, tmp_path: Path) -> None:
    store = tmp_path / "cells.zarr"
    convert([str(tiny_h5ad)], str(store), progress=False)
    shutil.copytree(store / "obs" / "depth", tmp_path / "secret")
    root = json.loads((store / "zarr.json").read_text())
    for place in (root["consolidated_metadata"]["metadata"]["obs"], own := json.loads((store / "obs" / "zarr.json").read_text())):
        place["attributes"]["column-order"] = ["../../secret"]
    (store / "zarr.json").write_text(json.dumps(root))
    (store / "obs" / "zarr.json").write_text(json.dumps(own))
    assert main(["info", str(store)]) == 2


def test_settings_that_unfold_without_end_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join([*lines, "condition: *a11"]).replace("a: ", "condition: ", 1))
    assert yaml.safe_load(path.read_text())
    for text in (path.read_text(), "condition: [[x, [y]]]", "condition: " + "[" * 5000):
        path.write_text(text)
        assert main(["train", "--config", str(path)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_urls_lose_what_is_secret_in_them_and_paths_their_home(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "s3://AKIA:pass%2Fword@bucket/cells.h5ad?X-Amz-Signature=abc&X-Amz-Credential=AKIA"
    assert without_secrets(f"{url}: there is no such file.") == "s3://bucket/cells.h5ad: there is no such file."
    assert str(UserError(f"'{url}' and {url}, twice")) == "'s3://bucket/cells.h5ad' and s3://bucket/cells.h5ad, twice"
    assert without_secrets("a@b.c?d cells: 5?") == "a@b.c?d cells: 5?"
    monkeypatch.setenv("HOME", "/home/ada")
    assert [recorded_path(p) for p in ("/home/ada/x.h5ad", "/home/adam/x", "/data/x", url)] == ["~/x.h5ad", "/home/adam/x", "/data/x", "s3://bucket/cells.h5ad"]


def test_what_is_written_of_a_run_holds_no_home_and_no_password(tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import TINY_FLAGS

    home = tmp_path / "ada"
    home.mkdir()
    shutil.copy(tiny_h5ad, home / "cells.h5ad")
    monkeypatch.setenv("HOME", str(home))
    training = ["train", "--data_path", str(home / "cells.h5ad"), "--checkpoint_dir", str(home / "run"), *TINY_FLAGS, "--num_epochs", "1"]
    assert main(training) == 0
    assert main(["train", "--config", str(home / "run" / "args.json"), "--resume", "auto", "--num_epochs", "2"]) == 0
    assert main(["export", str(home / "run"), str(home / "model")]) == 0
    assert main(["evaluate", str(home / "run"), str(home / "cells.h5ad"), "--output", str(home / "report"), "--steps", "1", "--no_umap"]) == 0
    assert main(["generate", str(home / "run"), "-n", "2", "-o", str(home / "made.h5ad")]) == 0
    written = [path for path in home.rglob("*") if path.is_file()]
    assert not [path for path in written if str(home).encode() in path.read_bytes()]
    assert Pretrained.load(home / "run").config.data.data_path == str(home / "cells.h5ad")  # and is found again
