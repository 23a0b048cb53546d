"""Report a training to a server while it runs: ``prelude train --report URL``.

A thread sends what is new. The run directory is the spool: metrics are read from its ``metrics.jsonl``, and
``report.json`` keeps the id of the run and what was sent. While the server is away, everything waits there; with
``--resume`` the same run is reported on. A training never fails, and never waits long, because of its report.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.client.http import ClientError, PreludeClient
from server.training.errors import GoldenCheckError
from server.training.run_directory import RunDirectory
from server.training.settings import TrainSettings, public_settings

INTERVAL_SECONDS = 2.0
"""How often something is sent while a training runs."""

HEARTBEAT_SECONDS = 60.0
"""A run is reported this often even if nothing has changed."""

CLOSE_SECONDS = 20.0
"""How long the end of a training waits for the last report."""

_MAX_POINTS = 500
_MAX_PAUSE_SECONDS = 30.0
_MAX_TEXT_CHARS = 2000
_MAX_WARNINGS = 100
_MAX_NUMBERS = 16
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_FILE = "report.json"


class RunReport:
    """The report of one training.

    Args:
        client: Client of the server.
        settings: The settings of the training.
        say: Called with a line for people, at most once while the server is away.
    """

    def __init__(self, client: PreludeClient, settings: TrainSettings, say: Callable[[str], None]) -> None:
        self._client = client
        self._settings = settings
        self._say = say
        self._directory = RunDirectory(settings.run_dir)
        self._lock = threading.Lock()
        self._wakes = threading.Event()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._id = ""
        self._state: dict[str, Any] = {}
        self._is_changed = False
        self._sent_at = 0.0
        self._position = 0
        self._inode: int | None = None
        self._drops = True
        """Whether the next metrics replace those that the server has: of a resumed run, these may be too many."""
        self._refusal: ClientError | None = None
        self._is_away = False

    # What the training calls

    def progress(self, step: int, num_steps: int) -> None:
        """Note progress; the first call begins the report."""
        self._change(step=step, num_steps=num_steps)

    def warn(self, text: str) -> None:
        """Note a warning about the training."""
        with self._lock:
            warnings = self._state.setdefault("warnings", [])
            if len(warnings) < _MAX_WARNINGS:
                warnings.append(text[:_MAX_TEXT_CHARS])
            self._is_changed = True

    def complete(self, result: dict[str, Any]) -> None:
        """Note the contents of ``result.json``."""
        published = result.get("published") or {}
        self._change(
            status="completed",
            finished_at=int(time.time()),
            base_model=result["base_model"],
            step=result["steps"],
            best_step=result["best_step"],
            scores=result["scores"],
            version=published.get("version"),
            alias=published.get("alias"),
            golden_check=published.get("golden_check"),
        )

    def fail(self, status: str, error: str | None, golden_check: dict[str, Any] | None = None) -> None:
        """Note that a training has failed or was interrupted; no effect if it never began."""
        if self._thread is None:
            return
        found = {"error": error and error[:_MAX_TEXT_CHARS], "golden_check": golden_check}
        self._change(status=status, finished_at=int(time.time()), **found)

    def close(self) -> None:
        """Send what is left, for a limited time; the rest stays in the run directory."""
        if self._thread is None:
            return
        self._is_closing = True
        self._wakes.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() or (self._is_changed and self._refusal is None):
            self._say(
                "the server has not received the whole report of this training; the same command with --resume "
                "sends the rest"
            )

    # The thread

    def _change(self, **fields: Any) -> None:
        with self._lock:
            if self._thread is None:
                self._begin()
            self._state |= fields
            self._is_changed = True

    def _begin(self) -> None:
        """Choose the id, or go on with that of the run directory, and start the thread."""
        settings = self._settings
        spooled = self._directory.read(_FILE) if settings.resume else None
        spooled = spooled if isinstance(spooled, dict) else {}
        self._id = str(spooled.get("id") or f"run-{secrets.token_hex(16)}")
        model = Path(settings.model)
        self._state = {
            "prompt_id": settings.name,
            "method": str(settings.method),
            "base_model": settings.base_name or (model.name if model.is_dir() else settings.model),
            "status": "running",
            "settings": public_settings(settings.to_json()),
            "started_at": int(spooled.get("started_at") or time.time()),
        } | self._state
        self._directory.write(_FILE, {"id": self._id, "started_at": self._state["started_at"]})
        self._thread = threading.Thread(target=self._work, name="run report", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        pause = INTERVAL_SECONDS
        while True:
            is_last = self._is_closing
            try:
                self._send()
                pause = INTERVAL_SECONDS
                self._is_away = False
            except ClientError as error:
                if error.status is not None and error.status not in _RETRIED:
                    self._refusal = error
                    self._say(f"this training is not reported: {error}")
                    return
                if not self._is_away:
                    self._is_away = True
                    self._say(f"the report of this training waits: {error}")
                pause = min(2 * pause, _MAX_PAUSE_SECONDS)
            except Exception as error:  # a training does not fail because of its report
                self._refusal = ClientError(str(error) or type(error).__name__)
                self._say(f"this training is not reported: {self._refusal}")
                return
            if is_last:
                return
            self._wakes.wait(pause)

    def _send(self) -> None:
        """Send the state if it has changed, and new metrics."""
        with self._lock:
            state = {key: value for key, value in self._state.items() if value is not None}
            is_due = self._is_changed or time.monotonic() - self._sent_at > HEARTBEAT_SECONDS
            self._is_changed = False
        path = f"/v1/runs/{self._id}"
        try:
            if is_due:
                self._client.call("PUT", path, json=state)
                self._sent_at = time.monotonic()
            while points := self._new_points():
                self._client.send("POST", f"{path}/metrics", json=points)
                self._drops = False
        except ClientError:
            with self._lock:
                self._is_changed = True
            self._inode = None  # the metrics are read and sent from the beginning; known ones change nothing
            raise

    def _new_points(self) -> dict[str, Any] | None:
        """The metrics after those that were read; None if there are none."""
        try:
            with self._directory.metrics.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # a new file: the training resumes from an earlier step
                    self._inode, self._position, self._drops = inode, 0, True
                file.seek(self._position)
                lines: list[bytes] = []
                while len(lines) < _MAX_POINTS and (line := file.readline()).endswith(b"\n"):
                    lines.append(line)
                self._position += sum(map(len, lines))
        except FileNotFoundError:
            return None
        data = [point for point in map(_point, lines) if point is not None]
        if not data:
            return None
        return {"data": data} | ({"after_step": -1} if self._drops else {})


def _point(line: bytes) -> dict[str, Any] | None:
    """A line of ``metrics.jsonl`` as a point, without numbers that are not finite; None if nothing is left."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    values = {
        key: value
        for key, value in entry.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
    return {"step": entry["step"], "values": dict(list(values.items())[:_MAX_NUMBERS])} if values else None


@contextmanager
def reporting(
    url: str | None, api_key: str | None, settings: TrainSettings, say: Callable[[str], None]
) -> Iterator[RunReport | None]:
    """A report for the duration of a training, which also tells how the training ends; None without a URL.

    Args:
        url: URL of the server; None for no report.
        api_key: API key, if the server needs one.
        settings: The settings of the training.
        say: Called with a line for people.

    Raises:
        ClientError: If the URL or the key is malformed.
    """
    if url is None:
        yield None
        return
    with PreludeClient(url, api_key=api_key) as client:
        report = RunReport(client, settings, say)
        try:
            yield report
        except KeyboardInterrupt:
            report.fail("interrupted", None)
            raise
        except BaseException as error:
            check = RunDirectory(settings.run_dir).read("golden_check.json")
            is_check = isinstance(error, GoldenCheckError)
            report.fail("failed", str(error) or type(error).__name__, check if is_check else None)
            raise
        finally:
            report.close()
