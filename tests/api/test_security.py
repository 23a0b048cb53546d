"""Attacks that worked on other model servers. docs/security.md names these tests and others."""

from __future__ import annotations

import ast
import hmac
import json
import pickle
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import load_file

from server.api.keys.keys import load_keys
from server.config import EngineSettings, HttpSettings, Settings
from server.demo.tour import MODEL_DIRECTORY
from server.engine.llm_engine import LLMEngine
from server.errors import AuthenticationError, EngineStartError
from tests.support.api_fixtures import MakeApp
from tests.support.fake_engine import FakeEngine
from tests.support.live_server import LiveServer

ROOT = Path(__file__).parent.parent.parent
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "zipfile", "tarfile"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load", "os.system", "os.popen"}


def test_no_code_unpickles_unpacks_or_evaluates() -> None:
    found = []
    for path in [path for folder in ("server", "prompt_store") for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names} & UNSAFE_MODULES
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]} & UNSAFE_MODULES
            elif isinstance(node, ast.Call):
                names = {ast.unparse(node.func)} & UNSAFE_CALLS
            else:
                continue
            found += [(path.name, name) for name in names]
    # Files that a user names on the command line are read member by member, and never extracted.
    archives = [
        ("prompt_store/maintenance/backup_format.py", "tarfile"),
        ("server/client/importers/kobold.py", "zipfile"),
        ("server/client/importers/torch_files.py", "zipfile"),
        ("server/client/importers/zip_files.py", "zipfile"),
    ]
    assert sorted(found) == [(Path(path).name, module) for path, module in archives]
    for name, _ in archives:
        assert "extract" not in (ROOT / name).read_text().replace("extractfile", "")


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    model, marker = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(MODEL_DIRECTORY, model)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "custom.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(EngineStartError, match="cannot load the model"):
        LLMEngine(EngineSettings(model=str(model), device="cpu"), on_loaded=lambda: None)
    assert not marker.exists()


class Harmful:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._marker), "w")


def test_pickled_models_are_not_opened(tmp_path: Path) -> None:
    model, marker = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(MODEL_DIRECTORY, model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    with pytest.raises(EngineStartError, match="cannot load the model"):
        LLMEngine(EngineSettings(model=str(model), device="cpu"), on_loaded=lambda: None)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(marker)))
    with pytest.raises(EngineStartError, match="cannot load the model"):
        LLMEngine(EngineSettings(model=str(model), device="cpu"), on_loaded=lambda: None)
    assert not marker.exists()


def test_every_key_is_compared_with_every_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("one\ntwo\nthree\n")
    keys = load_keys(HttpSettings(api_key_file=tmp_path / "keys"))
    assert keys is not None
    compared = []
    compare = hmac.compare_digest

    def counting(one: bytes, two: bytes) -> bool:
        compared.append(two)
        return compare(one, two)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for text in ("one", "two", "three"):
        compared.clear()
        keys.check(f"Bearer {text}")
        assert len(compared) == 3
    compared.clear()
    with pytest.raises(AuthenticationError):
        keys.check("Bearer on")
    assert len(compared) == 3


TARGETS = [
    "/v1/models",
    "//v1/models",
    "/v1//models",
    "/./v1/models",
    "/live/../v1/models",
    "/live/..%2fv1/models",
    "/live%2f..%2f..%2fv1/models",
    "/%76%31/models",
    "/v1/models;/live",
    "/v1/models%00/live",
    "/v1/models?x=/live",
    "/v1/models#/live",
    "/V1/MODELS",
    "/live#/../v1/models",
    "http://x/v1/models",
    "http://x/live/../metrics",
    "http://x:1/metrics?/live",
    "/metrics/",
    "*",
]


def test_no_spelling_of_a_path_bypasses_the_key(make_app: MakeApp, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    locked = replace(settings, http=replace(settings.http, api_key_file=tmp_path / "keys"))
    with LiveServer(make_app(locked), locked).running() as live:
        live.wait_until_ready()
        address = urlsplit(live.url)
        for target in TARGETS:
            for method in ("GET", "HEAD", "OPTIONS", "POST"):
                for more in (b"", b"X-Original-URL: /live\r\nX-Rewrite-URL: /live\r\nX-Forwarded-Prefix: /live\r\n"):
                    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
                        head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n".encode()
                        connection.sendall(head + more + b"Connection: close\r\n\r\n")
                        status = connection.makefile("rb").readline().split()[1]
                    # The fragment is not part of the path, and the rest is /live, which is open.
                    is_open = target.startswith("/live#") and method == "GET"
                    expected = {b"200"} if is_open else {b"400", b"401", b"404", b"405"}
                    assert status in expected, (method, target, status)


@pytest.mark.anyio
async def test_no_request_supplies_a_template(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    bomb = "{% for a in range(10**9) %}{{ a.__class__ }}{% endfor %}"
    body = {"messages": [{"role": "user", "content": bomb}], "max_tokens": 2}
    (await client.post("/v1/chat/completions", json=body)).raise_for_status()
    (plain,) = engine.requests
    assert bomb.encode() in bytes(token for token in plain.prompt_token_ids if token < 256)
    for name, value in (
        ("chat_template", bomb),
        ("chat_template_kwargs", {"chat_template": bomb, "tokenize": True}),
        ("documents", [{"text": bomb}]),
    ):
        response = await client.post("/v1/chat/completions", json=body | {name: value})
        if response.status_code == 400:
            assert response.json()["error"]["param"] == name
        else:
            assert engine.requests[-1].prompt_token_ids == plain.prompt_token_ids
