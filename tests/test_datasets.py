"""The reader of labelled examples: each form, and every fault with its line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from server import datasets
from server.datasets import (
    Conversation,
    DatasetError,
    LabelledText,
    Message,
    PromptCompletion,
    digest,
    form_of,
    read_examples,
)

GOOD = b'{"text": "fine", "label": "yes"}\n'


def _file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return path


def _faults(tmp_path: Path, content: bytes) -> tuple[tuple[int, str], ...]:
    with pytest.raises(DatasetError) as caught:
        read_examples(_file(tmp_path, content))
    return caught.value.faults


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "a\n", "completion": " b"}, PromptCompletion("a\n", " b")),
        ({"text": "Grüße ☃", "label": "yes"}, LabelledText("Grüße ☃", "yes")),
        ({"text": "t", "label": "yes", "task_id": 3}, LabelledText("t", "yes", task_id=3)),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            Conversation((Message("user", "hi"), Message("assistant", "ho"))),
        ),
        (
            {"messages": [{"role": "developer", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            Conversation((Message("system", "hi"), Message("assistant", "ho"))),
        ),
    ],
)
def test_each_form_is_read(tmp_path: Path, row: dict[str, object], example: object) -> None:
    examples = read_examples(_file(tmp_path, json.dumps(row).encode()))

    assert examples == [example]
    assert examples[0].line == 1
    assert form_of(examples) is type(example)


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    examples = read_examples(_file(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n  \n" + GOOD.rstrip() + b"\r\n"))

    assert [example.line for example in examples] == [1, 4]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not UTF-8: byte 11 of the line"),
        (b"[1]", "not a JSON object but a list"),
        (b"{}", "it has no fields"),
        (b'{"question": "a", "answer": "b"}', "it has 'answer', 'question'"),
        (b'{"text": "a"}', "has no 'label'"),
        (b'{"label": "a"}', "has no 'text'"),
        (b'{"completion": "a"}', "has no 'prompt'"),
        (b'{"prompt": "a", "completion": "b", "label": "c"}', "has 'label' in addition to 'prompt', 'completion'"),
        (b'{"text": "a", "label": "b", "id": 1}', "has 'id' in addition to"),
        (b'{"messages": [], "text": "a"}', "has 'text' in addition to"),
        (b'{"text": 1, "label": "b"}', "text is not a string but a number"),
        (b'{"text": "a", "label": true}', "label is not a string but a boolean"),
        (b'{"text": "a", "label": {}}', "label is not a string but an object"),
        (b'{"text": "", "label": "b"}', "text is empty"),
        (b'{"prompt": "a", "completion": "  "}', "completion is empty"),
        (b'{"text": "a\\u0000", "label": "b"}', "text has a NUL"),
        (b'{"text": "a", "label": "b", "task_id": -1}', "task_id is not an integer from 0"),
        (b'{"text": "a", "label": "b", "task_id": true}', "task_id is not an integer from 0"),
        (b'{"text": "a", "label": "b", "task_id": 1}', "has a task_id, but line 1 has none"),
        (b'{"prompt": "a", "completion": "b"}', "has the format {prompt, completion}, but line 1 has {text, label}"),
        (b'{"messages": "a"}', "messages is not a list but a string"),
        (b'{"messages": ["a"]}', "messages[0] is not an object"),
        (b'{"messages": [{"role": "user"}]}', "messages[0] has 'role' instead of"),
        (b'{"messages": [{"role": "king", "content": "a"}]}', "messages[0].role is not one of"),
        (b'{"messages": [{"role": [], "content": "a"}]}', "messages[0].role is not one of"),
        (b'{"messages": [{"role": "user", "content": null}]}', "messages[0].content is not a string but null"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "fewer than two"),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}',
            "the last message is the user's",
        ),
    ],
)
def test_a_fault_is_reported_with_its_line(tmp_path: Path, line: bytes, reason: str) -> None:
    ((number, message),) = _faults(tmp_path, GOOD + line + b"\n" + GOOD)

    assert number == 2
    assert reason in message
    assert len(message) < 400


def test_all_faults_are_collected_and_many_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MAX_FAULTS", 3)
    with pytest.raises(DatasetError) as caught:
        read_examples(_file(tmp_path, b"nonsense\n" * 30 + GOOD + b"[]\n"))

    assert [line for line, _ in caught.value.faults] == [1, 2, 3]
    assert caught.value.num_faults == 31
    assert str(caught.value).endswith("data.jsonl: and 28 more")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_a_fault_of_the_file(tmp_path: Path, content: bytes) -> None:
    assert _faults(tmp_path, content) == ((0, "has no rows"),)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "is a directory, but none that save_to_disk"),
    ):
        with pytest.raises(DatasetError, match=reason):
            read_examples(path)
        with pytest.raises(DatasetError, match=reason):
            digest(path)


def test_the_digest_covers_the_files_bytes(tmp_path: Path) -> None:
    assert digest(_file(tmp_path, GOOD)) == hashlib.sha256(GOOD).hexdigest()
