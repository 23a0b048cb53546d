"""Logs of the formatter, of the middleware, and of a whole server from start to end."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server import logs
from server.api.inference.request_record import MAX_LOGGED_CHARS, RequestRecord, log_request, logged_input
from server.cli import app
from tests.support.log_records import fields_of
from tests.support.operations import OPERATIONS
from tests.support.serving import BASE, adapter, serving, upload
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow


def made(**values: Any) -> logging.LogRecord:
    record = logging.LogRecord("a.b", logging.WARNING, "file", 1, "say %s\nmore", ("it",), None)
    record.__dict__.update(values)
    return record


def test_a_line_is_one_json_object_with_the_fields_given() -> None:
    line = logs.JsonFormatter().format(made(fields={"tenant": "acme", "path": Path("x")}))
    assert "\n" not in line
    fields = json.loads(line)
    assert fields["message"] == "say it\nmore"
    assert (fields["level"], fields["logger"], fields["tenant"], fields["path"]) == ("WARNING", "a.b", "acme", "x")
    assert fields["time"].endswith("+00:00")


def test_errors_and_stacks_are_in_the_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = made(exc_info=sys.exc_info(), stack_info="here")
    fields = json.loads(logs.JsonFormatter().format(record))
    assert "ValueError: broken" in fields["exception"]
    assert fields["stack"] == "here"


@pytest.mark.parametrize(("path", "level"), [("/v1/models", "INFO"), ("/ready", "DEBUG"), ("/metrics", "DEBUG")])
def test_probes_and_scrapes_are_logged_at_debug(path: str, level: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    is_polled = OPERATIONS.match("GET", path).is_polled
    found = RequestRecord(
        request_id="r", method="GET", path=path, total_seconds=0.25, status=200, is_polled=is_polled
    )
    log_request(found)
    (record,) = caplog.records
    assert record.levelname == level
    assert record.message == f"GET {path} 200 in 0.250 s, request r"
    assert fields_of(record)["total_seconds"] == 0.25
    assert "outcome" not in fields_of(record)


def test_long_inputs_are_cut() -> None:
    value = [{"content": "x" * 20_000, "n": 3}]
    assert logged_input(value) == [{"content": "x" * MAX_LOGGED_CHARS, "n": 3}]
    assert logged_input(list(range(20_000))) == list(range(MAX_LOGGED_CHARS))


PROGRAM = """
import logging, os, warnings
from server import logs
logs.configure_from_variables("engine")
logging.getLogger("x").info("not shown")
warnings.warn("beware")
assert logs.variables() == {name: os.environ[name] for name in (logs.LEVEL_VARIABLE, logs.FORMAT_VARIABLE)}
1 / 0
"""


def test_another_process_logs_in_the_same_way_including_crashes() -> None:
    for form in ("json", "text"):
        environment = {**os.environ, logs.LEVEL_VARIABLE: "WARNING", logs.FORMAT_VARIABLE: form}
        command = [sys.executable, "-c", PROGRAM]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert result.returncode == 1
        assert "beware" in result.stderr
        assert "ZeroDivisionError" in result.stderr
        assert "not shown" not in result.stderr
        if form == "json":
            levels = [json.loads(line)["level"] for line in result.stderr.splitlines()]
            assert levels == ["WARNING", "CRITICAL"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def ended(folder: Path, request_id: str) -> dict[str, Any]:
    """The line of a request, which is written shortly after the answer."""
    wait_until(lambda: any(line.get("request_id") == request_id for line in lines_of(folder)))
    (line,) = [line for line in lines_of(folder) if line.get("request_id") == request_id]
    return line


def test_a_server_logs_only_json_and_one_line_per_request(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        '[[keys]]\nkey = "k"\ntenant = "acme"\nscopes = ["generate", "prompts:read", "prompts:write", "admin"]\n'
        '[[keys]]\nkey = "r"\ntenant = "readers"\nscopes = ["prompts:read"]\n'
    )
    flags = ("--dtype", "float32", "--log-format", "json", "--api-key-file", str(keys))
    with serving(tmp_path, *flags) as (client, process):
        client.headers["authorization"] = "Bearer k"
        assert upload(client, "dates", *adapter("dates")).status_code == 201
        body = {"model": "dates", "prompt": "a secret text", "max_tokens": 5, "ignore_eos": True}
        client.post("/v1/completions", json=body, headers={"x-request-id": "whole"}).raise_for_status()
        client.post("/v1/completions", json={**body, "stream": True}, headers={"x-request-id": "stream"}).read()
        wrong = {"model": "none", "messages": [{"role": "user", "content": "a secret text"}]}
        assert client.post("/v1/chat/completions", json=wrong, headers={"x-request-id": "bad"}).status_code >= 400
        client.post(
            "/v1/classify",
            json={"model": "dates", "input": "a secret text", "labels": ["a", "b"]},
            headers={"x-request-id": "label"},
        ).raise_for_status()
        unknown = {"x-request-id": "unknown", "authorization": "Bearer x"}
        assert client.get("/v1/models", headers=unknown).status_code == 401
        reading = {"x-request-id": "reading", "authorization": "Bearer r"}
        assert upload(client, "none", *adapter("dates")).status_code == 201
        assert client.delete("/v1/prompts/none", headers=reading).status_code == 403
        assert ended(tmp_path, "reading").items() >= {"status": 403, "tenant": "readers"}.items()
        with socket.create_connection((client.base_url.host, client.base_url.port)) as strange:
            strange.sendall(b"this is no HTTP\r\n\r\n")
            answer = strange.recv(4096)
        (id_line,) = [line for line in answer.split(b"\r\n") if line.startswith(b"x-request-id: ")]
        line = ended(tmp_path, id_line.split()[1].decode())
        assert line.items() >= {"status": 400, "error": "invalid_request", "client": "127.0.0.1"}.items()
        for name in ("whole", "stream"):
            line = ended(tmp_path, name)
            expected = {"status": 200, "tenant": "acme", "prompt": "dates", "version": 1, "outcome": "length"}
            assert line.items() >= {**expected, "model": "dates", "completion_tokens": 5}.items()
            assert line["prompt_tokens"] > 0
            assert line["virtual_tokens"] > 0
            total = line["queue_seconds"] + line["prefill_seconds"] + line["decode_seconds"]
            assert 0 < total <= line["total_seconds"] + 0.001
            assert 0 < line["first_token_seconds"] <= line["total_seconds"]
        assert ended(tmp_path, "bad").items() >= {"status": 404, "error": "model_not_found"}.items()
        assert ended(tmp_path, "label").items() >= {"operation": "classify", "outcome": "stop"}.items()
        assert ended(tmp_path, "unknown").items() >= {"status": 401, "error": "invalid_api_key"}.items()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    lines = lines_of(tmp_path)
    assert any(line["logger"].startswith("uvicorn") for line in lines)
    assert not any(line["message"].startswith("Invalid HTTP") for line in lines), (
        "the server's refusal log replaces this line"
    )
    assert any(line["message"] == f"{BASE} is ready" for line in lines)
    drain = "draining: refusing new requests; 0 sequences have up to 30 s to finish"
    assert any(line["message"] == drain for line in lines)
    assert "secret text" not in (tmp_path / "log").read_text()


def test_prompts_are_logged_only_if_configured(tmp_path: Path) -> None:
    with serving(tmp_path, "--dtype", "float32", "--log-format", "json", "--log-prompts") as (client, _):
        headers = {"x-request-id": "r1"}
        body = {"prompt": ["a secret text"], "max_tokens": 1}
        client.post("/v1/completions", json=body, headers=headers).raise_for_status()
        assert ended(tmp_path, "r1")["input"] == ["a secret text"]


def test_a_failed_start_is_logged_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs, "configure", lambda *_, **__: None)  # it would remove caplog's handler
    line = ["serve", "--model", "m", "--host", "0.0.0.0", "--port", "0", "--log-format", "json"]  # noqa: S104
    result = CliRunner().invoke(app, [*line, "--store", str(tmp_path)])
    assert isinstance(result.exception, SystemExit), result.exception  # any other has the exit code 1, too
    assert result.exit_code == 1
    assert "prelude:" not in result.stderr
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "--api-key-file" in record.message
