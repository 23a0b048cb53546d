"""Durable writes: a fault leaves the old file and no temporary one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from prompt_store import durable


def disk_full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def write(path: Path, data: bytes) -> None:
    durable.write_file(path, data)


def move(path: Path, data: bytes) -> None:
    source = path.with_name("source")
    source.write_bytes(data)
    durable.move_file(source, path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


@pytest.mark.parametrize("put", [write, move])
def test_a_file_is_replaced_and_nothing_else_is_left(path: Path, put: Callable[[Path, bytes], None]) -> None:
    put(path, b"new")

    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("put", [write, move])
def test_the_bytes_are_synced_before_the_rename_and_the_folder_after_it(
    path: Path, put: Callable[[Path, bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    rename = Path.replace

    def record_sync(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        calls.append("sync of the folder" if place == path.parent else f"sync of {place.read_bytes().decode()}")

    def record_rename(source: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_rename)
    put(path, b"new")

    assert calls == ["sync of new", "rename", "sync of the folder"]


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
def test_a_failing_sync_or_rename_leaves_the_old_file(
    path: Path, owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, disk_full)
        with pytest.raises(OSError, match="No space left"):
            durable.write_file(path, b"new")

    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), durable.replace_file(path) as file:
        file.write(b"n")
        with Path("/dev/full").open("wb") as full:
            os.dup2(full.fileno(), file.fileno())  # the buffered byte goes there when the file is closed

    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_failing_block_leaves_the_old_file(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), durable.replace_file(path) as file:
        file.write(b"new")
        raise ZeroDivisionError

    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
def test_a_failing_move_leaves_the_source(
    path: Path, owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, disk_full)
        with pytest.raises(OSError, match="No space left"):
            move(path, b"new")

    assert path.read_bytes() == b"old"
    assert path.with_name("source").read_bytes() == b"new"


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.write_file(tmp_path / "none" / "file", b"new")
