"""Examples in CSV and TSV: what is read, and every fault with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.datasets import DatasetError, LabelledText, PromptCompletion, read_examples


def write(folder: Path, content: bytes, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_texts_and_labels_are_read(tmp_path: Path) -> None:
    content = '\ufefftext,label\r\n"a, ""b""\nc",yes\r\n\r\nGrüße,no\r\n'.encode()
    examples = read_examples(write(tmp_path, content))
    assert examples == [LabelledText('a, "b"\nc', "yes"), LabelledText("Grüße", "no")]
    assert [example.line for example in examples] == [2, 5]


def test_columns_may_have_any_order_and_a_task(tmp_path: Path) -> None:
    path = write(tmp_path, b"task_id\tcompletion\tprompt\n3\t b\ta\n", "data.TSV")
    assert read_examples(path) == [PromptCompletion("a", " b", task_id=3)]
    path = write(tmp_path, b"task_id,completion,prompt\n,b,a\n")
    assert read_examples(path) == [PromptCompletion("a", "b")]


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        (b"text,label\na\nb,yes\nc,yes,no\n", ((2, "has 1 cells, and the header has 2"), (4, "has 3 cells, and"))),
        (b"text,label\n,yes\n", ((2, "text is empty"),)),
        (b"text,answer\na,b\n", ((2, "has no 'label'"),)),
        (b"text,label,text\na,b,c\n", ((1, "the header names a column twice"),)),
        (b"text,label\na,\xff\n", ((1, "not UTF-8"),)),
        (b'text,label\n"a,b\n', ((2, "not CSV: unexpected end of data"),)),
        (b"task_id,text,label\n-1,a,b\n", ((2, "task_id is not an integer from 0"),)),
        (b"text,label\n", ((0, "has no rows"),)),
        (b"", ((0, "has no rows"),)),
    ],
)
def test_faults_are_reported_with_their_lines(
    tmp_path: Path, content: bytes, faults: tuple[tuple[int, str], ...]
) -> None:
    with pytest.raises(DatasetError) as caught:
        read_examples(write(tmp_path, content))
    assert [line for line, _ in caught.value.faults] == [line for line, _ in faults]
    for (_, found), (_, expected) in zip(caught.value.faults, faults, strict=True):
        assert expected in found


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        read_examples(tmp_path / "missing.csv")
