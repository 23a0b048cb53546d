"""The data of a training: the split, comparisons of the parts, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.datasets import DatasetError
from server.training.corpus import beginning_of_data, initial_text, load_corpus
from server.training.settings import Method
from tests.training.conftest import MakeSettings, rows, write_rows


def test_the_seed_decides_the_held_out_rows(settings: MakeSettings) -> None:
    corpus, again = load_corpus(settings()), load_corpus(settings())
    other = load_corpus(settings(seed=1))

    assert (len(corpus.train), len(corpus.held_out)) == (22, 2)
    assert corpus == again
    assert corpus.held_out != other.held_out
    assert not set(corpus.train) & set(corpus.held_out)
    assert corpus.labels == ("call", "delivery", "great", "support")
    assert corpus.warnings == ()


@pytest.mark.parametrize("changes", [{"eval_fraction": 0.0}, {"data": 9}])
def test_missing_held_out_rows_are_a_warning(settings: MakeSettings, tmp_path: Path, changes: dict[str, Any]) -> None:
    if "data" in changes:
        changes = {"data": write_rows(tmp_path / "few.jsonl", rows(9))}
    corpus = load_corpus(settings(**changes))

    assert corpus.held_out == []
    assert "no rows are held out" in corpus.warnings[0]


def test_held_out_duplicates_and_a_single_label_are_warnings(settings: MakeSettings, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"text": "a", "label": "b"}, {"text": "c", "label": "b"}])
    corpus = load_corpus(settings(data=one, eval_data=one))

    assert len(corpus.held_out) == 2
    assert "nothing to learn" in corpus.warnings[0]
    assert "2 held-out rows are also training rows" in corpus.warnings[1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, "has the format {prompt, completion}, but"),
        ({"text": "a", "label": "unheard"}, "the label 'unheard' is in no training row"),
        ({"text": "a", "label": "call", "task_id": 0}, "have a task_id"),
    ],
)
def test_held_out_rows_of_another_kind_are_refused(
    settings: MakeSettings, tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DatasetError, match="eval.jsonl") as caught:
        load_corpus(settings(eval_data=write_rows(tmp_path / "eval.jsonl", [row])))

    assert reason in str(caught.value)


def test_tasks_need_the_multitask_method_and_count_from_0(settings: MakeSettings, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="have no task_id"):
        load_corpus(settings(method=Method.MULTITASK))
    tasks = write_rows(tmp_path / "tasks.jsonl", rows(4, task_id=0) + rows(4, task_id=2))
    with pytest.raises(DatasetError, match="no row has the task_id 1, but one has 2: count tasks"):
        load_corpus(settings(method=Method.MULTITASK, data=tasks))
    with pytest.raises(DatasetError, match="which the method cpt does not support"):
        load_corpus(settings(method=Method.CPT, data=tasks))


def test_held_out_tasks_must_be_trained(settings: MakeSettings, tmp_path: Path) -> None:
    tasks = write_rows(tmp_path / "tasks.jsonl", rows(4, task_id=0) + rows(4, task_id=1))
    held_out = write_rows(tmp_path / "eval.jsonl", rows(2, task_id=1) + rows(1, task_id=2))

    with pytest.raises(DatasetError, match=r"eval.jsonl:3: the task_id 2 is in no training row"):
        load_corpus(settings(method=Method.MULTITASK, data=tasks, eval_data=held_out))
    good = write_rows(tmp_path / "good.jsonl", rows(2, task_id=1))
    assert load_corpus(settings(method=Method.MULTITASK, data=tasks, eval_data=good)).num_tasks == 2


def test_the_initial_text_describes_the_task(settings: MakeSettings, tmp_path: Path) -> None:
    def begins(**changes: Any) -> str | None:
        made = settings(**changes)
        return initial_text(load_corpus(made), made)

    def data_begins(data: Path) -> str:
        return beginning_of_data(load_corpus(settings(data=data)))

    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "one ", "completion": "two"}] * 2)
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]

    assert begins(init_text="here", description="there") == "here"
    assert begins(description="there") == "there"
    assert begins() == "Classify the text as call, delivery, great or support."
    assert begins(data=pairs) is None
    assert data_begins(pairs) == "one two\none two"
    assert data_begins(write_rows(tmp_path / "chats.jsonl", chats)) == "hi\nho"
