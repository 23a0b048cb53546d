"""Examples in Parquet and in directories of saved datasets: what is read, and every fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from server import table_rows
from server.datasets import Conversation, DatasetError, LabelledText, Message, PromptCompletion, digest, read_examples

ROWS = [{"text": "Grüße", "label": "no"}, {"text": 'a, "b"\nc', "label": "yes"}]
EXAMPLES = [LabelledText("Grüße", "no"), LabelledText('a, "b"\nc', "yes")]


def parquet(path: Path, rows: list[dict[str, Any]], schema: Any = None) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def saved(path: Path, *shards: list[dict[str, Any]], schema: Any = None) -> Path:
    """The files that ``Dataset.save_to_disk`` writes; ``tests/clients`` reads those of the library itself."""
    path.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(shards):05}.arrow" for number in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(rows, schema=schema)
        with pa.OSFile(str(path / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return path


@pytest.mark.parametrize("write", [parquet, saved])
def test_both_formats_are_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    examples = read_examples(write(tmp_path / "rows.PARQUET", ROWS))
    assert examples == EXAMPLES
    assert [example.line for example in examples] == [1, 2]


def test_conversations_and_tasks_are_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (conversation,) = read_examples(parquet(tmp_path / "a.parquet", [{"messages": turns}]))
    assert conversation == Conversation((Message("user", "Hi"), Message("assistant", "Hello.")))
    rows = [{"prompt": "a", "completion": "b", "task_id": 3, "more": None}]
    assert read_examples(parquet(tmp_path / "b.parquet", rows)) == [PromptCompletion("a", "b", task_id=3)]


@pytest.mark.parametrize("write", [parquet, saved])
def test_classes_are_read_by_their_names(tmp_path: Path, write: Callable[..., Path]) -> None:
    features = {"text": {"dtype": "string"}, "label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    schema = pa.schema(
        [("text", pa.string()), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    examples = read_examples(write(tmp_path / "good.parquet", rows, schema=schema))
    assert examples == [LabelledText("a", "yes"), LabelledText("b", "no")]
    with pytest.raises(DatasetError, match=r"bad\.parquet:2: label is 7, which names none of its 2 classes"):
        read_examples(write(tmp_path / "bad.parquet", [rows[0], {"text": "b", "label": 7}], schema=schema))


def test_integers_without_names_are_refused_by_row(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"rows\.parquet:1: label is not a string"):
        read_examples(parquet(tmp_path / "rows.parquet", [{"text": "a", "label": 1}]))


def test_the_shards_of_a_dataset_are_read_in_order_and_all_in_its_digest(tmp_path: Path) -> None:
    path = saved(tmp_path / "data", ROWS[:1], ROWS[1:])
    assert read_examples(path) == EXAMPLES
    before = digest(path)
    assert before == digest(saved(tmp_path / "same", ROWS[:1], ROWS[1:]))
    assert before != digest(saved(tmp_path / "other", ROWS[:1], ROWS[:1]))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "is a directory, but none that save_to_disk of datasets wrote"),
        ({"dataset_dict.json": '{"splits": ["train", "test"]}'}, "has the splits train, test: name one of them"),
        ({"dataset_dict.json": "[]"}, "dataset_dict.json has no splits"),
        ({"state.json": "{"}, "state.json has no _data_files"),
        ({"state.json": '{"_data_files": []}'}, "state.json has no _data_files"),
        ({"state.json": '{"_data_files": [{"filename": 3}]}'}, "state.json has no names of files"),
        ({"state.json": '{"_data_files": [{"filename": "a"}]}', "a": "nonsense"}, "not a saved dataset: "),
    ],
)
def test_other_directories_are_refused(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=reason):
        read_examples(tmp_path)


def test_a_dataset_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    saved(tmp_path / "data", ROWS)
    (tmp_path / "secret.arrow").write_bytes((tmp_path / "data" / "data-00000-of-00001.arrow").read_bytes())
    (tmp_path / "data" / "state.json").write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    with pytest.raises(DatasetError, match="cannot be read: "):
        read_examples(tmp_path / "data")


def test_what_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"nonsense")
    with pytest.raises(DatasetError, match=r"rows\.parquet: not Parquet: "):
        read_examples(tmp_path / "rows.parquet")
    with pytest.raises(DatasetError, match=r"none\.parquet: cannot be read: "):
        read_examples(tmp_path / "none.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = find_spec
    monkeypatch.setattr(table_rows, "find_spec", lambda name: None if name == "pyarrow" else own(name))
    with pytest.raises(DatasetError, match=r"needs pyarrow: pip install 'prelude-server\[parquet\]'"):
        read_examples(parquet(tmp_path / "rows.parquet", ROWS))
