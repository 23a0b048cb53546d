"""The documents leave nothing out, and can be read: routes, scopes, variables, links, tables."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from scripts.build_docs import openapi_document
from server.api.keys.callers import Scope
from tests.test_docs import DOCUMENTS, ROOT

MAX_CELL = 200
"""Characters of a cell that are read as sentences; names in code and the targets of links do not count."""


@cache
def text_of(path: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", text_of(path), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_anchor_exists(document: Path) -> None:
    for file, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", text_of(document)):
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), f"{document.name} links to {file}"
        assert anchor in anchors(target), f"{document.name} links to {file}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_cell_of_a_table_is_too_long(document: Path) -> None:
    rows = [line for line in text_of(document).splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    long = [cell for cell in cells if len(re.sub(r"`[^`]*`|\]\([^)]*\)", "", cell).strip()) > MAX_CELL]
    assert long == []


def test_every_route_is_in_a_document() -> None:
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    paths = openapi_document()["paths"]
    assert len(paths) > 30
    for path in paths:
        words = re.escape(re.sub(r"\{\w+\}", "NAME", path)).replace("NAME", r"[^/\s`\"?]+")
        assert re.search(rf"{words}(?![\w/])", text), f"no document names {path}"


def test_every_scope_is_in_the_table_of_security() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    named = {
        name for row in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)
    }
    assert {scope.value for scope in Scope} <= named


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
