r"""Labelled examples in JSON Lines, CSV, TSV, Parquet or a saved dataset, for training and evaluation.

A row has one of three formats, and all rows of a file have the same::

    {"prompt": "Translate to French: cheese\n", "completion": "fromage"}
    {"text": "The soup was cold.", "label": "negative"}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}

All rows may also have a ``task_id``, the task of a multitask soft prompt, from 0.

All faults of a file are reported together. This module imports no model library, so that invalid data is reported
before one is loaded.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from server.csv_rows import DELIMITERS, read_csv_rows
from server.errors import ServerError
from server.json_lines import JsonLine, json_lines_in, kind_of, read_json_lines
from server.table_rows import TableError, data_files, is_table, read_table_rows

MAX_FAULTS = 20
"""Maximum number of reported faults per file; the others are counted."""

Role = Literal["system", "user", "assistant"]

_ROLES: tuple[str, ...] = get_args(Role)
_FORMS = "{prompt, completion}, {text, label} or {messages}"


class DatasetError(ServerError):
    """A file of examples cannot be used.

    Attributes:
        path: The file.
        faults: (line number from 1, reason) of the first faults, in order; line number 0 refers to the whole file.
        num_faults: Number of all faults.
    """

    def __init__(self, path: Path, faults: list[tuple[int, str]], num_faults: int | None = None) -> None:
        self.path = path
        self.faults = tuple(faults)
        self.num_faults = len(faults) if num_faults is None else num_faults
        lines = [f"{path}:{line}: {reason}" if line else f"{path}: {reason}" for line, reason in faults]
        if (more := self.num_faults - len(faults)) > 0:
            lines.append(f"{path}: and {more} more")
        super().__init__("\n".join(lines))


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """Fields of all formats.

    Attributes:
        task_id: The task of a multitask soft prompt.
        line: Line number in the file, from 1; 0 if it is from no file. Not compared.
    """

    task_id: int | None = None
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class PromptCompletion(_Row):
    """A prompt and its completion.

    Attributes:
        prompt: The field ``prompt`` of ``/v1/completions``.
        completion: The text that follows directly, including a leading space if there is one.
    """

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class LabelledText(_Row):
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Conversation(_Row):
    """A conversation that ends with the answer to learn.

    Attributes:
        messages: At least two; the last one is the assistant's.
    """

    messages: tuple[Message, ...]


Example = PromptCompletion | LabelledText | Conversation

FORM_NAMES: dict[type[Example], str] = {
    PromptCompletion: "{prompt, completion}",
    LabelledText: "{text, label}",
    Conversation: "{messages}",
}


def read_examples(path: Path) -> list[Example]:
    """Read a file of examples, as ``read_json_lines``, ``read_csv_rows`` or ``read_table_rows`` does.

    Args:
        path: CSV, TSV or Parquet if its name ends so, a directory that ``datasets`` saved, otherwise JSON Lines.

    Returns:
        The examples in order, at least one, all of the same format.

    Raises:
        DatasetError: With every fault, or the reason why the file cannot be read.
    """
    try:
        return _examples(_lines(path), path)
    except OSError as error:
        raise DatasetError(path, [(0, f"cannot be read: {error.strerror or error}")]) from error
    except TableError as error:
        raise DatasetError(path, [(0, str(error))]) from error


def parse_examples(data: bytes, name: str) -> list[Example]:
    """Read examples in JSON Lines from memory.

    Args:
        data: The lines, in UTF-8.
        name: What the data is called in errors.

    Raises:
        DatasetError: With every fault.
    """
    return _examples(json_lines_in(io.BytesIO(data)), Path(name))


def _examples(lines: Iterable[JsonLine], path: Path) -> list[Example]:
    examples: list[Example] = []
    faults: list[tuple[int, str]] = []
    num_faults = 0
    first: Example | None = None
    for line in lines:
        try:
            example = _example(line)
            if first is None:
                first = example
            _same_form(example, first)
            examples.append(example)
        except _FaultError as fault:
            num_faults += 1
            if len(faults) < MAX_FAULTS:
                faults.append((line.number, str(fault)))
    if num_faults:
        raise DatasetError(path, faults, num_faults)
    if not examples:
        raise DatasetError(path, [(0, "has no rows")])
    return examples


def form_of(examples: list[Example]) -> type[Example]:
    """The format of the rows of a file."""
    return type(examples[0])


def digest(path: Path) -> str:
    """The file's SHA-256, in lower-case hexadecimal; of a saved dataset, that of its data files' digests in order.

    Raises:
        DatasetError: If it cannot be read.
    """
    try:
        if path.is_dir():
            return hashlib.sha256("".join(map(_file_digest, data_files(path))).encode()).hexdigest()
        return _file_digest(path)
    except OSError as error:
        raise DatasetError(path, [(0, f"cannot be read: {error.strerror or error}")]) from error
    except TableError as error:
        raise DatasetError(path, [(0, str(error))]) from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(path: Path) -> Iterator[JsonLine]:
    if is_table(path):
        return read_table_rows(path)
    return read_csv_rows(path) if path.suffix.lower() in DELIMITERS else read_json_lines(path)


class _FaultError(Exception):
    """Why a row is invalid."""


def _example(line: JsonLine) -> Example:
    if line.fault is not None:
        raise _FaultError(line.fault)
    row, number = line.fields, line.number
    keys = set(row)
    if not (keys & {"prompt", "completion", "text", "label", "messages"}):
        raise _FaultError(f"not one of the formats {_FORMS}; it has {_listed(keys)}")
    if "messages" in keys:
        _fields(row, "messages")
        return Conversation(_messages(row["messages"]), task_id=_task(row), line=number)
    if keys & {"prompt", "completion"}:
        _fields(row, "prompt", "completion")
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
        return PromptCompletion(prompt, completion, task_id=_task(row), line=number)
    _fields(row, "text", "label")
    return LabelledText(_text(row, "text"), _text(row, "label"), task_id=_task(row), line=number)


def _fields(row: dict[str, Any], *names: str) -> None:
    if missing := [name for name in names if name not in row]:
        raise _FaultError(f"has no {_listed(missing)}")
    if extra := set(row) - set(names) - {"task_id"}:
        raise _FaultError(f"has {_listed(extra)} in addition to {_listed(names)}")


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _FaultError(f"messages is not a list but {kind_of(value)}")
    messages = []
    for place, item in enumerate(value):
        if not isinstance(item, dict):
            raise _FaultError(f"messages[{place}] is not an object but {kind_of(item)}")
        if set(item) != {"role", "content"}:
            raise _FaultError(f"messages[{place}] has {_listed(set(item))} instead of 'content' and 'role'")
        if not isinstance(item["role"], str) or item["role"] not in (*_ROLES, "developer"):
            raise _FaultError(f"messages[{place}].role is not one of {', '.join(_ROLES)}")
        # OpenAI's newer name of this role.
        role: Any = "system" if item["role"] == "developer" else item["role"]
        messages.append(Message(role, _text(item, "content", f"messages[{place}].content")))
    if len(messages) < 2:
        raise _FaultError("messages has fewer than two messages")
    if messages[-1].role != "assistant":
        raise _FaultError(f"the last message is the {messages[-1].role}'s, not the assistant's")
    return tuple(messages)


def _text(row: dict[str, Any], name: str, called: str | None = None) -> str:
    called = called or name
    value = row[name]
    if not isinstance(value, str):
        raise _FaultError(f"{called} is not a string but {kind_of(value)}")
    if not value.strip():
        raise _FaultError(f"{called} is empty")
    if "\0" in value:
        raise _FaultError(f"{called} has a NUL character")
    return value


def _task(row: dict[str, Any]) -> int | None:
    if "task_id" not in row:
        return None
    value = row["task_id"]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _FaultError("task_id is not an integer from 0")
    return value


def _same_form(example: Example, first: Example) -> None:
    if type(example) is not type(first):
        raise _FaultError(
            f"has the format {FORM_NAMES[type(example)]}, but line {first.line} has {FORM_NAMES[type(first)]}"
        )
    if (example.task_id is None) is not (first.task_id is None):
        has, had = ("has no", "has one") if example.task_id is None else ("has a", "has none")
        raise _FaultError(f"{has} task_id, but line {first.line} {had}")


def _listed(names: Any) -> str:
    """Format names for an error message: at most five, truncated and quoted."""
    shown = [ascii(name[:40]) for name in (sorted(names) if isinstance(names, set) else names)]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return (", ".join(shown[:5]) or "no fields") + more
