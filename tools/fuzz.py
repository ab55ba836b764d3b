"""Fuzzing of what reads files: the shards of a store, an `.h5ad`, a checkpoint. Whatever the bytes are, reading ends well or with a `UserError`.

    pip install --group fuzz                       # atheris
    python tools/fuzz.py h5ad --seconds 600        # guided by the branches of sedd that the bytes reach; also shard, checkpoint

Inputs that reached something new are kept in CORPUS (`fuzz/TARGET`). One that ended otherwise is kept beside it, as `TARGET-crash-...`, one for each place
in the code, and fuzzing continues. Copy it to `tests/fuzzed/TARGET/`: `tests/test_fuzz.py` reads all of these, the corpus in `tests/fuzzed/corpus.tar.xz`, and some bytes changed at random, by every
run of the tests. The last lines say how many inputs were read, and how many places were found.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path


class Target(ABC):
    """A reader of bytes. `seeds` are good files to begin with, `read` reads one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds: list[bytes] = []

    @abstractmethod
    def read(self, data: bytes) -> None:
        """Read a file of these bytes.

        Raises
        ------
        UserError
            If they are not what they should be; anything else is a finding.
        """


def _cells(n_obs: int = 6, n_vars: int = 4):
    import anndata as ad
    import numpy as np
    import pandas as pd
    from scipy import sparse

    counts = np.random.default_rng(0).poisson(0.8, (n_obs, n_vars)).astype(np.float32)
    obs = pd.DataFrame({"kind": pd.Categorical(list("ab" * (n_obs // 2))), "depth": counts.sum(1)}, index=[f"c{i}" for i in range(n_obs)])
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_vars)]))


class H5ad(Target):
    """An input that was edited: bytes are a list of edits of a good file, four bytes each.

    Bytes of the file itself are left alone: the HDF5 library is not hardened against these and can end the process (docs/safety.md).
    """

    VALUES = (
        None, 0, -1, 1 << 40, 0.5, float("nan"), True, "", "csr_matrix", "categorical", "dataframe", "string-array", "nullable-integer", "_index",
        "../x", b"\xff", [], [0], [[1, 2], [3, 4]], [-1, 1 << 40], ["g0", "g0"], [float("inf"), 1e300],
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        cells = _cells()
        cells.write_h5ad(folder / "sparse.h5ad")
        cells.X = cells.X.toarray()
        cells.write_h5ad(folder / "dense.h5ad")
        self.seeds = [b"", b"\1"]

    def read(self, data: bytes) -> None:
        """Read it as `sedd info` and a conversion do."""
        from sedd.io.conversion.describe import input_facts
        from sedd.io.input.opening import open_input

        path = self.folder / "cells.h5ad"
        shutil.copy(self.folder / ("dense.h5ad" if data[:1] == b"\1" else "sparse.h5ad"), path)
        self._edit(path, data[1:])
        input_facts(str(path))
        with open_input(path) as file:
            file.obs()
            file.var()
            file.var_names()
            matrix = file.matrix()
            matrix.read_rows(0, min(64, matrix.shape[0]))

    def _edit(self, path: Path, edits: bytes) -> None:
        import h5py
        import numpy as np

        with h5py.File(path, "r+") as file:
            for node, what, which, value in zip(*(edits[k::4] for k in range(4)), strict=False):
                names: list[str] = []
                file.visit(names.append)
                if not names:
                    return
                name = names[node % len(names)]
                attrs = sorted(file[name].attrs)
                new = self.VALUES[value % len(self.VALUES)]
                with contextlib.suppress(TypeError, ValueError, OSError, KeyError, OverflowError):  # not all edits can be made
                    if what % 4 == 0 and attrs:
                        del file[name].attrs[attrs[which % len(attrs)]]
                        if new is not None:
                            file[name].attrs[attrs[which % len(attrs)]] = new
                    elif what % 4 == 1:
                        kept = dict(file[name].attrs)
                        del file[name]
                        if new is not None:
                            file.create_dataset(name, data=new).attrs.update(kept)
                    elif what % 4 == 2:
                        file.move(name, names[which % len(names)] + "x")
                    elif isinstance(file[name], h5py.Dataset) and file[name].size:
                        values = np.atleast_1d(file[name][()]).reshape(-1)
                        values[which % values.size] = new
                        file[name][...] = values.reshape(file[name].shape)


class Shard(Target):
    """A store of which one file is these bytes; the first byte says which, and from 128 on its checksums are made right, as an attacker would."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from sedd.io.convert import convert

        _cells().write_h5ad(folder / "cells.h5ad")
        convert([str(folder / "cells.h5ad")], str(folder / "whole.zarr"), progress=False)
        files = [path for path in (folder / "whole.zarr").rglob("*") if path.is_file()]
        wanted = ("X/data/c", "X/indices/c", "X/indptr/c", "obs/depth/c", "obs/kind/codes/c")
        self.files = [folder / "whole.zarr" / "zarr.json", *(path for path in sorted(files) if any(f"/{one}/" in path.as_posix() for one in wanted))]
        self.seeds = [bytes([k + high]) + path.read_bytes() for k, path in enumerate(self.files) for high in ((0, 128) if "X" in path.parts else (0,))]

    def read(self, data: bytes) -> None:
        """Read every row and table of the store."""
        from sedd.io.store import CellStore, close_stores

        first = data[0] if data else 0
        where = self.files[first % 128 % len(self.files)]
        kept = where.read_bytes()
        try:
            where.write_bytes(_sealed(data[1:]) if first >= 128 and "X" in where.parts else data[1:])
            close_stores()
            with CellStore(self.folder / "whole.zarr") as store:
                store.read_rows(0, store.n_obs)
                _ = store.obs, store.var, store.cell_stats
        finally:
            where.write_bytes(kept)


def _sealed(shard: bytes) -> bytes:
    """Return a shard of one chunk with the checksums that its bytes ask for: of the chunk where its index says it is, and of the index."""
    import google_crc32c

    if len(shard) < 20:
        return shard
    changed = bytearray(shard)
    offset, size = struct.unpack("<QQ", shard[-20:-4])
    if size >= 4 and offset + size <= len(shard) - 20:
        body = bytes(changed[offset : offset + size - 4])
        changed[offset + size - 4 : offset + size] = struct.pack("<I", google_crc32c.value(body))
    changed[-4:] = struct.pack("<I", google_crc32c.value(bytes(changed[-20:-4])))
    return bytes(changed)


class Checkpoint(Target):
    """A checkpoint, and the model in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import sedd

        settings = {"hidden_dim": 8, "num_layers": 1, "num_heads": 1, "num_latents": 1, "num_bins": 4, "num_threads": 1, "log_with": "none"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that cells are few
            sedd.train(_cells(24, 4), genes="all", num_epochs=1, batch_size=4, checkpoint_dir=str(folder / "run"), **settings)
        self.seeds = [(folder / "run" / "best.pt").read_bytes()]

    def read(self, data: bytes) -> None:
        """Load it as every command does."""
        from sedd.inference.pretrained import Pretrained

        path = self.folder / "model.pt"
        path.write_bytes(data)
        Pretrained.load(path, device="cpu").describe()


TARGETS: dict[str, type[Target]] = {"h5ad": H5ad, "shard": Shard, "checkpoint": Checkpoint}


READERS = ["sedd.inference.pretrained", "sedd.inference.export", "sedd.io.store", "sedd.io.conversion.describe", "sedd.io.input.opening"]


def import_what_is_watched() -> None:
    """Import the readers with marks at every branch; files of kernels without, since Numba cannot compile these."""
    import atheris

    root = Path(__file__).resolve().parent.parent
    files = [path for path in sorted((root / "sedd").rglob("*.py")) if "njit" in path.read_text()]
    kernels = [".".join(path.relative_to(root).with_suffix("").parts) for path in files]
    with atheris.instrument_imports(include=["sedd"], exclude=kernels):
        for name in READERS:
            importlib.import_module(name)


def quiet(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Return a reader that a `UserError` ends as well as success, without warnings."""
    from sedd.errors import UserError

    def checked(data: bytes) -> None:
        with warnings.catch_warnings(), contextlib.suppress(UserError):
            warnings.simplefilter("ignore")
            read(data)

    return checked


class Recorder:
    """A quiet reader that keeps the bytes of what ended in any other error, once for each place it was raised at, and continues."""

    def __init__(self, read: Callable[[bytes], None], prefix: str) -> None:
        self.read, self.prefix = quiet(read), prefix
        self.found: set[str] = set()

    def __call__(self, data: bytes) -> None:
        """Read one input."""
        try:
            self.read(data)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in place if "/sedd/" in frame.filename] or place
            name = f"{type(error).__name__}-{Path(own[-1].filename).stem}-{own[-1].lineno}"
            if name not in self.found:
                self.found.add(name)
                Path(f"{self.prefix}-crash-{name}").write_bytes(data)
                traceback.print_exc()
                print(f"fuzz: found {name}", flush=True)


def main() -> None:
    """Fuzz one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS, help="what is read")
    parser.add_argument("--seconds", type=int, default=600, help="how long (default: 600)")
    parser.add_argument("--corpus", type=Path, default=Path("fuzz"), help="folder of the inputs that are kept (default: fuzz)")
    args = parser.parse_args()
    import atheris

    import_what_is_watched()
    corpus = args.corpus / args.target
    corpus.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        target = TARGETS[args.target](folder)
        for number, seed in enumerate(target.seeds):
            (corpus / f"seed{number}").write_bytes(seed)
        longest = max(64, 2 * max(map(len, target.seeds)))
        words = [f"-max_total_time={args.seconds}", f"-max_len={longest}", "-keep_seed=1", "-len_control=0", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1", f"-artifact_prefix={corpus}-", str(corpus)]
        atheris.Setup([sys.argv[0], *words], Recorder(target.read, str(corpus)))
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
