"""The check of an installation's console."""

from __future__ import annotations

import shutil
from pathlib import Path

from scripts.check_pages import faults_of_pages
from server.console.pages import DIRECTORY


def test_the_built_files_are_whole() -> None:
    assert faults_of_pages() == []


def test_what_is_missing_or_differs_is_named(tmp_path: Path) -> None:
    copied = tmp_path / "static"
    shutil.copytree(DIRECTORY, copied)
    (script,) = copied.glob("assets/*.js")
    (style,) = copied.glob("assets/*.css")
    script.unlink()
    style.write_text("body {}")
    (copied / "index.html.br").unlink()
    assert set(faults_of_pages(copied)) == {
        "index.html is not there in the coding br",
        f"assets/{script.name} is missing",
        f"assets/{style.name} has other bytes in the coding gzip",
    }


def test_a_folder_without_a_page_is_named(tmp_path: Path) -> None:
    assert faults_of_pages(tmp_path) == [f"{tmp_path} has no index.html"]
