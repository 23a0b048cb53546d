"""Which stream the command writes to, and what it does if a stream cannot be written."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server import cli
from tests.support.processes import PRELUDE

pytestmark = pytest.mark.slow

KEY = re.compile(r"prelude-[\w-]{43}\n")
FULL = Path("/dev/full")


def prelude(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PRELUDE, *arguments], text=True, timeout=300, check=False, **options)


def test_key_writes_a_usable_file_to_each_stream(tmp_path: Path) -> None:
    with (tmp_path / "hash").open("w") as out, (tmp_path / "key").open("w") as err:
        assert prelude("key", stdout=out, stderr=err).returncode == 0
    assert KEY.fullmatch((tmp_path / "key").read_text())
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", (tmp_path / "hash").read_text())


def test_key_is_labelled_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    result = CliRunner().invoke(cli.app, ["key"])
    assert result.stderr.startswith("API key (not shown again): prelude-")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_of_one_line() -> None:
    with FULL.open("w") as full:
        done = prelude("key", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "prelude: the output cannot be written: No space left on device\n"
    with FULL.open("w") as full:
        done = prelude("list", "--url", "http://127.0.0.1:9", stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_closed_pipe_is_silent() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = prelude("key", stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert done.returncode == 1
    assert done.stderr == "" or KEY.fullmatch(done.stderr)


def test_other_os_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError(errno.ENOENT, "no such file")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(OSError, match="no such file"):
        cli.main()


def test_ctrl_c_prints_no_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        command = [*PRELUDE, "list", "--url", url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)  # the whole request: now it waits for an answer that never arrives
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert out == ""
    assert "Traceback" not in err


def test_an_incomplete_answer_prints_no_traceback() -> None:
    """The server closes the connection in the middle of its answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        result = CliRunner().invoke(cli.app, ["list", "--url", f"http://127.0.0.1:{server.getsockname()[1]}"])
        thread.join()
    assert result.exit_code == 7
    assert result.stderr.count("\n") == 1
    assert "prelude serve" not in result.stderr, "a server answers, so there is no advice to start one"


def test_a_port_in_use_and_a_bad_address_are_errors_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = ["serve", "--model", str(tmp_path), "--store", str(tmp_path / "store")]
        result = CliRunner().invoke(cli.app, [*line, "--port", port])
        assert result.exit_code == 1
        expected = f"prelude: 127.0.0.1:{port} cannot be bound: another process listens there; give another --port\n"
        assert result.stderr == expected
        for host in ("a..b", "no.such.host.invalid", "256.1.1.1"):
            result = CliRunner().invoke(cli.app, [*line, "--port", "0", "--host", host])
            assert result.exit_code == 1
            assert result.stderr.count("\n") == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_demo_with_json_logs_writes_only_json(tmp_path: Path) -> None:
    done = prelude(
        "demo", "--exit", "--log-format", "json", "--port", "0", "--num-threads", "1", "--kv-cache-memory", "64MiB",
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {"INFO"} <= {line["level"] for line in lines}
    assert any(line["message"] == "prelude-demo is ready" for line in lines)
    assert not any(line["logger"].startswith("http") for line in lines), "the tour's requests must not be logged"
    assert "answers match the held-out ones" in done.stdout
