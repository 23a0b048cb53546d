"""Read the rows of a JSON Lines file. An invalid row is reported with its line and does not stop the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prompt_store.files.strict_json import finite_float, refuse_constant

MAX_LINE_BYTES = 8 * 1024 * 1024
"""As much as a server takes in one body by default."""

RESERVED = frozenset({"response", "error"})
"""Fields that the output adds to a row."""

Form = Literal["prompt", "text", "messages"]
_FORMS: tuple[Form, ...] = ("prompt", "text", "messages")
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row that can be sent, or what is wrong with it.

    Attributes:
        index: Which row it is, from 0; lines of nothing but white space are none.
        line: The line in the file, from 1.
        fields: The row's object as it stands in the file; empty where there is none.
        form: Which field holds what is to be answered.
        fault: Why it cannot be sent; None where it can.
        num_bytes: Length of its line.
        source: The line itself, without white space around it; empty where it holds no object, or comes from no file.
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
        """What is to be answered: a text, or a list of messages."""
        return self.fields[self.form]


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one input from another.

    Attributes:
        sha256: Hex digest of the file's bytes.
        num_rows: Its lines that are not blank.
    """

    sha256: str
    num_rows: int


def identify(path: Path) -> FileIdentity:
    """Read a file once for its digest and its number of rows, in a fixed amount of memory.

    Raises:
        OSError: If it cannot be read.
    """
    digest, num_rows, has_text = hashlib.sha256(), 0, False
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            first, *rest = chunk.split(b"\n")
            has_text = has_text or bool(first.strip())
            for piece in rest:
                num_rows += has_text
                has_text = bool(piece.strip())
    return FileIdentity(digest.hexdigest(), num_rows + has_text)


def read_rows(path: Path, *, skip: int = 0) -> Iterator[Row]:
    """The rows of a file, lazily.

    Args:
        path: JSON Lines in UTF-8; a byte-order mark at the beginning is taken off.
        skip: Rows at the beginning that are not wanted; they are not looked into.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        number, index = 0, 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            is_long = len(line) > MAX_LINE_BYTES
            blank = not line.strip()
            rest = line
            while is_long and rest and not rest.endswith(b"\n"):
                rest = file.readline(_CHUNK_BYTES)
                blank = blank and not rest.strip()
            if blank:
                continue
            if index >= skip:
                if is_long:
                    yield Row(index, number, {}, fault=f"the line has more than {MAX_LINE_BYTES} bytes")
                else:
                    yield _row(index, number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            index += 1


def _row(index: int, number: int, line: bytes) -> Row:
    try:
        fields = parse_object(line)
    except ValueError as error:
        return Row(index, number, {}, fault=str(error), num_bytes=len(line))
    source = line.strip()
    try:
        form = _check(fields)
    except ValueError as error:
        return Row(index, number, fields, fault=str(error), num_bytes=len(line), source=source)
    return Row(index, number, fields, form, num_bytes=len(line), source=source)


def parse_object(line: bytes) -> dict[str, Any]:
    """A line as a JSON object.

    Raises:
        ValueError: If it is not UTF-8, not JSON, not an object, names a field twice, or holds half of a surrogate
            pair, which no UTF-8 can carry on.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} of the line") from error
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("contains half of a surrogate pair") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice[:64]!r} appears twice")
    return fields


# One for all lines: ``json.loads`` would make one for each.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=refuse_constant, parse_float=finite_float)


def _check(fields: dict[str, Any]) -> Form:
    """Which form a row has. What only the server can know, it is left to say."""
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
    for name in ("model", "prompt_id"):
        if fields.get(name) is not None and (not isinstance(fields[name], str) or not fields[name]):
            raise ValueError(f"{name}: should be a string that names a soft prompt")
    if fields.get("model") is not None and fields.get("prompt_id") is not None:
        raise ValueError("prompt_id: model already names a soft prompt")
    task_id = fields.get("task_id")
    if task_id is not None and (type(task_id) is not int or task_id < 0):
        raise ValueError("task_id: should be an integer from 0")
    return form
