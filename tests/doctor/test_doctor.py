"""``prelude doctor``: each check finds the fault that it is for."""

from __future__ import annotations

import json
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from prompt_store.open_store import open_store
from server.cli import app
from server.config import VLLM_VERSION
from server.doctor.findings import Status
from server.doctor.machine import GIB, Device, inspect_machine
from server.doctor.packages import check_kernels, check_packages
from server.doctor.services import check_server, check_store, check_vllm
from server.doctor.sizes import SHAPES, fits
from tests.support.live_server import LiveServer


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


@contextmanager
def answering(answers: dict[str, tuple[int, bytes]]) -> Iterator[str]:
    """A server that gives fixed answers by path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path, (404, b"nothing here"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_healthy_installation_passes(tmp_path: Path, live: LiveServer) -> None:
    result = doctor("--json", "--store", str(tmp_path / "new"), "--url", live.url)
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["ok"]
    assert {finding["status"] for finding in report["findings"]} <= {"ok", "warning"}
    by_area = {finding["area"]: finding["text"] for finding in report["findings"]}
    assert metadata.version("prelude-server") in by_area["python"]
    assert f"torch {torch.__version__}" in by_area["packages"]
    assert "serves" in by_area["server"]
    assert [model["model"] for model in report["models"]] == [shape.name for shape in SHAPES]
    assert not (tmp_path / "new").exists(), "a check changes nothing"


def test_a_failure_sets_the_exit_status_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = doctor("--store", str(tmp_path / "file"), "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "is not a directory" in result.output.replace("\n", " ")
    assert "--store" in result.output


@pytest.mark.parametrize(
    ("device", "dtype", "smallest_that_does_not_fit", "tokens_of_8b"),
    [
        (
            Device("cuda", 80 * GIB, True),
            "bfloat16",
            "Llama 3.1 70B",
            (int(80 * GIB * 0.9) - 16_060_000_000) // 131072,
        ),
        (Device("cuda", 16 * GIB, False), "float16", "Llama 3.1 8B", 0),
        (Device("cpu", 32 * GIB, False), "float32", "Mistral 7B", 0),
        (Device("cpu", 1 * GIB, True), "bfloat16", "Qwen2.5 0.5B", 0),
    ],
)
def test_sizes_follow_from_memory_and_dtype(
    device: Device, dtype: str, smallest_that_does_not_fit: str, tokens_of_8b: int
) -> None:
    found = {fit.model: fit for fit in fits(device)}
    assert {fit.dtype for fit in found.values()} == {dtype}
    assert next(name for name, fit in found.items() if fit.tokens == 0) == smallest_that_does_not_fit
    assert found["Llama 3.1 8B"].tokens == tokens_of_8b


@pytest.mark.parametrize(
    ("flags", "has_bfloat16", "status"),
    [
        ("fpu avx2 avx512f avx512_bf16", True, Status.OK),
        ("fpu avx2 amx_bf16 amx_tile", True, Status.OK),
        ("fpu avx2", False, Status.OK),
        ("fpu sse2", False, Status.WARNING),
    ],
)
def test_the_processor_decides_the_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, has_bfloat16: bool, status: Status
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\n")
    device, findings = inspect_machine(tmp_path / "cpuinfo")
    assert (device.name, device.has_bfloat16) == ("cpu", has_bfloat16)
    assert findings[0].status is status
    assert findings[0].text.startswith("A CPU, ")


def with_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str = "echo 580.1", status: int = 0) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{line}\nexit {status}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_a_gpu_with_torch_for_processors_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(tmp_path, monkeypatch)
    monkeypatch.setattr("torch.version.cuda", None)
    _, findings = inspect_machine()
    assert (findings[-1].area, findings[-1].status) == ("gpu", Status.WARNING)
    assert "580.1" in findings[-1].text
    assert "build for processors" in findings[-1].text
    assert findings[-1].advice.startswith("pip install torch")


def test_a_driver_that_torch_cannot_use_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(tmp_path, monkeypatch)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    _, findings = inspect_machine()
    assert "finds no usable GPU" in findings[-1].text
    assert "update the driver" in findings[-1].advice


@pytest.mark.parametrize("line", ["exit 9", "true"])
def test_a_broken_driver_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    with_driver(tmp_path, monkeypatch, line)
    _, findings = inspect_machine()
    assert findings[-1].text == "no NVIDIA GPU; the processor serves"


@pytest.mark.parametrize(
    ("major", "free", "status", "words"),
    [(9, 70, Status.OK, "70.0 of 80.0 GiB"), (7, 70, Status.WARNING, "7.5"), (9, 20, Status.WARNING, "20.0 of 80.0")],
)
def test_a_gpu_is_described(
    monkeypatch: pytest.MonkeyPatch, major: int, free: int, status: Status, words: str
) -> None:
    properties = SimpleNamespace(name="A GPU", major=major, minor=5)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free * GIB, 80 * GIB))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    device, findings = inspect_machine()
    assert device == Device("cuda", free * GIB, major >= 8)
    assert findings[-1].status is status
    assert words in findings[-1].text


def test_missing_and_other_packages_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "broken_server-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\nName: broken-server\nVersion: 1.0\n"
        "Requires-Dist: no-such-package>=2\nRequires-Dist: torch<1\nRequires-Dist: other; extra == 'x'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    findings = check_packages("broken-server")
    texts = [finding.text for finding in findings if finding.status is Status.FAILED]
    assert texts == [
        "not installed: no-such-package",
        f"other versions than required: torch {metadata.version('torch')} (needed: <1)",
    ]


def test_missing_kernels_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_kernels(has_gpu=False) == []

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("server.doctor.packages.metadata.version", absent)
    assert [finding.status for finding in check_kernels(has_gpu=False)] == [Status.WARNING]
    assert "triton" in check_kernels(has_gpu=True)[0].text


def test_the_store_is_checked_and_not_changed(tmp_path: Path) -> None:
    open_store(tmp_path / "store").close()
    before = sorted(path.name for path in (tmp_path / "store").rglob("*"))
    findings = check_store(str(tmp_path / "store"), None)
    assert {finding.status for finding in findings} == {Status.OK}
    assert sorted(path.name for path in (tmp_path / "store").rglob("*")) == before
    (tmp_path / "store/catalog.sqlite3").write_bytes(b"no database")
    assert check_store(str(tmp_path / "store"), None)[-1].status is Status.FAILED


def test_a_catalog_that_cannot_be_reached_is_reported(tmp_path: Path) -> None:
    url = "postgresql://nobody@127.0.0.1:1/none"
    assert check_store(str(tmp_path), url)[-1].status is Status.FAILED
    found = check_store("s3://bucket", None)
    assert found[-1].status is Status.FAILED
    assert "--catalog" in found[-1].text


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1024))
    assert check_store(str(tmp_path), None)[0].status is Status.WARNING


def test_a_store_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written" in check_store(str(tmp_path / "a/b"), None)[0].text


MODELS = json.dumps({"data": [{"id": "base"}, {"id": "a", "parent": "base"}]}).encode()
LIVE = (200, b"{}")


@pytest.mark.parametrize(
    ("answers", "status", "words"),
    [
        ({}, Status.FAILED, "another program"),
        ({"/live": LIVE, "/ready": (503, b'{"error": {"message": "loading"}}')}, Status.FAILED, "not ready: loading"),
        ({"/live": LIVE, "/ready": (503, b"?")}, Status.FAILED, "status 503"),
        ({"/live": LIVE, "/ready": LIVE, "/v1/models": (401, b"")}, Status.WARNING, "only with a key"),
        ({"/live": LIVE, "/ready": LIVE, "/v1/models": (500, b"")}, Status.FAILED, "status 500"),
        ({"/live": LIVE, "/ready": LIVE, "/v1/models": (200, b"[]")}, Status.FAILED, "does not answer"),
        ({"/live": LIVE, "/ready": LIVE, "/v1/models": (200, MODELS)}, Status.OK, "serves base with 1 "),
    ],
)
def test_a_server_in_every_state(answers: dict[str, tuple[int, bytes]], status: Status, words: str) -> None:
    with answering(answers) as url:
        found = check_server(f"{url}/v1", "key")
    assert (found[0].status, len(found)) == (status, 1)
    assert words in found[0].text


def test_a_key_that_no_header_can_hold_is_reported() -> None:
    found = check_server("http://127.0.0.1:1", "schl\u00fcssel")
    assert (found[0].status, found[0].area) == (Status.FAILED, "server")
    assert "not allowed in a header" in found[0].text


def test_no_server_is_no_fault() -> None:
    assert check_server("http://127.0.0.1:1", None)[0].status is Status.OK
    assert check_server("file:///etc/passwd", None)[0].status is Status.FAILED


@pytest.mark.parametrize(
    ("printed", "status", "words"),
    [
        (f"echo {VLLM_VERSION}.9", Status.OK, "vLLM 0."),
        ("echo 0.1.0", Status.FAILED, "vLLM 0.1.0"),
        ("exit 1", Status.FAILED, "has no vLLM"),
    ],
)
def test_the_environment_of_vllm_is_checked(tmp_path: Path, printed: str, status: Status, words: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{printed}\n")
    python.chmod(0o755)
    found = check_vllm(str(python))
    assert found[0].status is status
    assert words in found[0].text
    assert check_vllm(None) == []
    assert check_vllm(str(tmp_path / "none"))[0].status is Status.FAILED
    assert check_vllm(sys.executable)[0].text == f"{sys.executable} has no vLLM"
