"""Rows of files, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.client.bulk import rows as module
from server.client.bulk.rows import Row, identify, read_rows


def rows_of(path: Path, data: bytes, **options: Any) -> list[Row]:
    path.write_bytes(data)
    return list(read_rows(path, **options))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


def test_the_three_forms_and_what_a_row_carries(path: Path) -> None:
    fields = [
        {"prompt": "a", "id": 7, "n": 12345678901234567890123},
        {"text": "b", "prompt_id": "x@2", "task_id": 1},
        {"messages": [{"role": "user", "content": "c"}], "model": None},
    ]
    found = rows_of(path, "\n".join(json.dumps(item) for item in fields).encode())
    assert [row.fields for row in found] == fields
    assert [(row.index, row.line, row.form, row.fault) for row in found] == [
        (0, 1, "prompt", None),
        (1, 2, "text", None),
        (2, 3, "messages", None),
    ]
    assert found[1].content == "b"


def test_blank_lines_and_a_mark_are_no_rows(path: Path) -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}'
    assert [(row.index, row.line) for row in rows_of(path, data)] == [(0, 1), (1, 4)]
    assert [(row.index, row.line) for row in rows_of(path, data, skip=1)] == [(1, 4)]
    assert identify(path).num_rows == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not UTF-8: byte 11"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": NaN}', "NaN is not JSON"),
        (b'{"text": "a", "x": 1e999}', "out of range"),
        (b'["a"]', "not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "a", "text": "b"}', "'text' appears twice"),
        (b"{}", "this row has none of them"),
        (b'{"text": "a", "prompt": "b"}', "this row has prompt and text"),
        (b'{"text": ""}', "text: should be a string, and not empty"),
        (b'{"prompt": 1}', "prompt: should be a string"),
        (b'{"messages": []}', "messages: should be a list"),
        (b'{"messages": ["a"]}', "messages: should be a list"),
        (b'{"text": "a", "model": 1}', "model: should be a string"),
        (b'{"text": "a", "prompt_id": ""}', "prompt_id: should be a string"),
        (b'{"text": "a", "prompt_id": "x", "model": "y"}', "model already names a soft prompt"),
        (b'{"text": "a", "task_id": true}', "task_id: should be an integer"),
        (b'{"text": "a", "response": 1}', "'response' is reserved for the output"),
        (b'{"text": "a", "error": 1}', "'error' is reserved for the output"),
    ],
)
def test_what_is_wrong_is_told_and_stops_no_other(path: Path, line: bytes, reason: str) -> None:
    first, bad, last = rows_of(path, b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert first.fault is last.fault is None
    assert bad.fault is not None
    assert reason in bad.fault
    assert (bad.index, bad.line, last.index) == (1, 2, 2)


def test_a_long_line_is_not_held(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 64)
    data = b'{"text": "' + b"x" * 1000 + b'"}\n' + b" " * 500 + b'\n{"text": "b"}\n'
    long, after = rows_of(path, data)
    assert long.fault == "the line has more than 100 bytes"
    assert (after.index, after.line, after.content) == (1, 3, "b")
    assert identify(path).num_rows == 2


@given(lines=st.lists(st.sampled_from([b"", b" ", b"\t\r", b'{"text": "a"}', b"x", b"  y"])), ends=st.booleans())
def test_the_count_is_that_of_the_rows(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ends: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "count.jsonl"
    found = rows_of(path, b"\n".join(lines) + b"\n" * ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", 3)
        assert identify(path).num_rows == len(found) == sum(bool(line.strip()) for line in lines)
    assert [row.index for row in found] == list(range(len(found)))


def test_another_content_is_another_file(path: Path) -> None:
    path.write_text('{"text": "a"}')
    first = identify(path)
    path.write_text('{"text": "b"}')
    assert identify(path).sha256 != first.sha256
