"""The directory of one training: all that is needed to repeat it, to resume it and to publish its result.

::

    settings.json    settings, digests of the data, versions of the libraries
    metrics.jsonl    one object per step and per evaluation
    curves.png       the same as a plot, if matplotlib is installed
    checkpoints/     checkpoints of transformers' Trainer, with the whole encoder
    over/            the files of the adapter that the soft prompt is trained over, if there is one
    adapter/         the two files that PEFT loads and the server accepts, and prompt_format.json for prelude push
    search.json      the held-out loss of each rate that --search tried
    golden.json      PEFT's log-probabilities of a few texts, to compare the server with
    report.json      id of the run that is reported to a server
    report.json      id of the run that is reported to a server
    result.json      scores, and what was published
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prompt_store.durable import write_file
from server.training.errors import RunDirectoryError
from server.training.settings import CHANGEABLE_ON_RESUME

LIBRARIES = ("accelerate", "peft", "safetensors", "tokenizers", "torch", "transformers")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that training uses."""
    versions = {"python": platform.python_version()}
    for name in ("prelude-server", *LIBRARIES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


class RunDirectory:
    """The files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.over = path / "over"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"

    @contextmanager
    def locked(self, settings: dict[str, Any], *, resume: bool) -> Iterator[None]:
        """Create the directory and lock it for the duration of the block.

        Args:
            settings: Contents of ``settings.json``: ``settings``, ``digests`` and so on.
            resume: Whether to resume the run in the directory.

        Raises:
            RunDirectoryError: If another process uses the directory. To start: if it is not empty. To resume: if it
                holds no run, or one with other settings.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be written: {error.strerror or error}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunDirectoryError(f"{self.path} is in use by another process") from error
            if resume:
                self._check_same(settings)
            else:
                if any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                    raise RunDirectoryError(
                        f"{self.path} is not empty: choose another --run-dir, or use --resume to continue its run"
                    )
                self.write("settings.json", settings)
            try:
                yield
            except BaseException:
                if not resume and not self.metrics.exists():
                    # No step was done: the same command can start again.
                    (self.path / "settings.json").unlink()
                    shutil.rmtree(self.over, ignore_errors=True)
                raise
        finally:
            os.close(lock)

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file."""
        write_file(self.path / name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def read(self, name: str) -> Any:
        """Read a JSON file; None if it is missing or incomplete."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None

    def record(self, entry: dict[str, Any]) -> None:
        """Append to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The metrics so far, without an incomplete last line."""
        entries = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    break
        return entries

    def truncate_records(self, step: int) -> list[dict[str, Any]]:
        """Drop the metrics after the step that training resumes from; returns the remaining ones."""
        remaining = [entry for entry in self.records() if entry["step"] <= step]
        write_file(self.metrics, "".join(json.dumps(entry) + "\n" for entry in remaining).encode())
        return remaining

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        """The number of steps before a checkpoint."""
        return int(checkpoint.name.removeprefix("checkpoint-"))

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = self._complete_checkpoints()
        return complete[max(complete)] if complete else None

    def checkpoint_of(self, step: int | None) -> Path | None:
        """The complete checkpoint of a step, of the newest one for None; None if there is none."""
        return self.newest_checkpoint() if step is None else self._complete_checkpoints().get(step)

    def keep_checkpoints(self, best_step: int | None) -> None:
        """Delete all checkpoints but the newest one and that of the best step; without one, but the newest two."""
        steps = sorted(self._complete_checkpoints())
        kept = steps[-2:] if best_step is None else [*steps[-1:], best_step]
        for step, folder in self._complete_checkpoints().items():
            if step not in kept:
                shutil.rmtree(folder)

    def _complete_checkpoints(self) -> dict[int, Path]:
        """Complete checkpoints by step: transformers writes ``trainer_state.json`` last."""
        complete = {}
        for folder in self.checkpoints.glob("checkpoint-*"):
            try:
                complete[int(json.loads((folder / "trainer_state.json").read_text())["global_step"])] = folder
            except (OSError, ValueError, KeyError):
                continue
        return complete

    def _check_same(self, settings: dict[str, Any]) -> None:
        before = self.read("settings.json")
        if before is None:
            raise RunDirectoryError(f"{self.path} contains no run to resume")
        ours, theirs = settings["settings"] | settings["digests"], before["settings"] | before["digests"]
        changed = sorted(
            key for key in (ours | theirs).keys() - CHANGEABLE_ON_RESUME if ours.get(key) != theirs.get(key)
        )
        if changed:
            changes = ", ".join(f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in changed[:3])
            raise RunDirectoryError(f"{self.path} contains a run with other settings: {changes}")
