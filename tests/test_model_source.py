"""Values of ``--model``, and early refusals of bad ones with an explanation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from server import model_source
from server.cli import app
from server.errors import ConfigurationError
from server.model_source import locate


class Hub(BaseHTTPRequestHandler):
    """Answers every request with the test's status and headers."""

    status = 200
    headers_sent: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[str]] = []
    released = threading.Event()
    hangs = False

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        if self.hangs:
            self.released.wait(60)
        self.send_response(self.status)
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def use_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    class Own(Hub):
        headers_sent: ClassVar[dict[str, str]] = {}
        asked: ClassVar[list[str]] = []
        released = threading.Event()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    yield Own
    Own.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_hub(monkeypatch, tmp_path, "http://127.0.0.1:9")


def cache(tmp_path: Path) -> Path:
    """A model in the layout of the hub's cache."""
    commit = "0" * 40
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "hub" / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    return snapshot


def refused(model: str, revision: str | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        locate(model, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_on_the_hub_is_accepted(hub: type[Hub]) -> None:
    assert locate("org/name") == "org/name"
    assert locate("org/name", "v2") == "org/name"
    assert hub.asked == ["/org/name/resolve/main/config.json", "/org/name/resolve/v2/config.json"]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "the model 'org/name' does not exist"),
        (401, "RepoNotFound", "or log in (hf auth login, or HF_TOKEN)"),
        (403, "GatedRepo", "is gated: log in"),
        (404, "RevisionNotFound", "has no revision 'v9'"),
        (404, "EntryNotFound", "transformers cannot load it"),
        (500, "", "cannot be reached"),
        (503, "", "cannot be reached"),
        (429, "", "cannot be reached"),
    ],
)
def test_refusals_of_the_hub_are_explained(hub: type[Hub], status: int, code: str, words: str) -> None:
    hub.status, hub.headers_sent = status, {"X-Error-Code": code} if code else {}
    assert words in refused("org/name", "v9" if code == "RevisionNotFound" else None)
    assert len(hub.asked) == 1, "the hub must get one request"


def test_a_hub_that_does_not_answer_is_an_error(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "_CHECK_SECONDS", 0.05)
    hub.hangs = True
    assert "cannot be reached (no answer within 0 s)" in refused("org/name")


def test_an_unreachable_hub_is_an_error(nowhere: None) -> None:
    text = refused("org/name")
    for part in ("the model 'org/name' does not exist", "http://127.0.0.1:9 cannot be reached", "Give a directory"):
        assert part in text


def test_a_cached_model_is_served_without_the_hub(
    nowhere: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = cache(tmp_path)
    assert locate("org/name") == str(snapshot)
    assert "loading org/name from the hub's cache" in caplog.text


def test_a_gated_model_that_was_fetched_before_is_served(
    hub: type[Hub], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = cache(tmp_path)
    hub.status, hub.headers_sent = 403, {"X-Error-Code": "GatedRepo"}
    assert locate("org/name") == str(snapshot)
    assert "loading the cached copy" in caplog.text


def test_offline_only_the_cache_is_used(hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("org/name")
    cache(tmp_path)
    assert locate("org/name") == "org/name"
    assert hub.asked == []


def test_a_directory_with_a_model_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)) == str(tmp_path)


def test_directories_without_a_model_are_explained(tmp_path: Path) -> None:
    assert "give a hub id" in refused(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert refused(str(tmp_path)).endswith(f"; {tmp_path / 'model'} has one")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it is an adapter" in refused(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/directory", "./model", "../model", "~/model", "a/b/c", "C:\\models\\x"])
def test_missing_paths_are_refused(hub: type[Hub], model: str) -> None:
    assert "no such directory" in refused(model)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("org name", "nor a hub id (owner/name)"),
        ("org/na--me", "nor a hub id"),
        ("schön", "nor a hub id"),
        ("x" * 300, "cannot be read"),
        ("nul\0", "nor a hub id"),
    ],
)
def test_bad_model_names_are_refused(hub: type[Hub], model: str, words: str) -> None:
    assert words in refused(model)
    assert hub.asked == []


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    assert "is a file" in refused(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["m-Q4_K_M.gguf", "M.GGUF"])
def test_gguf_is_explained(tmp_path: Path, name: str) -> None:
    assert "the safetensors that GGUF files are converted from" in refused(str(tmp_path / "missing" / name))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file" in refused(str(tmp_path / "m.gguf"))
    assert "has no config.json but a GGUF file" in refused(str(tmp_path))


def test_the_name_that_a_server_gives_its_model_is_explained(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = "If a server gives its model the name 'llama', give the hub id or directory"
    hub.status, hub.headers_sent = 404, {"X-Error-Code": "RepoNotFound"}
    assert words in refused("llama")
    assert "If a server" not in refused("org/llama")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert words in refused("llama")


def test_a_hub_out_of_reach_costs_at_most_five_seconds() -> None:
    assert model_source._ANSWER_SECONDS < model_source._CHECK_SECONDS <= 5


def test_serve_ends_before_anything_is_loaded(nowhere: None, tmp_path: Path) -> None:
    line = ["serve", "--model", "org/name", "--port", "0", "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1
    assert "prelude: the model 'org/name' does not exist" in result.stderr
    assert not (tmp_path / "store").exists()


def test_train_ends_before_anything_is_loaded(nowhere: None, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n' * 4)
    line = ["train", "--model", "org/name", "--data", str(data), "--id", "x", "--run-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1
    assert "the model 'org/name' does not exist" in result.stderr
    assert not (tmp_path / "run").exists()
