"""The directory of one training: everything that is needed to repeat it, to go on with it, and to publish it.

::

    settings.json    what was asked for, the data's digests, the libraries' versions
    metrics.jsonl    one object for each step and each evaluation
    curves.png       the same as a picture, where matplotlib is installed
    checkpoints/     what resuming needs; transformers' own, with the whole encoder
    adapter/         the two files that PEFT loads and the server takes
    golden.json      log-probabilities of a few texts by PEFT, which the server is held against
    result.json      scores and what became of it
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prompt_store.durable import write_file
from server.training.errors import RunDirectoryError
from server.training.settings import NOT_OF_THE_RESULT

LIBRARIES = ("accelerate", "peft", "safetensors", "tokenizers", "torch", "transformers")


def library_versions() -> dict[str, str]:
    """What it was trained with."""
    versions = {"python": platform.python_version()}
    for name in ("prelude-server", *LIBRARIES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


class RunDirectory:
    """The paths of a run, and what is written there.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"

    @contextmanager
    def opened(self, settings: dict[str, Any], *, resume: bool) -> Iterator[None]:
        """Take the directory for a run, for as long as the block lasts.

        Args:
            settings: What ``settings.json`` shall hold: ``settings``, ``digests`` and so on.
            resume: Whether it holds a run to go on with.

        Raises:
            RunDirectoryError: If another process is using it, if it is not empty, or if there is nothing to go on
                with, or another run.
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
                    (self.path / "settings.json").unlink()  # not a step was done: the same command may come again
                raise
        finally:
            os.close(lock)

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file."""
        write_file(self.path / name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def read(self, name: str) -> Any:
        """Read a JSON file; None where there is none, or not a whole one."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None

    def record(self, entry: dict[str, Any]) -> None:
        """Append to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The metrics so far; a last line that was cut off by a kill is left out."""
        entries = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    break
        return entries

    def cut_records(self, step: int) -> list[dict[str, Any]]:
        """Drop the metrics after a step, from which training goes on; returns those that are left."""
        kept = [entry for entry in self.records() if entry["step"] <= step]
        write_file(self.metrics, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        return kept

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole: transformers writes ``trainer_state.json`` last."""
        whole = {}
        for folder in self.checkpoints.glob("checkpoint-*"):
            try:
                whole[int(json.loads((folder / "trainer_state.json").read_text())["global_step"])] = folder
            except (OSError, ValueError, KeyError):
                continue
        return whole[max(whole)] if whole else None

    def _check_same(self, settings: dict[str, Any]) -> None:
        before = self.read("settings.json")
        if before is None:
            raise RunDirectoryError(f"{self.path} contains no run to resume")
        ours, theirs = settings["settings"] | settings["digests"], before["settings"] | before["digests"]
        changed = sorted(
            key for key in (ours | theirs).keys() - NOT_OF_THE_RESULT if ours.get(key) != theirs.get(key)
        )
        if changed:
            told = ", ".join(f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in changed[:3])
            raise RunDirectoryError(f"{self.path} contains a run with other settings: {told}")
