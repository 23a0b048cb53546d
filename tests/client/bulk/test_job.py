"""The output line of each row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.client.bulk.job import output_line
from server.client.bulk.rows import Row, read_rows
from server.client.bulk.sender import Outcome

RESPONSE = {"model": "a@1", "text": "é", "finish_reason": "stop"}


def only_row(tmp_path: Path, line: bytes) -> Row:
    path = tmp_path / "in.jsonl"
    path.write_bytes(line)
    (row,) = read_rows(path)
    return row


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (b'{"text": "a", "id": 123456789012345678901234567890, "x": 1.50}\n', None),
        (b'\xef\xbb\xbf \t{"text":"\\u00e9" , "y": [] }  \r\n', b'{"text":"\\u00e9" , "y": []'),
        ('{"prompt": "\u2028"}'.encode(), None),
    ],
)
def test_the_fields_of_a_row_are_copied_byte_for_byte(tmp_path: Path, line: bytes, kept: bytes | None) -> None:
    written, error = output_line(Outcome(only_row(tmp_path, line), response=RESPONSE))
    assert error is None
    assert written.startswith((kept or line.rstrip()[:-1]) + b', "response": {')
    assert written.endswith(b"}\n")
    assert written.count(b"\n") == 1
    fields = json.loads(line.decode("utf-8-sig"))
    assert json.loads(written) == fields | {"response": RESPONSE}


def test_a_carriage_return_between_fields_does_not_end_the_line(tmp_path: Path) -> None:
    written, _ = output_line(Outcome(only_row(tmp_path, b'{"text": "a",\r"id": 1}\n'), response=RESPONSE))
    assert b"\r" not in written
    assert json.loads(written) == {"text": "a", "id": 1, "response": RESPONSE}


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        (b"nonsense", {}),
        (b"{}", {}),
        (b'{"id": 7, "text": ""}', {"id": 7, "text": ""}),
        (b'{"text": "a", "error": 1}', {"text": "a"}),
        (b'{"text": "a", "response": 1}', {"text": "a", "response": 1}),
    ],
)
def test_a_bad_row_keeps_its_readable_fields_and_gives_its_line(
    tmp_path: Path, line: bytes, fields: dict[str, Any]
) -> None:
    row = only_row(tmp_path, line)
    assert row.fault is not None
    written, error = output_line(Outcome(row, error={"message": row.fault, "code": "invalid_row"}))
    assert error == {"message": row.fault, "code": "invalid_row", "line": 1}
    pairs: list[Any] = json.loads(written, object_pairs_hook=list)
    assert len({name for name, _ in pairs}) == len(pairs)
    assert json.loads(written) == fields | {"error": error}


def test_half_of_a_surrogate_pair_in_an_answer_is_written_as_its_escape() -> None:
    written, _ = output_line(Outcome(Row(0, 1, {"text": "a"}, "text"), response={"text": "\ud800"}))
    assert written == b'{"text": "a", "response": {"text": "\\ud800"}}\n'
    assert json.loads(written)["response"] == {"text": "\ud800"}
