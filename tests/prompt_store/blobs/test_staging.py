"""Temporary files of uploads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prompt_store.blobs.staging import Staging
from prompt_store.errors import InvalidPromptError, PromptTooLargeError, StoreUnavailableError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    opened = Staging(tmp_path)
    yield opened
    opened.close()


def staged(path: Path) -> list[Path]:
    return [file for file in (path / "staging").glob("*/*") if file.name != "lock"]


def test_a_file_has_its_digest_and_size_once_closed(staging: Staging, tmp_path: Path) -> None:
    with staging.upload(100) as upload:
        with upload.open(CONFIG) as file:
            file.write(b"ab")
            file.write(b"c")
        assert upload.read(CONFIG) == upload.path(CONFIG).read_bytes() == b"abc"
        assert (file.stored.filename, file.stored.size) == (CONFIG, 3)
        assert file.stored.sha256 == hashlib.sha256(b"abc").hexdigest()
        assert staged(tmp_path) == [upload.path(CONFIG).parent]
    assert staged(tmp_path) == []


def test_a_file_that_is_not_closed_is_not_read_as_empty(staging: Staging) -> None:
    with staging.upload(100) as upload:
        file = upload.open(CONFIG)
        file.write(b"abc")
        for use in (lambda: upload.read(CONFIG), lambda: upload.path(CONFIG), lambda: file.stored):
            with pytest.raises(InvalidPromptError, match="adapter_config.json is incomplete") as caught:
                use()
            assert caught.value.faults[0].code == "incomplete_file"
        file.close()
        assert upload.read(CONFIG) == b"abc"


def test_a_file_after_a_failed_write_never_becomes_complete(staging: Staging) -> None:
    with staging.upload(100) as upload:
        with pytest.raises(RuntimeError), upload.open(CONFIG) as file:
            file.write(b"abc")
            raise RuntimeError
        file.close()
        with pytest.raises(InvalidPromptError, match="incomplete"):
            upload.path(CONFIG)


def test_missing_unexpected_and_duplicate_files_are_rejected(staging: Staging) -> None:
    with staging.upload(100) as upload:
        with pytest.raises(InvalidPromptError, match="adapter_config.json is missing"):
            upload.path(CONFIG)
        with pytest.raises(InvalidPromptError, match="nothing else"):
            upload.open("../x")
        upload.open(CONFIG)
        with pytest.raises(InvalidPromptError, match="sent twice"):
            upload.open(CONFIG)


def test_a_file_over_the_limit_is_rejected_for_good(staging: Staging) -> None:
    with staging.upload(3) as upload:
        file = upload.open(WEIGHTS)
        file.write(b"abc")
        with pytest.raises(PromptTooLargeError, match="larger than the 3 bytes"):
            file.write(b"d")
        file.close()
        with pytest.raises(InvalidPromptError, match="incomplete"):
            upload.read(WEIGHTS)


def test_a_failed_upload_leaves_nothing(staging: Staging, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staging.upload(100) as upload:
        upload.open(CONFIG).write(b"abc")
        raise RuntimeError
    assert staged(tmp_path) == []


def test_a_full_disk_is_reported_and_leaves_nothing(staging: Staging, tmp_path: Path) -> None:
    with (
        pytest.raises(StoreUnavailableError, match="No space left"),
        staging.upload(100) as upload,
        upload.open(CONFIG) as file,
        Path("/dev/full").open("wb") as full,
    ):
        file.write(b"abc")
        os.dup2(full.fileno(), file._file.fileno())  # the buffered bytes go there at the end
    assert not file.is_complete
    assert staged(tmp_path) == []


def test_processes_share_the_directory_and_clean_up_after_a_kill(staging: Staging, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from prompt_store.blobs.staging import Staging
staging = Staging(Path({str(tmp_path)!r}))
upload = staging.upload(100)
upload.open({CONFIG!r}).write(b"abc")
print("ready", flush=True)
input()
"""
    with staging.upload(100) as mine:
        with mine.open(CONFIG) as file:
            file.write(b"mine")
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            assert len(staged(tmp_path)) == 2
            Staging(tmp_path).close()  # both others are alive
            assert len(staged(tmp_path)) == 2
            other.kill()
        (tmp_path / "staging" / "without a lock" / "upload").mkdir(parents=True)
        (tmp_path / "staging" / "a file").touch()
        third = Staging(tmp_path)
        assert staged(tmp_path) == [mine.path(CONFIG).parent]
        third.close()
        assert mine.read(CONFIG) == b"mine"
