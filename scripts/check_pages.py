"""Check that an installation has the whole console: run it with the installation's Python, away from this checkout.

    cd / && env PATH=/nowhere .../bin/python -I .../scripts/check_pages.py

Neither Node nor a network is used. The page, and every file that the page names, must be answered in every content
coding, with the bytes that they have without one.
"""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

from starlette.datastructures import Headers

from server.console.pages import DIRECTORY, INDEX, Pages
from server.errors import NotFoundError

_NAMED = re.compile(r'(?:src|href)="/console/([^"]+)"')
_LEAST = {".js", ".css", ".svg"}
"""Suffixes that the page has to name."""


def faults_of_pages(directory: Path = DIRECTORY) -> list[str]:
    """What is missing in a folder of built files, or is answered wrongly."""
    pages = Pages(directory)
    try:
        page = bytes(pages.answer("prompts/sentiment", Headers()).body).decode()
    except (KeyError, NotFoundError):
        return [f"{directory} has no {INDEX}"]
    names = _NAMED.findall(page)
    faults = [f"the page names no file {suffix}" for suffix in sorted(_LEAST - {Path(name).suffix for name in names})]
    for name in (INDEX, *names):
        try:
            whole = bytes(pages.answer(name, Headers({"accept-encoding": "identity"})).body)
        except NotFoundError:
            faults.append(f"{name} is missing")
            continue
        for coding in ("gzip", "br"):
            answer = pages.answer(name, Headers({"accept-encoding": coding}))
            if answer.headers.get("content-encoding") != coding:
                faults.append(f"{name} is not there in the coding {coding}")
            elif coding == "gzip" and gzip.decompress(bytes(answer.body)) != whole:
                faults.append(f"{name} has other bytes in the coding {coding}")
    return faults


if __name__ == "__main__":
    found = faults_of_pages()
    print("\n".join(found) or f"the console is whole in {DIRECTORY}")
    sys.exit(bool(found))
