"""A model is uploaded to a server of this machine that speaks as the Hugging Face Hub does."""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sedd.checkpoint import FORMAT
from sedd.config_files import setting_types
from sedd.errors import UserError
from sedd.inference.pretrained import Pretrained

huggingface_hub = pytest.importorskip("huggingface_hub")
SECRET = "hf_0123456789"


@dataclass
class Hub:
    """What was sent, and what is to be answered in place of the usual."""

    address: str = ""
    made: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    refuse: int = 0


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Answer(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            assert self.path == "/api/validate-yaml" or self.headers["Authorization"] == f"Bearer {SECRET}"
            said: dict[str, Any] = {}
            if found.refuse:
                said = {"error": f"you may not, {SECRET}"}
            elif self.path == "/api/repos/create":
                found.made.append(json.loads(body))
                said = {"url": f"{found.address}/ada/blood"}
            elif self.path == "/api/validate-yaml":
                said = {"errors": [], "warnings": []}
            elif self.path == "/api/models/ada/blood/preupload/main":
                names = [one["path"] for one in json.loads(body)["files"]]
                said = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            elif self.path == "/api/models/ada/blood/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        found.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                said = {"commitUrl": f"{found.address}/ada/blood/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            self.send_response(found.refuse or (200 if said else 404))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.address = f"http://127.0.0.1:{server.server_port}"
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **settings: api(endpoint=found.address, **settings))
    yield found
    server.shutdown()
    server.server_close()


def test_what_is_uploaded_is_the_exported_model_and_names_no_folder(hub: Hub, model: Pretrained, tiny_h5ad: Path, tmp_path: Path) -> None:
    assert model.push_to_hub("ada/blood", token=SECRET) == f"{hub.address}/ada/blood"
    assert [(one["organization"], one["name"], one["visibility"]) for one in hub.made] == [("ada", "blood", "private")]
    assert hub.files.keys() == {"README.md", "config.json", "model.safetensors", "panel.json"}
    for content in hub.files.values():
        assert not [secret for secret in (str(tiny_h5ad.parent), str(model.path.parent), SECRET) if secret.encode() in content]
    for name, content in hub.files.items():  # a snapshot of the Hub is a folder of links
        (tmp_path / f"{name}.blob").write_bytes(content)
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / name).symlink_to(f"../{name}.blob")
    again = Pretrained.load(tmp_path / "snapshot")
    assert list(again.genes) == list(model.genes) and again.state["sedd_format"] == FORMAT


PLAIN = {"modality", "gene_names", "layer", "keys", "drop", "condition", "memory_budget", "checkpoint_every"}
"""Settings that are text and no path."""


def test_no_setting_that_is_handed_on_names_a_folder(model: Pretrained, tmp_path: Path) -> None:
    paths = {name for name, kind in setting_types().items() if "str" in kind} - PLAIN
    args = {**model.state["args"], **dict.fromkeys(paths, "/labs/secret/file")}
    folder = replace(model, state={**model.state, "args": args}).save_pretrained(tmp_path / "model")
    assert "genes" in paths and not [path.name for path in folder.iterdir() if b"secret" in path.read_bytes()]


def test_a_refused_upload_is_one_line_without_the_token(hub: Hub, model: Pretrained) -> None:
    hub.refuse = 403
    for name, token in (("ada/blood", SECRET), ("no such/name/at all", SECRET)):
        with pytest.raises(UserError, match=f"^{name}: the model was not uploaded ") as refused:
            model.push_to_hub(name, token=token)
        assert "\n" not in str(refused.value) and SECRET not in str(refused.value)


def test_a_server_that_is_not_there_is_one_line(hub: Hub, model: Pretrained) -> None:
    hub.address = "http://127.0.0.1:9"
    with pytest.raises(UserError, match="^ada/blood: the model was not uploaded ") as refused:
        model.push_to_hub("ada/blood", token=SECRET)
    assert "\n" not in str(refused.value)


def test_without_huggingface_hub_one_line_says_what_to_install(model: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="^push_to_hub needs the package huggingface_hub, which is not installed: pip install huggingface_hub.$"):
        model.push_to_hub("ada/blood")
