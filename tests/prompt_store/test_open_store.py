"""Locations that cannot be a prompt store: one line for the operator, no traceback, and nothing is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prompt_store.errors import PromptStoreError
from prompt_store.open_store import open_store


def refused(location: Path | str, **options: Any) -> str:
    with pytest.raises(PromptStoreError) as caught:
        open_store(location, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "File exists" in refused(tmp_path / "file")
    assert "Not a directory" in refused(tmp_path / "file" / "store")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["catalog.sqlite3", "catalog.sqlite3.lock", "staging.lock"])
def test_a_directory_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert name in refused(tmp_path)


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "staging").write_text("x")
    assert "staging: File exists" in refused(tmp_path)
    assert (tmp_path / "staging").read_text() == "x"


def test_a_file_that_is_not_a_catalog(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite3").write_text("this is a text, and no database of SQLite's")
    assert "file is not a database" in refused(tmp_path)
    assert (tmp_path / "catalog.sqlite3").read_text().startswith("this is a text")


def test_a_catalog_whose_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    text = refused(tmp_path / "store", catalog_url=f"sqlite:///{tmp_path}/file/x.sqlite3")
    assert f"{tmp_path}/file" in text


@pytest.mark.parametrize("url", ["nonsense", "", "sqlite://", "postgresql://host:port/x", "://", "mysql://host/x"])
def test_an_invalid_catalog_url(tmp_path: Path, url: str) -> None:
    assert "catalog" in refused(tmp_path / "store", catalog_url=url or " ")


def test_a_rejected_location_can_be_opened_once_it_is_repaired(tmp_path: Path) -> None:
    (tmp_path / "staging").write_text("x")
    refused(tmp_path)
    (tmp_path / "staging").unlink()
    open_store(tmp_path).close()  # no lock was left behind
