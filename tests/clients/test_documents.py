"""Every example of docs/clients.md is run by a test."""

from __future__ import annotations

import json
import re

import pytest

from tests.clients.documents import sections
from tests.clients.running import FOLDER


@pytest.mark.parametrize("section", sections())
def test_every_client_of_the_document_has_a_test(section: str) -> None:
    call = re.compile(rf'\b(?:example|command)\("{re.escape(section)}"')
    assert any(call.search(path.read_text()) for path in FOLDER.glob("test_*.py"))


def test_lock_file_names_no_registry() -> None:
    packages = json.loads((FOLDER / "node" / "package-lock.json").read_text())["packages"]
    assert len(packages) > 1
    assert not any("resolved" in package for package in packages.values())
