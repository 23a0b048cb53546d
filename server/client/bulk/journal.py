"""The output file of a run and its state, from which the run can be resumed without losing or repeating a row.

Rows are written in the order of the input, one per line, so the number of complete lines in the output is the
progress of the run; it is stored nowhere else. ``OUT.state`` stores the input's digest and the settings of the run,
so that another input or other settings are not mixed into the same file.
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

from prompt_store.durable import replace_file
from server.json_lines import MAX_LINE_BYTES

STATE_SUFFIX = ".state"
_STATE_VERSION = 1
_MAX_OUTPUT_LINE = 4 * MAX_LINE_BYTES
_SYNC_SECONDS = 10.0


class JournalError(Exception):
    """The output cannot be written or resumed; the message is one line."""


@dataclass(slots=True)
class WrittenRows:
    """The contents of the output.

    Attributes:
        num_rows: Written rows.
        num_errors: Written rows with an error.
        codes: Number of errors by code.
    """

    num_rows: int = 0
    num_errors: int = 0
    codes: Counter[str] = field(default_factory=Counter)

    def count(self, error: Mapping[str, Any] | None) -> None:
        """Count a row."""
        self.num_rows += 1
        if error is not None:
            self.num_errors += 1
            self.codes[str(error.get("code"))] += 1


class Journal:
    """The output of a run, opened exclusively.

    Args:
        path: The output; created if missing.
        identity: What identifies the run: the input's digest and the settings. Plain JSON.
        restart: Ignore the existing output; ``start`` discards it.

    Attributes:
        written: The contents of the output.
        notes: What ``start`` stored at the first start; plain JSON, empty for a new run.

    Raises:
        JournalError: If the file belongs to another run, was not written by a run, is in use, or cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.state_path = path.with_name(path.name + STATE_SUFFIX)
        self.written = WrittenRows()
        self.notes: dict[str, Any] = {}
        self._identity = json.loads(json.dumps(identity))
        self._is_dirty = False
        self._synced_at = time.monotonic()
        try:
            # The file may belong to something else: open it without changing it.
            self._is_made = not path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise JournalError(f"{path}: {error.strerror}") from error
        self._file: IO[bytes] = os.fdopen(descriptor, "r+b")
        try:
            self._lock_and_load(restart=restart)
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
        """Whether the run starts from the beginning."""
        return not self.notes

    def start(self, notes: Mapping[str, Any]) -> None:
        """Start a new run: discard the existing output, and store what a resumed run needs. Synced to disk on return.

        Raises:
            JournalError: If the state cannot be written.
        """
        self.notes = dict(notes)
        state = {"version": _STATE_VERSION, "identity": self._identity, "notes": self.notes}
        try:
            with replace_file(self.state_path) as file:
                file.write(json.dumps(state, indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
                # Only now: a restart that fails earlier, on a full disk say, must leave the old output as it is.
                self.state_path.unlink(missing_ok=True)
                self._file.truncate(0)
        except OSError as error:
            raise JournalError(f"{self.state_path}: {error.strerror}") from error

    def write(self, rows: Sequence[tuple[bytes, Mapping[str, Any] | None]]) -> None:
        """Append rows. They survive the end of this process, but a power failure only after ``sync``.

        Args:
            rows: For each row its line, including the line end, and its error or None.

        Raises:
            JournalError: If the rows cannot be written; the next start recovers those that were.
        """
        try:
            self._file.write(b"".join(line for line, _ in rows))
            self._file.flush()
        except OSError as failure:
            raise self._failed(failure) from failure
        self._is_dirty = True
        for _, error in rows:
            self.written.count(error)

    @property
    def is_sync_due(self) -> bool:
        """Whether written rows have not been synced for a while."""
        return self._is_dirty and time.monotonic() - self._synced_at > _SYNC_SECONDS

    def sync(self) -> None:
        """Sync written rows to disk. This can be slow; it may be called in a thread.

        Raises:
            JournalError: If the sync fails.
        """
        self._is_dirty = False
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Flush, sync and close the file."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            self.sync()
        except OSError as error:
            raise self._failed(error) from error
        finally:
            # close() flushes again; a failure was reported above.
            with suppress(OSError):
                self._file.close()
            if self._is_made and self.is_new:  # the run did not start: leave no empty file
                self.path.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> JournalError:
        return JournalError(f"{self.path}: {error.strerror}; run the same command to resume")

    # Opening

    def _lock_and_load(self, *, restart: bool) -> None:
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
                    f"{self.path} already exists and is not the output of a run; give another path, or use --restart"
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
            "give another path, or use --restart to start over"
        )

    def _recover(self) -> None:
        """Count the complete rows, and remove an incomplete last line."""
        end, number = 0, 0
        while line := self._file.readline(_MAX_OUTPUT_LINE):
            number += 1
            row = _parse_row(line)
            if row is None:
                if self._file.read(1):
                    raise JournalError(
                        f"{self.path}:{number} is not a row that a run wrote: the file was changed; "
                        "give another path, or use --restart to start over"
                    )
                break
            self.written.count(row.get("error"))
            end += len(line)
        self._file.truncate(end)
        self._file.seek(end)


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Parse a line that a run wrote; None if it is incomplete or something else."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and ("response" in row or "error" in row) else None
