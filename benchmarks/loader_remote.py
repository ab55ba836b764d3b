"""The loader over S3, beside what the server gives: `loader.py --s3` calls this, which runs itself for each contestant.

Three servers of this machine: moto, which is Python; nginx, which sends the same files to the same requests without looking at signatures;
and nginx that waits 30 ms before it answers, about as a distant service does (it needs its Lua module). The server has one processor and the client
another, where there are two. "bare" is the byte ranges of a window of the loader, asked for 64 at a time and thrown away.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import in_process, summary

SERVERS = ("moto", "nginx", "nginx, 30 ms")
FORMS = {"bare": "bare", "obstore": "obstore", "s3fs": "s3fs"}
URL, WINDOW, IN_FLIGHT = "s3://atlases/store.zarr", 24_576, 64
LISTED = (
    '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>atlases</Name><Prefix></Prefix>'
    "<KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated></ListBucketResult>"
)


def object_store(store: str, seconds: float, rounds: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure each server in turn: the loader and the server's bare answers; `keep` is given what is known after each round."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for server in SERVERS:
            if server != "moto" and shutil.which("nginx") is None:
                continue
            with served(server, store) as env:
                words = [sys.executable, str(Path(__file__).resolve())]
                one = {form: in_process([*words, how, str(seconds), store], env=env) for form, how in FORMS.items()}
            bare = one["bare"]["wall"]
            found.setdefault(server, []).append({form: {**rates, "of_bare": rates["wall"] / bare} for form, rates in one.items()})
            print(server, {form: round(rates["wall"]) for form, rates in one.items()}, file=sys.stderr, flush=True)
        keep({"rounds": len(found["moto"]), **{server: summary(values) for server, values in found.items()}})


@contextmanager
def served(server: str, store: str) -> Iterator[dict[str, str]]:
    """Serve a store; the environment for its clients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    access = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    env = {**os.environ, **access, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "moto.server", "-p", str(port)] if server == "moto" else nginx(Path(folder), store, port, "30 ms" in server)
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        try:
            if (os.cpu_count() or 1) > 1:
                os.sched_setaffinity(process.pid, {0})
            for _ in range(100):
                with socket.socket() as one:
                    if one.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            if server == "moto":
                in_process([sys.executable, str(Path(__file__).resolve()), "put", store], env=env)
            yield env
        finally:
            process.terminate()
            process.wait()


def nginx(folder: Path, store: str, port: int, late: bool) -> list[str]:
    """Write the settings of nginx, which finds the files of the bucket in `folder`; the words that start it."""
    (folder / "atlases").mkdir()
    (folder / "atlases" / "store.zarr").symlink_to(Path(store).resolve())
    load = "".join(f"load_module modules/{name}_module.so;\n" for name in ("ndk_http", "ngx_http_lua")) if late else ""
    wait = "access_by_lua_block { ngx.sleep(0.03) }" if late else ""
    paths = "".join(f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    bucket = "".join(f"location = {name} {{ default_type application/xml; return 200 '{LISTED}'; }}" for name in ("/atlases", "/atlases/"))
    (folder / "nginx.conf").write_text(
        f"{load} daemon off; master_process off; pid {folder}/pid; events {{ worker_connections 1024; }}\n"
        f"http {{ access_log off; sendfile on; keepalive_requests 1000000; {paths}\n"
        f"server {{ listen 127.0.0.1:{port}; root {folder}; default_type application/octet-stream; {wait} {bucket} }} }}\n"
    )
    return ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "errors")]


def bare(seconds: float) -> dict[str, float]:
    """What the server gives of the ranges that the loader asks for, to a client that does nothing with them."""
    import numpy as np
    from obstore.store import S3Store

    from sedd.io.format.object_store import RemoteFiles
    from sedd.io.loading.rows import RowReader
    from sedd.io.plan import EpochOrder
    from sedd.io.store import CellStore

    cells, asked, real = CellStore(URL), [], RemoteFiles.read

    def read(self: RemoteFiles, names: Any, starts: Any, stops: Any) -> Any:
        asked.extend((self.path(name).removeprefix("atlases/"), low, high) for name, low, high in zip(names, starts, stops, strict=True))
        return real(self, names, starts, stops)

    n = min(WINDOW, cells.n_obs)
    reader, ranks = RowReader(cells), EpochOrder(cells.n_obs, 0, 0, "window").ranks(np.arange(n))
    RemoteFiles.read = read  # type: ignore[method-assign]
    reader.read(ranks)
    client: Any = S3Store("atlases", endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True}, virtual_hosted_style_request=False)
    done, began, cpu = 0, time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        while time.perf_counter() < began + seconds:
            some = [asked[k % len(asked)] for k in range(done, done + 4 * IN_FLIGHT)]
            done += len(list(pool.map(lambda one: len(client.get_range(one[0], start=one[1], end=one[2])), some)))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    size = sum(high - low for _, low, high in asked)
    return {
        "wall": done / len(asked) * n / wall, "per_cpu_second": done / len(asked) * n / cpu, "requests_a_second": done / wall,
        "requests_of_a_window": len(asked), "bytes_of_a_cell": size / n,
    }  # fmt: skip


def epochs(seconds: float, local: str) -> dict[str, float]:
    """Cells per second of whole epochs of one of two ranks, of tokens, from their first request to their last batch; compiled code is loaded before."""
    from loader import BINNED

    from sedd.io.loader import CellLoader

    given: dict[str, Any] = {"batch_size": 512, "shuffle": "window", "mask": None, "labels": ["cell_type"], "pin_memory": False}
    with CellLoader(local, split="all", binning=BINNED, **given) as loader:
        next(iter(loader))
    with CellLoader(URL, split="all", binning=BINNED, rank=0, world_size=2, **given) as loader:
        cells, epoch, began, cpu = 0, 0, time.perf_counter(), time.process_time()
        while time.perf_counter() < began + seconds:
            loader.set_epoch(epoch)
            cells, epoch = cells + sum(len(batch.cell) for batch in loader), epoch + 1
        return {"wall": cells / (time.perf_counter() - began), "per_cpu_second": cells / (time.process_time() - cpu)}


def main() -> None:
    """Run one contestant."""
    if sys.argv[1] == "put":
        import s3fs

        s3fs.S3FileSystem().mkdir("atlases")
        s3fs.S3FileSystem().put(sys.argv[2], "atlases/store.zarr", recursive=True)
        print("{}")
        return
    if (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {1})
    how, seconds = sys.argv[1], float(sys.argv[2])
    if how == "s3fs":
        sys.modules["obstore"] = None  # type: ignore[assignment]
    print(json.dumps(bare(seconds) if how == "bare" else epochs(seconds, sys.argv[3])))


if __name__ == "__main__":
    main()
