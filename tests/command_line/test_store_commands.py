"""``prelude store`` on a store in a directory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prompt_store.open_store import open_store
from prompt_store.store import PromptStore
from prompt_store.types import BaseModelSpec
from server.cli import app
from tests.support.api_fixtures import PeftDirectory
from tests.support.fake_engine import WIDTH

BASE = BaseModelSpec("tiny", WIDTH, 2, 2, 8, 256, "float32")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["store", *map(str, arguments)])


@pytest.fixture
def store(tmp_path: Path, peft_directory: PeftDirectory) -> Iterator[PromptStore]:
    """A store in use, with two versions of one name."""
    opened = open_store(tmp_path / "store")
    for seed in (0, 1):
        with opened.upload() as upload:
            for path in peft_directory("p", seed=seed).iterdir():
                with upload.open(path.name) as file:
                    file.write(path.read_bytes())
            opened.publish(upload, name="p", base=BASE)
    yield opened
    opened.close()


def test_backup_verify_and_restore(store: PromptStore, tmp_path: Path) -> None:
    first = run("backup", tmp_path / "b.tar", "--store", tmp_path / "store")
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith(f"2 versions of 1 soft prompts are in {tmp_path / 'b.tar'}: 3 files, ")
    assert first.stdout.endswith("3 were copied now\n")
    assert json.loads(run("backup", tmp_path / "b", "--store", tmp_path / "store", "--json").stdout)["copied"] == 3
    restored = run("restore", tmp_path / "b.tar", "--store", tmp_path / "new")
    assert restored.stdout == f"2 versions of 1 soft prompts are in {tmp_path / 'new'}\n"
    assert json.loads(run("restore", tmp_path / "b", "--store", tmp_path / "2", "--json").stdout)["versions"] == 2
    for folder in ("store", "new", "b"):
        verified = run("verify", "--store", tmp_path / folder)
        assert (verified.exit_code, verified.stderr) == (0, "")
        assert re.match(r"schema \d{4}: 2 versions, 3 files, ", verified.stdout)
    again = run("restore", tmp_path / "b.tar", "--store", tmp_path / "new")
    assert again.exit_code == 5
    assert "is not empty" in again.stderr


def test_faults_have_lines_and_a_status(store: PromptStore, tmp_path: Path) -> None:
    blob = max((tmp_path / "store").glob("blobs/*/*"), key=lambda path: path.stat().st_size)
    blob.unlink()
    (tmp_path / "store" / "blobs" / "ab").mkdir(exist_ok=True)
    (tmp_path / "store" / "blobs" / "ab" / ("ab" * 32)).touch()
    verified = run("verify", "--store", tmp_path / "store")
    assert verified.exit_code == 1
    missing, orphan = verified.stderr.splitlines()
    assert missing.startswith("prelude: a file of p@")
    assert "is missing from" in missing
    assert orphan == f"prelude: blob {'ab' * 32} is unknown to the catalog"
    assert json.loads(run("verify", "--store", tmp_path / "store", "--json").stdout)["orphans"] == ["ab" * 32]
    backed = run("backup", tmp_path / "b", "--store", tmp_path / "store")
    assert (backed.exit_code, backed.stderr.count("\n")) == (1, 1)
    assert "2 were copied" in backed.stdout
    restored = run("restore", tmp_path / "b", "--store", tmp_path / "new")
    assert restored.exit_code == 1
    assert "cannot be restored" in restored.stderr


def test_errors_are_one_line(tmp_path: Path) -> None:
    for command, status in (
        (["verify", "--store", tmp_path / "none"], 1),
        (["verify", "--store", tmp_path, "--catalog", "postgresql://nobody@127.0.0.1:1/none"], 7),
        (["verify", "--store", "s3://bucket"], 1),
        (["backup", tmp_path / "b.tar", "--store", tmp_path / "none"], 1),
        (["restore", tmp_path / "none.tar"], 2),
    ):
        refused = run(*command)
        assert refused.exit_code == status, refused.output
        assert status == 2 or refused.stderr.count("\n") == 1
