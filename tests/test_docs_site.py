"""The documentation site builds without a warning, and the error reference is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from prompt_store.files import validation
from server.api.errors import _HTTP_CODES, _TABLE
from tests.test_docs import ROOT

ERRORS = (ROOT / "docs" / "errors.md").read_text()


def test_every_error_code_is_explained_with_its_status() -> None:
    rows = set(re.findall(r"^\| (\d{3}) \| `(\w+)` \|", ERRORS, re.MULTILINE))
    codes = {(str(row.status), row.code) for row in _TABLE.values()} | {
        (str(status), code) for status, code in _HTTP_CODES.items()
    }
    codes.add(("503", "too_many_connections"))
    assert rows == codes


def test_every_fault_of_a_file_is_explained() -> None:
    listed = set(re.findall(r"^``(\w+)``", validation.__doc__ or "", re.MULTILINE))
    assert len(listed) > 20
    rows = set(re.findall(r"^\| `(\w+)` \|", ERRORS, re.MULTILINE))
    assert listed <= rows


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "scripts.build_docs", "--out", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    html = tmp_path / "html"
    pages = sorted(html.rglob("*.html"))
    assert {"index.html", "errors.html", "api.html"} <= {page.name for page in pages}
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(\w+:)?//[^\"]*\"", page.read_text())
        assert loaded == [], page
    index = (html / "llms.txt").read_text()
    for name in re.findall(r"\]\(([^)]+\.md)\)", index):
        assert (html / name).is_file()
    assert "(quickstart.md)" in index
    assert "## prelude serve" in (html / "reference" / "commands.md").read_text()
    assert "## POST /v1/completions" in (html / "reference" / "api.md").read_text()
