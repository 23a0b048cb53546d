"""The strict reader of JSON Lines: every fault is reported with its line, and the other lines are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import json_lines
from server.json_lines import JsonLine, count_lines, read_json_lines

GOOD = b'{"a": 1}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


def lines_of(path: Path, data: bytes) -> list[JsonLine]:
    path.write_bytes(data)
    lines = list(read_json_lines(path))
    assert count_lines(path) == len(lines)
    return lines


def test_a_line_has_its_number_its_object_and_its_source(path: Path) -> None:
    first, second = lines_of(path, b'\xef\xbb\xbf{"a": [1, {"b": null}]}\r\n\n \t\n  {"c": "\xe2\x80\xa8"} ')

    assert first == JsonLine(1, {"a": [1, {"b": None}]}, None, b'{"a": [1, {"b": null}]}', 23)
    assert second == JsonLine(4, {"c": "\u2028"}, None, b'{"c": "\xe2\x80\xa8"}', 15)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"a": "\xff"}', "not UTF-8: byte 8 of the line"),
        (b'{"a": 1', "not JSON: Expecting ',' delimiter (character 8)"),
        (b'{"a": 1} {}', "not JSON: Extra data (character 10)"),
        (b'{"a": "\x00"}', "not JSON: Invalid control character at (character 8)"),
        (b"\xef\xbb\xbf{}", "not JSON: Expecting value (character 1)"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "number 1e999 is out of range"),
        (
            b'{"a": ' + b"9" * 5000 + b"}",
            "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits",
        ),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b'{"a": 1, "a": 2}', "the field 'a' appears twice"),
        (b'{"a": {"b": 1, "b": 2}}', "the field 'b' appears twice"),
        (b'{"a": "\\ud800"}', "contains half of a surrogate pair"),
        (b'{"\\ud800": 1}', "contains half of a surrogate pair"),
        (b'["a"]', "not a JSON object but a list"),
        (b"null", "not a JSON object but null"),
        (b"true", "not a JSON object but a boolean"),
        (b"1.5", "not a JSON object but a number"),
        (b'"a"', "not a JSON object but a string"),
    ],
)
def test_a_bad_line_is_reported_and_does_not_stop_others(path: Path, line: bytes, fault: str) -> None:
    first, faulty, last = lines_of(path, GOOD + line + b"\n" + GOOD)

    assert faulty == JsonLine(2, {}, fault, num_bytes=len(line))
    assert (first.fault, last.fault, last.number) == (None, None, 3)


def test_a_whole_surrogate_pair_is_a_character(path: Path) -> None:
    (line,) = lines_of(path, b'{"a": "\\ud83d\\ude00"}')

    assert line.fields == {"a": "\U0001f600"}


def test_long_lines_are_faults_and_long_blank_lines_are_skipped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 100)
    long = b'{"a": "' + b"x" * 1000 + b'"}\n'

    lines = lines_of(path, b"\xef\xbb\xbf" + long + b" " * 500 + b"\n" + GOOD + b"y" * 101)

    too_long = "the line is longer than 100 bytes"
    assert [(line.number, line.fault) for line in lines] == [(1, too_long), (3, None), (4, too_long)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_the_limit_does_not_count_the_line_end(path: Path, end: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", len(GOOD.rstrip()))

    (line,) = lines_of(path, GOOD.rstrip() + end)

    assert line.fault is None


def test_skipped_lines_are_not_parsed_and_blank_ones_do_not_count(path: Path) -> None:
    path.write_bytes(b"nonsense\n\n" + GOOD + GOOD)

    assert [line.number for line in read_json_lines(path, skip=1)] == [3, 4]


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_text_has_no_lines(path: Path, data: bytes) -> None:
    assert lines_of(path, data) == []


def test_a_missing_file_is_an_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_json_lines(path))
    with pytest.raises(FileNotFoundError):
        count_lines(path)
