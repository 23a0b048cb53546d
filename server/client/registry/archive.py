"""A folder of exported soft prompts.

DIR/NAME/prompt.json         name, aliases and history
DIR/NAME/3/                  a PEFT directory: adapter_config.json and adapter_model.safetensors
DIR/NAME/3/version.json      everything else that the server knows about version 3; written last
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prompt_store.durable import replace_file
from prompt_store.types import NAME_PATTERN
from server.client.http import ClientError

PROMPT_FILE = "prompt.json"
VERSION_FILE = "version.json"


def exported_prompts(directory: Path) -> list[Path]:
    """The folders of the soft prompts in an export: the directory itself, or those in it.

    Raises:
        ClientError: If there is none, or the directory cannot be read.
    """
    try:
        if (directory / PROMPT_FILE).is_file():
            return [directory]
        found = sorted(path for path in directory.iterdir() if (path / PROMPT_FILE).is_file())
    except OSError as error:
        raise ClientError(f"{directory}: {error.strerror or error}") from error
    if not found:
        raise ClientError(
            f"{directory} was not written by prelude export: it has no {PROMPT_FILE}. To convert files of another "
            "program, give --out with the directory to write"
        )
    return found


def exported_versions(folder: Path) -> Iterator[tuple[int, Path]]:
    """The complete versions in the folder of a soft prompt, by number."""
    numbered = [(int(path.name), path) for path in folder.iterdir() if path.name.isascii() and path.name.isdigit()]
    for number, path in sorted(numbered):
        if (path / VERSION_FILE).is_file():
            yield number, path


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; ClientError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror or error}") from error


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object; ClientError if it cannot be read or is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ClientError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ClientError(f"{path} is not a JSON object")
    return value


def name_in(record: Mapping[str, Any], path: Path) -> str:
    """The name of the soft prompt in a record; ClientError if it is malformed."""
    name = record.get("id")
    if not isinstance(name, str) or NAME_PATTERN.fullmatch(name) is None:
        raise ClientError(f"{path} names no soft prompt")
    return name
