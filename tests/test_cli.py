from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server import app as server_app
from server.cli import FLAGS, app
from server.client.commands import ExitStatus
from server.client.http import server_url
from server.config import Settings
from server.errors import EngineStartError

runner = CliRunner()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Replaces the server by a list of the settings that ``serve`` was started with."""
    seen: list[Settings] = []
    monkeypatch.setattr(server_app, "run", lambda settings, *_: seen.append(settings))
    return seen


def test_serve_fills_the_settings(started: list[Settings]) -> None:
    line = "serve --model m --port 9 --kv-cache-memory 512MiB --max-upload-bytes 1GiB --no-enable-prefix-caching"
    result = runner.invoke(app, [*line.split(), "--device", "cpu", "--max-model-len", "64", "--store", "s"])
    assert result.exit_code == 0, result.output
    (settings,) = started
    assert settings.engine.model == "m"
    assert settings.http.port == 9
    assert settings.engine.kv_cache_memory == 512 * 2**20
    assert settings.engine.gpu_memory_utilization == 0.9
    assert settings.store.max_upload_bytes == 2**30
    assert not settings.engine.enable_prefix_caching
    assert (settings.engine.device, settings.engine.max_model_len, settings.store.location) == ("cpu", 64, "s")


def test_variables_fill_the_settings(started: list[Settings]) -> None:
    variables = {
        "PRELUDE_MODEL": "m",
        "PRELUDE_KV_CACHE_MEMORY": "2GiB",
        "PRELUDE_GPU_MEMORY_UTILIZATION": "1",
        "PRELUDE_ALLOW_OTHER_BASE": "1",
        "PRELUDE_PIN": "a, b@2",
    }
    result = runner.invoke(app, ["serve"], env=variables)
    assert result.exit_code == 0, result.output
    (settings,) = started
    assert settings.engine.kv_cache_memory == 2 * 2**30
    assert settings.engine.gpu_memory_utilization == 1.0
    assert settings.store.allow_other_base
    assert settings.store.pin == ("a", "b@2")
    assert settings.store.preload == ()


@pytest.mark.parametrize(
    ("words", "variables"),
    [
        ("--allow-origin http://a --allow-origin https://b:1 --allowed-host a --allowed-host b", {}),
        ("--allow-origin http://a,https://b:1 --allowed-host a,b,", {}),
        ("", {"PRELUDE_ALLOW_ORIGIN": "http://a, https://b:1", "PRELUDE_ALLOWED_HOST": " a b "}),
        ("", {"PRELUDE_ALLOW_ORIGIN": "http://a https://b:1", "PRELUDE_ALLOWED_HOST": "a,b"}),
    ],
)
def test_some_flags_may_be_repeated(started: list[Settings], words: str, variables: dict[str, Any]) -> None:
    result = runner.invoke(app, ["serve", "--model", "m", *words.split()], env=variables)
    assert result.exit_code == 0, result.output
    (settings,) = started
    assert settings.http.allow_origin == ("http://a", "https://b:1")
    assert settings.http.allowed_host == ("a", "b")


@pytest.mark.parametrize(("flag", "value"), [("--allow-origin", "*"), ("--allowed-host", "http://a")])
def test_a_bad_origin_or_host_is_an_error_of_one_line(tmp_path: Path, flag: str, value: str) -> None:
    result = runner.invoke(app, ["serve", "--model", "m", "--port", "0", "--store", str(tmp_path / "s"), flag, value])
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"prelude: {flag} '{value}' is not a")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "line",
    [
        "serve",
        "serve --model m --port x",
        "serve --model m --port 70000",
        "serve --model m --device tpu",
        "serve --model m --kv-cache-memory lots",
        "serve --model m --gpu-memory-utilization 0",
        "serve --model m --gpu-memory-utilization 1.01",
        "serve --model m --gpu-memory-utilization -0.5",
        "serve --model m --gpu-memory-utilization nan",
        "serve --model m --gpu-memory-utilization most",
        "serve --model m --max-num-seqs 0",
        "serve --model m --no-such-flag",
        "serve --model m --pin Bad",
        "push",
        "push /no/such/directory --id x",
        "rm",
        "rm Bad",
        "rm name@latest",
        "pull name",
        "show Bad",
        "show name@01",
        "list --limit 0",
        "promote name",
        "promote name 0",
        "promote name latest",
        "promote name@1 1",
        "promote name 1 --alias 7",
        "rollback name --alias Bad",
        "rollback name --expect 0",
        "inspect name --top-k 21",
        "inspect name --task-id -1",
        "warm Bad",
    ],
)
def test_usage_errors_are_status_2(started: list[Settings], line: str) -> None:
    result = runner.invoke(app, line.split())
    assert result.exit_code == 2
    assert started == []


def test_a_server_that_cannot_start_is_status_1_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise EngineStartError("no such\nmodel")

    monkeypatch.setattr(server_app, "run", fail)
    result = runner.invoke(app, ["serve", "--model", "m"])
    assert result.exit_code == 1
    assert result.stderr == "prelude: no such model\n"


def test_an_open_host_is_refused(tmp_path: Path) -> None:
    line = ["serve", "--model", "m", "--host", "0.0.0.0", "--port", "0", "--store", str(tmp_path)]  # noqa: S104
    result = runner.invoke(app, line)
    assert result.exit_code == 1
    assert "--api-key-file" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    ["list", "rm x", "push {tmp_path} --id x", "pull x {tmp_path}", "show x", "promote x 1", "rollback x"]
    + [f"{command} x" for command in ("inspect", "warm")]
    + ["run x {tmp_path}/rows {tmp_path}/out", "eval x --data {tmp_path}/rows"],
)
def test_no_server_is_status_7_and_one_line(tmp_path: Path, line: str) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "rows").write_text('{"text": "a", "label": "b"}\n')
    command = line.format(tmp_path=tmp_path).split()
    result = runner.invoke(app, [*command, "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 7
    assert "cannot be reached" in result.stderr
    assert "prelude demo or prelude serve" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    as_json = runner.invoke(app, [*command, "--json", "--url", "http://127.0.0.1:9"])
    assert as_json.exit_code == 7
    assert json.loads(as_json.stdout)["error"]["code"] == "unreachable"
    assert as_json.stderr == result.stderr


URLS = ["nonsense", "", "127.0.0.1:8000", "http://[", "http://", "ftp://127.0.0.1", "http://127.0.0.1:port"]
URLS += ["http://127.0.0.1:9/?a=1", "http://127.0.0.1:9/#a", "http://127.0.0.1:99999", "http://" + "x" * 5000 + "."]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("command", ["list", "show x", "run x {in} {out}", "eval x --data {in}", "promote x 1"])
def test_a_bad_url_is_refused(url: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"text": "a", "label": "b"}\n')
    line = command.format(**{"in": tmp_path / "in", "out": tmp_path / "out"}).split()
    result = runner.invoke(app, [*line, "--url", url])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("prelude: --url ")
    assert "write it as http://HOST:PORT" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_url_for_openai_clients_is_accepted() -> None:
    assert str(server_url("http://127.0.0.1:8000/v1/")) == "http://127.0.0.1:8000"
    assert str(server_url("https://host/prefix/v1")) == "https://host/prefix"
    assert str(server_url(" http://127.0.0.1:8000 ")) == "http://127.0.0.1:8000"


@pytest.mark.parametrize("key", ["schlüssel", "k\n", "a\tb"])
def test_a_key_that_is_not_a_valid_header_is_refused(key: str) -> None:
    result = runner.invoke(app, ["list", "--api-key", key])
    assert result.exit_code == 1
    assert "API key" in result.stderr


def test_help_lists_the_exit_codes() -> None:
    for line in ("--help", "push --help", "warm --help"):
        text = " ".join(runner.invoke(app, line.split(), env={"COLUMNS": "300"}).output.split())
        for status in ExitStatus:
            assert f" {status.value} " in text.split("Exit codes:")[1]


def test_push_without_the_files_is_an_error(tmp_path: Path) -> None:
    result = runner.invoke(app, ["push", str(tmp_path), "--id", "x"])
    assert result.exit_code == 1
    assert "adapter_config.json" in result.stderr


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_help_shows_every_flag(command: str) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output)
    for flag in FLAGS:
        if command == "serve" or flag.name not in {"model", "revision"}:
            assert f"--{flag.name.replace('_', '-')}" in text
            assert flag.variable in text


def test_help_lists_the_commands() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    commands = ("serve", "demo", "push", "pull", "list", "show", "promote", "rollback", "rm", "inspect", "warm")
    for command in commands:
        assert command in result.output


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"prelude {metadata.version('prelude-server')}\n"


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_help_at_80_columns_shows_every_flag_and_variable_whole(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}, terminal_width=80)
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80
    for flag in FLAGS:
        if command == "serve" or flag.name not in {"model", "revision"}:
            assert f"--{flag.name.replace('_', '-')}" in result.output
            assert flag.variable in result.output
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[:4] == ["Model and engine:", "Soft prompts and their store:", "HTTP:", "Names, logs and traces:"]
    assert ("required]" in result.output) == (command == "serve")
