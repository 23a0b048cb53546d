"""``prelude edit``, ``prelude history``, and what ``prelude push`` says of known bytes and unknown labels."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file

from server.client.registry.times import parse_duration, parse_time
from tests.client.conftest import Data, Get, Ok, Prelude
from tests.support.api_fixtures import PeftDirectory
from tests.support.fake_engine import BASE, WIDTH

pytestmark = pytest.mark.slow


@pytest.fixture
def pushed(ok: Ok, peft_directory: PeftDirectory) -> str:
    """The directory of ``p@1``."""
    directory = str(peft_directory("p"))
    ok("push", directory, "--id", "p", "--description", "old", "--tag", "x", "--metadata", '{"a": 1, "b": 2}')
    return directory


@pytest.fixture
def head(tmp_path: Path) -> str:
    """A directory with a head of two labels without names."""
    folder = tmp_path / "head"
    folder.mkdir()
    config = {"base_model_name_or_path": BASE, "num_virtual_tokens": 4, "peft_type": "PROMPT_TUNING"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    tensors = {
        "prompt_embeddings": np.ones((4, WIDTH), np.float32),
        "base_model.score.weight": np.ones((2, WIDTH), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def test_edit_changes_a_version(ok: Ok, get: Get, pushed: str) -> None:
    shown = ok("edit", "p", "--description", "new", "--tag", "y", "--metadata", '{"a": null}', "--reason", "typo")
    assert shown == "p@1: changed description, metadata, tags\n"
    version = get("/p/versions/1")
    assert (version["description"], version["tags"], version["metadata"]) == ("new", ["y"], {"b": 2})
    assert ok("edit", "p@latest", "--description", "new") == "p@1: unchanged\n"
    assert ok("edit", "p@1", "--no-tags") == "p@1: changed tags\n"
    assert get("/p/versions/1")["tags"] == []
    assert ok("edit", "p", "--format", "chat") == "p@1: changed format\n"
    assert get("/p/versions/1")["format"]["type"] == "chat"


def test_edit_refuses_what_makes_no_sense(prelude: Prelude, pushed: str) -> None:
    for arguments, status, message in (
        ([], 2, "give new values"),
        (["--shared", "--owner", "t"], 2, "give new values"),
        (["--shared", "--description", "x"], 2, "give new values"),
        (["--format", "unknown"], 2, "cannot be made unknown again"),
        (["--format", "no-such-file"], 2, "is neither raw"),
        (["--tag", "x", "--no-tags"], 2, "not both"),
        (["--tag", "No"], 2, "is not valid"),
        (["--metadata", "{"], 2, "is not JSON"),
        (["--metadata", "[]"], 4, "metadata"),
        (["--labels", "a,b"], 4, "has no classification head"),
    ):
        refused = prelude("edit", "p", *arguments)
        assert refused.exit_code == status, (arguments, refused.output)
        assert message in " ".join(refused.stderr.replace("│", " ").split()), arguments
    assert prelude("edit", "p@1", "--shared").exit_code == 2
    assert prelude("edit", "nothing", "--description", "x").exit_code == 3
    assert prelude("edit", "p@7", "--description", "x").exit_code == 3


def test_push_says_what_known_bytes_have_changed(ok: Ok, data: Data, pushed: str) -> None:
    same = ok("push", pushed, "--id", "p")
    assert same.splitlines()[0] == "p@1 (this version has the same bytes; unchanged)"
    other = ok("push", pushed, "--id", "p", "--description", "new", "--tag", "x")
    assert other.splitlines()[0] == "p@1 (this version has the same bytes; changed: description)"
    assert data("push", pushed, "--id", "p", "--tag", "z")["changed"] == ["tags"]


def test_push_warns_of_labels_without_names(prelude: Prelude, ok: Ok, head: str) -> None:
    warned = prelude("push", head, "--id", "topics")
    assert (warned.exit_code, warned.stdout.splitlines()[0]) == (0, "topics@1")
    assert "the head's 2 labels are unknown" in warned.stderr
    assert "prelude edit topics@1 --labels" in warned.stderr
    assert ok("edit", "topics", "--labels", "bad, good") == "topics@1: changed metadata\n"
    again = ok("push", head, "--id", "topics")
    assert again.splitlines()[0] == "topics@1 (this version has the same bytes; unchanged)"


def test_eval_needs_a_label_that_the_head_has(prelude: Prelude, ok: Ok, head: str, tmp_path: Path) -> None:
    prelude("push", head, "--id", "topics")
    path = tmp_path / "test.jsonl"
    path.write_text('{"text": "a", "label": "good"}\n{"text": "b", "label": "bad"}\n')
    for arguments in (["eval", "topics"], ["eval", "topics", "--json"]):
        refused = prelude(*arguments, "--data", str(path))
        assert refused.exit_code == 4
        assert "labels of the data (bad, good) is one of the head of topics@1 (LABEL_0, LABEL_1)" in refused.stderr
        assert "prelude edit topics@1 --labels" in refused.stderr
    assert json.loads(refused.stdout)["error"]["code"] == "invalid_data"
    ok("edit", "topics", "--labels", "bad,other")
    assert prelude("eval", "topics", "--data", str(path)).exit_code == 0


def test_history_lists_changes_of_all_names(
    ok: Ok, data: Data, prelude: Prelude, pushed: str, peft_directory: PeftDirectory
) -> None:
    ok("push", str(peft_directory("p", seed=1)), "--id", "p")
    ok("rollback", "p", "--reason", "worse")
    ok("promote", "p", "2", "--reason", "better after all")
    ok("edit", "p@1", "--no-tags")
    ok("rm", "p", "--yes", "--reason", "done")
    ok("push", pushed, "--id", "q")
    every = data("history")
    assert [entry["action"] for entry in every["data"]][:4] == ["promote", "publish", "delete_prompt", "delete_alias"]
    assert {entry["prompt_id"] for entry in every["data"]} == {"p", "q"}
    assert not every["has_more"]
    reasons = {entry["action"]: entry["reason"] for entry in data("history", "p")["data"] if entry["reason"]}
    assert reasons == {
        "delete_prompt": "done",
        "delete_alias": "done",
        "rollback": "worse",
        "promote": "better after all",
    }
    shown = ok("history", "p", "--action", "rollback")
    assert shown.splitlines()[0].split() == ["when", "name", "what", "alias", "version", "before", "by", "why"]
    assert "worse" in shown
    assert "edit: tags" in ok("history", "--action", "edit")
    assert data("history", "--since", "1h")["data"] == every["data"]
    assert data("history", "--since", "2100-01-01")["data"] == data("history", "--until", "1d")["data"] == []
    assert data("history", "--actor", "nobody")["data"] == []
    assert "There are more" in ok("history", "--limit", "2")
    assert len(data("history", "--limit", "2")["data"]) == 2
    assert prelude("history", "--since", "soon").exit_code == 2
    assert prelude("history", "No").exit_code == 2
    assert prelude("history", "--action", "guess").exit_code == 4


def test_times_and_durations_are_parsed() -> None:
    assert [parse_duration(text) for text in ("90s", "5m", "2h", "30d", "1w")] == [90, 300, 7200, 2592000, 604800]
    assert 0 <= time.time() - 86400 - parse_time("1d") < 5
    assert parse_time("1970-01-02") == 86400
    assert parse_time("1970-01-01T01:00+01:00") == 0
    for text in ("", "0d", "-1d", "1y", "d"):
        with pytest.raises(typer.BadParameter, match="is not a duration"):
            parse_duration(text)
    with pytest.raises(typer.BadParameter, match="is not a time"):
        parse_time("yesterday")
