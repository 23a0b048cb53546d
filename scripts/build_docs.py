"""Build the documentation site, offline, with every warning an error: ``make docs``.

The pages are those of ``docs/`` and ``benchmarks/``, which are readable alone, a reference of the HTTP API, generated
from the OpenAPI document, and one of the commands, generated from the command line.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from prompt_store.open_store import open_store
from scripts.command_reference import command_page
from server.app import create_app
from server.config import EngineSettings, HttpSettings, Settings, StoreSettings
from server.demo.tour import MODEL_DIRECTORY

ROOT = Path(__file__).parent.parent


def stage(target: Path) -> None:
    """Copy all pages into one folder, with links that stay inside it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target)
    for page in target.glob("*.md"):
        page.write_text(_inside(page.read_text(), "benchmarks/"))
    (target / "benchmarks").mkdir()
    for path in (ROOT / "benchmarks").iterdir():
        if path.suffix in {".md", ".png"}:
            shutil.copyfile(path, target / "benchmarks" / path.name)
    for page in (target / "benchmarks").glob("*.md"):
        page.write_text(_inside(page.read_text(), ""))
    (target / "reference").mkdir()
    (target / "reference" / "api.md").write_text(api_page(openapi_document()))
    (target / "reference" / "commands.md").write_text(command_page())


def openapi_document() -> dict[str, Any]:
    """The OpenAPI document; no server is started for it."""
    with tempfile.TemporaryDirectory() as folder, closing(open_store(folder)) as opened:
        settings = Settings(
            engine=EngineSettings(model=str(MODEL_DIRECTORY)),
            store=StoreSettings(location=folder),
            http=HttpSettings(),
        )
        return create_app(settings, store=opened).openapi()


def _inside(text: str, benchmarks: str) -> str:
    """Rewrite links to the other folder of pages; links to code become text."""
    text = text.replace("](../benchmarks/", f"]({benchmarks}").replace("](../docs/", "](../")
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:server|scripts|tests|docker|prompt_store)/[^)]*\)", r"\1", text)


def api_page(document: Mapping[str, Any]) -> str:
    """The reference of all routes.

    Args:
        document: The OpenAPI document.
    """
    lines = ["# HTTP API", "", "Generated from the OpenAPI document, which a server has at `/openapi.json`.", ""]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            lines += [f"## {method.upper()} {path}", "", operation.get("summary", ""), ""]
            if operation.get("description"):
                lines += [operation["description"], ""]
            lines += _fields("parameters", [_parameter(one) for one in operation.get("parameters", [])])
            lines += _fields("body", _body_rows(document, operation.get("requestBody", {})))
            codes = ", ".join(sorted(operation.get("responses", {})))
            lines += [f"Responses: {codes}.", ""]
    return "\n".join(lines)


def _parameter(parameter: Mapping[str, Any]) -> tuple[str, str, str]:
    kind = f"{parameter['in']}, {_type(parameter.get('schema', {}))}"
    return parameter["name"], kind, parameter.get("description", "")


def _body_rows(document: Mapping[str, Any], body: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for content in body.get("content", {}).values():
        schema = _resolved(document, content.get("schema", {}))
        required = schema.get("required", [])
        for name, field in schema.get("properties", {}).items():
            kind = _type(field) + (", required" if name in required else "")
            rows.append((name, kind, field.get("description", "")))
    return rows


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(map(_type, schema[key])))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    return f"list of {_type(schema.get('items', {}))}" if kind == "array" else str(kind)


def _fields(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    if not rows:
        return []
    cells = [f"| `{name}` | {kind.replace('|', '/')} | {_cell(text)} |" for name, kind, text in rows]
    return [f"| {title} | type | meaning |", "| --- | --- | --- |", *cells, ""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Build the site."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs")
    out = parser.parse_args().out
    stage(out / "source")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", out / "source", out / "html"]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
