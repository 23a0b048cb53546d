"""Rows of files, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import json_lines
from server.client.bulk.rows import Row, identify, read_rows


def rows_of(path: Path, data: bytes, **options: Any) -> list[Row]:
    path.write_bytes(data)
    return list(read_rows(path, **options))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


def test_rows_of_the_three_forms_keep_their_fields(path: Path) -> None:
    fields: list[dict[str, Any]] = [
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


def test_blank_lines_and_a_byte_order_mark_are_skipped(path: Path) -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}'
    assert [(row.index, row.line) for row in rows_of(path, data)] == [(0, 1), (1, 4)]
    assert [(row.index, row.line) for row in rows_of(path, data, skip=1)] == [(1, 4)]
    assert identify(path).num_rows == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"{}", "this row has none of them"),
        (b'{"text": "a", "prompt": "b"}', "this row has prompt and text"),
        (b'{"text": ""}', "text: should be a string, and not empty"),
        (b'{"prompt": 1}', "prompt: should be a string"),
        (b'{"messages": []}', "messages: should be a list"),
        (b'{"messages": ["a"]}', "messages: should be a list"),
        (b'{"text": "a", "model": 1}', "model: should be a string"),
        (b'{"text": "a", "prompt_id": ""}', "prompt_id: should be a string"),
        (b'{"text": "a", "adapter_id": 7}', "adapter_id: should be a string that names an adapter"),
        (b'{"text": "a", "prompt_id": "x", "model": "y"}', "model already names a soft prompt"),
        (b'{"text": "a", "task_id": true}', "task_id: should be an integer"),
        (b'{"text": "a", "response": 1}', "'response' is reserved for the output"),
        (b'{"text": "a", "error": 1}', "'error' is reserved for the output"),
    ],
)
def test_a_bad_row_does_not_stop_others(path: Path, line: bytes, reason: str) -> None:
    first, bad, last = rows_of(path, b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert first.fault is last.fault is None
    assert bad.fault is not None
    assert reason in bad.fault
    assert (bad.index, bad.line, last.index) == (1, 2, 2)


@given(
    lines=st.lists(st.sampled_from([b"", b" ", b"\t\r", b'{"text": "a"}', b"x", b"  y", b" " * 99, b"z" * 99])),
    begin=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    ends=st.booleans(),
)
def test_identify_counts_the_rows(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], begin: bytes, ends: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "count.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "MAX_LINE_BYTES", 50)
        found = rows_of(path, begin + b"\n".join(lines) + b"\n" * ends)
        assert identify(path).num_rows == len(found) == sum(bool(line.strip()) for line in lines)
    assert [row.index for row in found] == list(range(len(found)))


def test_different_content_has_a_different_digest(path: Path) -> None:
    path.write_text('{"text": "a"}')
    first = identify(path)
    path.write_text('{"text": "b"}')
    assert identify(path).sha256 != first.sha256
