"""The examples of docs/clients.md, which the tests run unchanged."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_TEXT = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()

DOCUMENTED_URL = "http://127.0.0.1:8000"
"""The server's address in the document: the only text in an example that a test replaces."""


def sections() -> list[str]:
    """The headings, each of which is a client."""
    return re.findall(r"^## (.+)$", _TEXT, re.MULTILINE)


def example(section: str, language: str, url: str) -> str:
    """The only block in a language under a heading, for a server at ``url``."""
    body = re.split(r"^## .+$", _TEXT.split(f"\n## {section}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", body, re.DOTALL)
    (block,) = blocks
    assert DOCUMENTED_URL in block
    return block.replace(DOCUMENTED_URL, url)


def expected_output(program: str) -> list[str]:
    """The output that the comments after a program's print statements give."""
    lines = re.findall(r"^\s*(?:print|console\.log)\(.*\);?\s*(?:#|//) (.*)$", program, re.MULTILINE)
    assert lines
    return lines


def command(section: str, url: str) -> list[str]:
    """The only shell command under a heading, as its arguments."""
    return shlex.split(example(section, "bash", url).replace("\\\n", " "))
