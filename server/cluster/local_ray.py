"""A Ray of one's own on this machine: on loopback, with a token, without dashboard and job API."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from server.errors import ConfigurationError, EngineStartError

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_PAUSE_SECONDS = 0.2
_PROGRAM = "from ray.scripts.scripts import main; main()"


class State(msgspec.Struct, kw_only=True):
    """What ``prelude cluster`` remembers between its calls, in the directory of the cluster.

    Attributes:
        address: Address of Ray.
        pid: Process id of a Ray that was started here; 0 for another.
        port: Port of the door.
        applications: By name, a digest of what each application was deployed with.
    """

    address: str
    pid: int = 0
    port: int = 0
    applications: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class StateFile:
    """The file with the state.

    Attributes:
        directory: Directory of the cluster.
    """

    directory: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.directory / "cluster.json"

    def read(self) -> State | None:
        """The state; None if nothing runs."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=State)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"{self.path} is damaged: {error}") from error

    def write(self, state: State) -> None:
        """Remember a state."""
        self.directory.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(state))
        fresh.replace(self.path)

    def remove(self) -> None:
        """Forget it: nothing runs."""
        self.path.unlink(missing_ok=True)


def use_token(directory: Path) -> None:
    """Let this process, and what it starts, authenticate to Ray with a token of the cluster."""
    path = directory / "secrets" / "ray"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path), RAY_USAGE_STATS_ENABLED="0")


def is_running(pid: int) -> bool:
    """Whether a process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def start_ray(directory: Path, num_cpus: int) -> State:
    """Start Ray in the background, on loopback alone.

    Args:
        directory: Directory of the cluster, for its log.
        num_cpus: Processors that it may reserve.

    Raises:
        EngineStartError: If it does not start.
    """
    port = _free_port()
    command = [sys.executable, "-c", _PROGRAM, "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", str(num_cpus)]
    # Dashboard and job API would run any code of anyone who reaches them (CVE-2023-48022).
    command += ["--include-dashboard", "false", "--dashboard-host", "127.0.0.1"]
    command += ["--dashboard-agent-listen-port", str(_free_port()), "--metrics-export-port", str(_free_port())]
    command += ["--ray-client-server-port", str(_free_port()), "--object-store-memory", str(100 * 1024 * 1024)]
    log = directory / "logs" / "ray.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(  # noqa: S603 - a fixed command
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    until = time.monotonic() + _START_SECONDS
    while not _answers(port):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise EngineStartError(f"Ray did not start: see {log}")
        time.sleep(_PAUSE_SECONDS)
    return State(address=f"127.0.0.1:{port}", pid=process.pid)


def stop_ray(pid: int) -> None:
    """End a Ray that ``start_ray`` has started, and what belongs to it."""
    if not is_running(pid):
        return
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + _STOP_SECONDS
    while is_running(pid) and time.monotonic() < until:
        time.sleep(_PAUSE_SECONDS)
    if is_running(pid):
        os.killpg(pid, signal.SIGKILL)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
