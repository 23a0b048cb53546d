"""The output file and what is known of the run that writes it: enough to go on after a kill, with every row once.

Rows are written in the order of the input, a line each. How far a run has come is therefore the number of whole lines
in its output and is kept nowhere else, so no two records of it can differ. Beside the output stands ``OUT.state``:
what the run was asked for, so that another input or other settings are not mixed into the same file.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from prompt_store.durable import write_file
from server.json_lines import MAX_LINE_BYTES

STATE_SUFFIX = ".state"
_STATE_VERSION = 1
_MAX_OUTPUT_LINE = 4 * MAX_LINE_BYTES
_SYNC_SECONDS = 10.0


class JournalError(Exception):
    """The output cannot be written or gone on with; the text is one line for people."""


@dataclass(slots=True)
class Progress:
    """What is in the output.

    Attributes:
        num_rows: Rows that are written.
        num_errors: Those of them that are errors.
        codes: The errors' codes.
    """

    num_rows: int = 0
    num_errors: int = 0
    codes: Counter[str] = field(default_factory=Counter)

    def count(self, error: Mapping[str, Any] | None) -> None:
        """One more row."""
        self.num_rows += 1
        if error is not None:
            self.num_errors += 1
            self.codes[str(error.get("code"))] += 1


class Journal:
    """An open output. Nobody else can open it as one meanwhile.

    Args:
        path: The output; made where there is none.
        identity: What makes a run the same run: the input's digest, the settings. Plain JSON.
        restart: Begin anew whatever is there; it is dropped by ``remember``.

    Attributes:
        progress: What is in it.
        notes: What the run remembers of itself, from its first start on; plain JSON.

    Raises:
        JournalError: If it belongs to another run, is no run's output, is in use, or cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.state_path = path.with_name(path.name + STATE_SUFFIX)
        self.progress = Progress()
        self.notes: dict[str, Any] = {}
        self._identity = json.loads(json.dumps(identity))
        self._is_dirty = False
        self._synced_at = time.monotonic()
        try:
            # Before it is known whether the file may be touched: opening it so changes nothing in it.
            self._is_made = not path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise JournalError(f"{path}: {error.strerror}") from error
        self._file: IO[bytes] = os.fdopen(descriptor, "r+b")
        try:
            self._take(restart=restart)
        except OSError as error:
            self._file.close()
            raise JournalError(f"{error.filename or path}: {error.strerror}") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_new(self) -> bool:
        """Whether no earlier start of this run is known."""
        return not self.notes

    def remember(self, notes: Mapping[str, Any]) -> None:
        """Begin: drop what is there, and keep what the run has to know to go on. On the disk before this returns.

        Raises:
            JournalError: If it cannot be written.
        """
        self.notes = dict(notes)
        state = {"version": _STATE_VERSION, "identity": self._identity, "notes": self.notes}
        try:
            # Not sooner: a new beginning that fails for another reason shall leave the old output as it is.
            self.state_path.unlink(missing_ok=True)
            self._file.truncate(0)
            write_file(self.state_path, json.dumps(state, indent=1).encode())
        except OSError as error:
            raise JournalError(f"{self.state_path}: {error.strerror}") from error

    def write(self, rows: Sequence[tuple[bytes, Mapping[str, Any] | None]]) -> None:
        """Append rows: each a line with its end, and its error or None. It outlives this process; see ``sync``.

        Raises:
            JournalError: If the disk does not take it; what it took of it is seen by the next start.
        """
        try:
            self._file.write(b"".join(line for line, _ in rows))
            self._file.flush()
        except OSError as failure:
            raise self._failed(failure) from failure
        self._is_dirty = True
        for _, error in rows:
            self.progress.count(error)

    @property
    def is_sync_due(self) -> bool:
        """Whether what was written has been only in the system's memory for a while."""
        return self._is_dirty and time.monotonic() - self._synced_at > _SYNC_SECONDS

    def sync(self) -> None:
        """Bring what was written onto the disk; may take a while, and may run in a thread.

        Raises:
            JournalError: If the disk does not take it.
        """
        self._is_dirty = False
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Write what is left and let go of it."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            self.sync()
        except OSError as error:
            raise self._failed(error) from error
        finally:
            # What could not be written is tried once more by close; its failure is told already.
            with suppress(OSError):
                self._file.close()
            if self._is_made and self.is_new:  # the run did not begin, so nothing is to be left of it
                self.path.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> JournalError:
        return JournalError(f"{self.path}: {error.strerror}; run the same command to resume")

    # Opening

    def _take(self, *, restart: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(f"{self.path} is being written by another run") from error
        if restart:
            return
        state = self._read_state()
        if state is None:
            if self._file.read(1):
                raise JournalError(
                    f"{self.path} exists already and is not the output of a run; give another path, or --restart"
                )
            return
        self._check(state["identity"])
        self.notes = state["notes"]
        self._recover()

    def _read_state(self) -> dict[str, Any] | None:
        try:
            text = self.state_path.read_text()
        except FileNotFoundError:
            return None
        try:
            state = json.loads(text)
            if state["version"] == _STATE_VERSION and isinstance(state["notes"], dict) and state["identity"]:
                return dict(state)
        except (ValueError, KeyError, TypeError):
            pass
        raise JournalError(
            f"{self.state_path} was written by another version of this command; use --restart to start over"
        )

    def _check(self, identity: Any) -> None:
        if identity == self._identity:
            return
        known = identity if isinstance(identity, dict) else {}
        names = sorted(known.keys() | self._identity.keys())
        different = [name for name in names if known.get(name) != self._identity.get(name)]
        raise JournalError(
            f"{self.path} was written by a run with different settings ({', '.join(different)}); "
            "give another path, or --restart to start over"
        )

    def _recover(self) -> None:
        """Count the rows that are there, and cut off what a kill has left of a last one."""
        end, number = 0, 0
        while line := self._file.readline(_MAX_OUTPUT_LINE):
            number += 1
            row = _read(line)
            if row is None:
                if self._file.read(1):
                    raise JournalError(
                        f"{self.path}:{number} is no row that a run wrote, and others follow: it was changed since; "
                        "give another path, or --restart to start over"
                    )
                break
            self.progress.count(row.get("error"))
            end += len(line)
        self._file.truncate(end)
        self._file.seek(end)


def _read(line: bytes) -> dict[str, Any] | None:
    """A whole row that a run wrote, or None."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and ("response" in row or "error" in row) else None
