"""A strict reader of JSON Lines: a faulty line is reported with its number and does not stop the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prompt_store.files.strict_json import finite_float, refuse_constant

MAX_LINE_BYTES = 8 * 1024 * 1024
"""Maximum length of a line without its line end: what a server accepts as a request body by default."""

_BOM = b"\xef\xbb\xbf"


class JsonLine(NamedTuple):
    """One line that is not blank.

    Attributes:
        number: Its number in the file, from 1; blank lines are counted.
        fields: Its JSON object; empty if the line is faulty.
        fault: Why the line is refused; None if it is not.
        source: The line without surrounding white space; empty if it is faulty.
        num_bytes: Its length without the line end; 0 if it is too long.
    """

    number: int
    fields: dict[str, Any]
    fault: str | None = None
    source: bytes = b""
    num_bytes: int = 0


def read_json_lines(path: Path, *, skip: int = 0) -> Iterator[JsonLine]:
    """Read the lines of a file one by one. Blank lines and a byte order mark at the beginning are skipped.

    A line is faulty if it is too long, not UTF-8, not strict JSON or not an object, if an object in it repeats a
    key, or if a string holds half of a surrogate pair, which UTF-8 cannot encode.

    Args:
        path: JSON Lines in UTF-8.
        skip: Number of lines, blank ones not counted, to pass over without parsing them.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        yield from json_lines_in(file, skip=skip)


def json_lines_in(file: BinaryIO, *, skip: int = 0) -> Iterator[JsonLine]:
    """Read the lines of an open file as ``read_json_lines`` does."""
    for index, (number, line) in enumerate(_lines(file)):
        if index < skip:
            continue
        if line is None:
            yield JsonLine(number, {}, f"the line is longer than {MAX_LINE_BYTES} bytes")
            continue
        try:
            fields = _parse(line)
        except ValueError as error:
            # Python's advice on integers of too many digits is for programmers.
            fault = str(error).partition("; use sys.set_int_max_str_digits")[0]
            yield JsonLine(number, {}, fault, num_bytes=len(line))
        else:
            yield JsonLine(number, fields, None, line.strip(), len(line))


def count_lines(path: Path) -> int:
    """The number of lines that ``read_json_lines`` yields; raises OSError if the file cannot be read."""
    with path.open("rb") as file:
        return sum(1 for _ in _lines(file))


def kind_of(value: object) -> str:
    """What a JSON value is, for an error message."""
    if value is None:
        return "null"
    kinds: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Number the lines, remove their line ends, and skip blank ones.

    A line that is too long is None, and is never held in memory.
    """
    number = 0
    size = MAX_LINE_BYTES + len(b"\r\n")
    while piece := file.readline(size):
        number += 1
        line = piece.removeprefix(_BOM) if number == 1 else piece
        line = line.rstrip(b"\r\n")
        is_blank = not line or line.isspace()
        is_long = len(line) > MAX_LINE_BYTES
        while len(piece) == size and not piece.endswith(b"\n"):
            is_long = True
            piece = file.readline(size)
            is_blank = is_blank and not piece.strip()
        if not is_blank:
            yield number, None if is_long else line


def _parse(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} of the line") from error
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {kind_of(value)}")
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
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {repeated[:64]!a} appears twice")
    return fields


# One for all lines: ``json.loads`` would make one for each.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=refuse_constant, parse_float=finite_float)
