"""An output survives a kill at any byte, and files of other runs are not changed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.client.bulk import journal as module
from server.client.bulk.journal import Journal, JournalError

IDENTITY = {"input": "d00d", "name": "a", "labels": ["x"]}


def row(number: int) -> tuple[bytes, dict[str, Any] | None]:
    fields: dict[str, Any] = {"id": number, "text": "ü\u2028", "response": {"label": "x"}}
    error = None
    if number % 3 == 2:
        error = {"message": "né\n", "code": "invalid_request", "line": number}
        fields = {"id": number, "error": error}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n", error


def write(path: Path, first: int, last: int, **options: Any) -> None:
    with Journal(path, IDENTITY, **options) as journal:
        if journal.is_new:
            journal.start({"model": "a@1"})
        journal.write([row(number) for number in range(first, last)])


@settings(deadline=None)
@given(count=st.integers(0, 8), data=st.data())
def test_an_output_cut_at_any_byte_can_be_resumed(
    tmp_path_factory: pytest.TempPathFactory, count: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "out.jsonl"
    write(path, 0, count)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    os.truncate(path, cut)
    with Journal(path, IDENTITY) as journal:
        num_rows = journal.written.num_rows
        assert num_rows == whole[:cut].count(b"\n")
        assert journal.written.num_errors == sum(number % 3 == 2 for number in range(num_rows))
        assert journal.notes == {"model": "a@1"}
        journal.write([row(number) for number in range(num_rows, count)])
        assert journal.written.num_rows == count
    assert path.read_bytes() == whole


def test_trailing_zeros_of_a_power_failure_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 0, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 100)
    with Journal(path, IDENTITY) as journal:
        assert journal.written.num_rows == 2
    assert path.read_bytes() == whole


def test_a_changed_output_cannot_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 0, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    changed = lines[0] + b'{"id": 1}\n' + lines[2]
    path.write_bytes(changed)
    with pytest.raises(JournalError, match=r"out.jsonl:2 is not a row that a run wrote"):
        Journal(path, IDENTITY)
    assert path.read_bytes() == changed


def test_the_output_of_another_run_needs_restart(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 0, 3)
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"with different settings \(input, labels\)"):
        Journal(path, IDENTITY | {"input": "beef", "labels": []})
    assert path.read_bytes() == before
    with Journal(path, IDENTITY | {"input": "beef"}, restart=True) as journal:
        assert journal.is_new
        assert journal.written.num_rows == 0
        assert path.read_bytes() == before  # the old output stays until the new run can start
        journal.start({"model": "a@1"})
    assert path.read_bytes() == b""


def test_a_full_disk_at_a_restart_leaves_the_old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 0, 3)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path, IDENTITY | {"input": "beef"}, restart=True) as journal, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(JournalError, match="No space left"):
            journal.start({"model": "a@1"})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with Journal(path, IDENTITY) as journal:
        assert journal.written.num_rows == 3


def test_a_file_of_another_program_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("mine")
    with pytest.raises(JournalError, match="already exists"):
        Journal(path, IDENTITY)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("state", ["", "{", "[]", '{"version": 2}', '{"version": 1, "notes": [], "identity": {}}'])
def test_an_unreadable_state_needs_restart(tmp_path: Path, state: str) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 0, 1)
    path.with_name("out.jsonl.state").write_text(state)
    with pytest.raises(JournalError, match="was written by another version of this command"):
        Journal(path, IDENTITY)
    write(path, 0, 2, restart=True)
    assert json.loads(path.with_name("out.jsonl.state").read_text())["identity"] == IDENTITY


def test_a_run_that_did_not_start_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    Journal(path, IDENTITY).close()
    assert not path.exists()
    path.touch()
    Journal(path, IDENTITY).close()  # created by another program
    assert path.exists()


def test_two_runs_cannot_share_an_output(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path, IDENTITY), pytest.raises(JournalError, match="being written by another run"):
        Journal(path, IDENTITY)


def test_an_unwritable_output_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="No such file"):
        Journal(tmp_path / "no" / "out.jsonl", IDENTITY)
    with Journal(tmp_path / "out.jsonl", IDENTITY) as journal:
        journal.state_path = tmp_path / "no" / "state"
        with pytest.raises(JournalError, match="No such file"):
            journal.start({"a": 1})


def test_a_failed_sync_is_an_error_and_the_run_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 0, 1)

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(JournalError, match="No space left"), Journal(path, IDENTITY) as journal:
        monkeypatch.setattr(os, "fsync", full)
        journal.write([row(1)])
        journal.sync()
    monkeypatch.undo()
    with Journal(path, IDENTITY) as journal:
        assert journal.written.num_rows == 2


def test_a_sync_is_due_after_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path / "out.jsonl", IDENTITY) as journal:
        monkeypatch.setattr(module, "_SYNC_SECONDS", -1.0)
        due = [journal.is_sync_due]
        journal.write([row(0)])
        due.append(journal.is_sync_due)
        journal.sync()
        assert [*due, journal.is_sync_due] == [False, True, False]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_reported_with_advice(tmp_path: Path) -> None:
    reason = r"No space left on device; run the same command to resume"
    with pytest.raises(JournalError, match=reason), Journal(tmp_path / "out.jsonl", IDENTITY) as journal:
        journal.start({"model": "a@1"})
        with Path("/dev/full").open("wb") as full:
            os.dup2(full.fileno(), journal._file.fileno())
        journal.write([row(0)])
