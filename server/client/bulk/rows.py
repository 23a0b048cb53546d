"""Read the rows of a JSON Lines file. An invalid row is reported with its line, and the others are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.json_lines import JsonLine, count_lines, read_json_lines

RESERVED = frozenset({"response", "error"})
"""Fields that the output adds to a row."""

Form = Literal["prompt", "text", "messages"]
_FORMS: tuple[Form, ...] = ("prompt", "text", "messages")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input, valid or not.

    Attributes:
        index: Number of the row, from 0; blank lines are not counted.
        line: Number of the line in the file, from 1.
        fields: The row's JSON object; empty if the line contains none.
        form: The field with the text or the conversation.
        fault: Why the row is invalid; None if it is valid.
        num_bytes: Length of the line.
        source: The line without surrounding white space; empty if it contains no object, or the row is not from a
            file.
    """

    index: int
    line: int
    fields: dict[str, Any]
    form: Form = "prompt"
    fault: str | None = None
    num_bytes: int = 0
    source: bytes = b""

    @property
    def content(self) -> Any:
        """The text, or the list of messages."""
        return self.fields[self.form]


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Identifies an input file.

    Attributes:
        sha256: Hex digest of the file.
        num_rows: Number of lines that are not blank.
    """

    sha256: str
    num_rows: int


def identify(path: Path) -> FileIdentity:
    """Read a file for its digest and its number of rows, in a fixed amount of memory.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileIdentity(digest, count_lines(path))


def read_rows(path: Path, *, skip: int = 0) -> Iterator[Row]:
    """Read the rows of a file one by one.

    Args:
        path: JSON Lines in UTF-8; see ``read_json_lines``.
        skip: Number of rows at the beginning to pass over without parsing them.

    Raises:
        OSError: If it cannot be read.
    """
    for index, line in enumerate(read_json_lines(path, skip=skip), start=skip):
        yield _row(index, line)


def _row(index: int, line: JsonLine) -> Row:
    form: Form = "prompt"
    fault = line.fault
    if fault is None:
        try:
            form = _check(line.fields)
        except ValueError as error:
            fault = str(error)
    return Row(index, line.number, line.fields, form, fault, line.num_bytes, line.source)


def _check(fields: dict[str, Any]) -> Form:
    """Check a row and return its form. The server checks the rest."""
    for name in RESERVED & fields.keys():
        raise ValueError(f"the field {name!r} is reserved for the output; rename it")
    forms = [name for name in _FORMS if name in fields]
    if len(forms) != 1:
        found = " and ".join(forms) if forms else "none of them"
        raise ValueError(f"a row must have exactly one of prompt, text and messages; this row has {found}")
    form, content = forms[0], fields[forms[0]]
    if form == "messages":
        if not isinstance(content, list) or not content or not all(isinstance(item, dict) for item in content):
            raise ValueError("messages: should be a list of objects, at least one")
    elif not isinstance(content, str) or not content:
        raise ValueError(f"{form}: should be a string, and not empty")
    for name in ("model", "prompt_id", "adapter_id"):
        if fields.get(name) is not None and (not isinstance(fields[name], str) or not fields[name]):
            what = "an adapter" if name == "adapter_id" else "a soft prompt"
            raise ValueError(f"{name}: should be a string that names {what}")
    if fields.get("model") is not None and fields.get("prompt_id") is not None:
        raise ValueError("prompt_id: model already names a soft prompt")
    task_id = fields.get("task_id")
    if task_id is not None and (type(task_id) is not int or task_id < 0):
        raise ValueError("task_id: should be an integer from 0")
    return form
