"""``prelude run`` against a real server over a scripted engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from server.cli import app as cli
from server.client.bulk.command import parse_labels
from server.client.bulk.rows import read_rows
from server.errors import RequestFailedError
from tests.support.api_fixtures import PeftDirectory, WaitUntil
from tests.support.fake_engine import FakeEngine
from tests.support.live_server import LiveServer
from tests.support.processes import PRELUDE

pytestmark = pytest.mark.slow

Bulk = Callable[..., tuple[Result, list[Any]]]


@pytest.fixture
def bulk(live: LiveServer, tmp_path: Path) -> Bulk:
    """Run ``prelude run`` on rows; returns its result and the output's rows."""

    def invoke(rows: bytes | list[Any], *options: str, name: str = "tiny") -> tuple[Result, list[Any]]:
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        lines = rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        source.write_bytes(lines)
        arguments = ["run", name, str(source), str(output), *options]
        result = CliRunner().invoke(cli, arguments, env={"PRELUDE_URL": live.url})
        written = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return result, written

    return invoke


def push(live: LiveServer, directory: Path, name: str) -> None:
    result = CliRunner().invoke(cli, ["push", str(directory), "--id", name, "--url", live.url])
    assert result.exit_code == 0, result.output


def test_rows_are_answered_in_order_with_all_their_fields(
    live: LiveServer, engine: FakeEngine, bulk: Bulk, peft_directory: PeftDirectory
) -> None:
    push(live, peft_directory("sentiment"), "sentiment")
    rows: list[dict[str, Any]] = [{"id": index, "prompt": f"text {index}"} for index in range(20)]
    result, written = bulk(rows, "--max-tokens", "3", "--stop", "zz", "--seed", "7", name="sentiment")
    assert result.exit_code == 0, result.output
    response = {"model": "sentiment@1", "text": "hel", "finish_reason": "length"}
    assert written == [row | {"response": response} for row in rows]
    assert "20 rows, answered by sentiment@1" in result.stdout
    assert "errors: 0" in result.stdout
    params = engine.requests[0].params
    assert (params.temperature, params.max_tokens, params.seed) == (0.0, 3, 7)
    sent = [bytes(request.prompt_token_ids[1:]).decode() for request in engine.requests]
    assert sorted(sent) == sorted(row["prompt"] for row in rows)


def test_json_prints_a_summary(bulk: Bulk) -> None:
    result, _ = bulk([{"prompt": "a"}, {"prompt": ""}], "--json", "--options", '{"top_k": 3}', "--top-p", "0.5")
    assert result.exit_code == 4
    summary = json.loads(result.stdout)
    assert summary.pop("seconds") >= 0
    assert summary.pop("rows_per_second") > 0
    assert Path(summary.pop("output")).name == "out.jsonl"
    assert summary == {
        "object": "bulk.summary",
        "state": "complete",
        "model": "tiny",
        "rows": 2,
        "rows_done": 2,
        "rows_before": 0,
        "errors": 1,
        "errors_by_code": {"invalid_row": 1},
        "prompt_tokens": 2,
        "completion_tokens": 12,
        "requests": 1,
        "retries": {},
    }


def test_bad_rows_are_reported_by_line_and_the_others_are_answered(bulk: Bulk) -> None:
    result, written = bulk(b'{"prompt": "a", "id": 1}\n\nnonsense\n{"prompt": "b"}\n')
    assert result.exit_code == 4
    assert [row.get("id") for row in written] == [1, None, None]
    assert written[1]["error"]["line"] == 3
    assert written[1]["error"]["code"] == "invalid_row"
    assert written[2]["response"]["text"] == "hello world"
    assert "errors: 1 (invalid_row 1)" in result.stdout


def test_one_refused_row_fails_alone(bulk: Bulk) -> None:
    rows = [{"prompt": "a"}, {"prompt": "x" * 300}, {"prompt": "b"}]
    result, written = bulk(rows)
    assert result.exit_code == 4
    assert written[1]["error"]["code"] == "context_length_exceeded"
    assert [("response" in row) for row in written] == [True, False, True]


def test_rows_may_be_texts_or_conversations_or_name_a_soft_prompt(
    live: LiveServer, bulk: Bulk, peft_directory: PeftDirectory
) -> None:
    push(live, peft_directory("sentiment"), "sentiment")
    rows = [
        {"text": "a"},
        {"messages": [{"role": "user", "content": "b"}]},
        {"text": "c", "prompt_id": "sentiment"},
        {"text": "d", "prompt_id": "none"},
    ]
    result, written = bulk(rows, "--labels", r"\ngood,\nbad")
    assert result.exit_code == 4
    assert written[0]["response"]["label"] == "\nbad"
    assert written[0]["response"]["probabilities"].keys() == {"\ngood", "\nbad"}
    assert written[1]["response"]["message"]["content"] == "hello world"
    assert written[2]["response"]["model"] == "sentiment@1"
    assert written[3]["error"]["code"] == "prompt_not_found"


def test_a_head_classifies_without_labels(live: LiveServer, bulk: Bulk, tmp_path: Path) -> None:
    import httpx

    from tests.api.classification.test_classify import classifier_parts

    httpx.post(f"{live.url}/v1/prompts", **classifier_parts()).raise_for_status()
    result, written = bulk([{"text": "a"}, {"prompt": "b"}], name="topics")
    assert result.exit_code == 0, result.output
    assert [row["response"]["label"] for row in written] == ["LABEL_2", "LABEL_2"]
    result, written = bulk([{"text": "a"}], "--generate", "--restart", name="topics")
    assert result.exit_code == 4
    assert "not for generation" in written[0]["error"]["message"]


def test_a_resumed_run_keeps_its_version(
    live: LiveServer, engine: FakeEngine, bulk: Bulk, peft_directory: PeftDirectory, tmp_path: Path
) -> None:
    push(live, peft_directory("sentiment"), "sentiment")
    rows = [{"prompt": f"t{index}"} for index in range(6)]
    _, written = bulk(rows, name="sentiment")
    push(live, peft_directory("sentiment", seed=1), "sentiment")
    output = tmp_path / "out.jsonl"
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])
    num_asked = len(engine.requests)
    result, again = bulk(rows, "--json", name="sentiment")
    assert result.exit_code == 0, result.output
    assert again == written
    summary = json.loads(result.stdout)
    assert summary["rows_before"] + len(engine.requests) - num_asked == summary["rows_done"] == 6
    result, _ = bulk(rows, "--json", name="sentiment")
    assert json.loads(result.stdout)["requests"] == 0


@pytest.mark.parametrize("change", ["input", "options", "file"])
def test_an_output_of_another_run_is_refused(bulk: Bulk, tmp_path: Path, change: str) -> None:
    if change == "file":
        (tmp_path / "out.jsonl").write_text("mine\n")
    else:
        bulk([{"prompt": "a"}])
    before = (tmp_path / "out.jsonl").read_text()
    rows = [{"prompt": "b"}] if change == "input" else [{"prompt": "a"}]
    arguments = [] if change == "input" else ["--max-tokens", "1"]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["run", "tiny", str(source), str(tmp_path / "out.jsonl"), *arguments, "--url", "http://127.0.0.1:1"]
    result = CliRunner().invoke(cli, line)
    assert result.exit_code == 1
    assert "--restart" in result.stderr
    assert (tmp_path / "out.jsonl").read_text() == before


def test_a_failed_restart_keeps_the_old_output(bulk: Bulk, tmp_path: Path) -> None:
    bulk([{"prompt": "a"}])
    before = (tmp_path / "out.jsonl").read_bytes()
    result, _ = bulk([{"prompt": "b"}], "--restart", name="missing")
    assert result.exit_code == 3
    assert (tmp_path / "out.jsonl").read_bytes() == before
    result, written = bulk([{"prompt": "a"}], "--json")  # the old output is unchanged
    assert json.loads(result.stdout)["requests"] == 0
    result, written = bulk([{"prompt": "b"}], "--restart")
    assert [row["prompt"] for row in written] == ["b"]


def test_an_input_that_shrinks_during_the_run_is_an_error(bulk: Bulk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "server.client.bulk.job.read_rows", lambda path, *, skip: iter(list(read_rows(path, skip=skip))[:1])
    )
    result, written = bulk([{"prompt": "a"}, {"prompt": "b"}])
    assert result.exit_code == 4
    assert "in.jsonl had 2 rows and was changed during the run" in result.stderr
    assert len(written) == 1


def test_the_concurrency_fits_the_server(engine: FakeEngine, bulk: Bulk) -> None:
    engine.step_seconds = 0.005
    result, _ = bulk([{"prompt": "a"}] * 60, "--json")  # the server has 4 permits and 4 waiting places
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["retries"] == {}


def test_more_errors_than_max_errors_stop_the_run(bulk: Bulk) -> None:
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}, {"prompt": ""}, {"prompt": "c"}]
    result, written = bulk(rows, "--max-errors", "1")
    assert result.exit_code == 4
    assert "more than 1 rows have failed" in result.stderr
    assert len(written) == 3
    result, written = bulk(rows, "--max-errors", "2")
    assert result.exit_code == 4
    assert result.stderr == ""
    assert len(written) == 5


def test_a_permanent_failure_of_one_row_is_its_error(
    engine: FakeEngine, bulk: Bulk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.client.bulk.sender._BACKOFF_SECONDS", 0.001)
    engine.failure = RequestFailedError("the row is cursed")
    result, written = bulk([{"prompt": "a"}])
    assert result.exit_code == 4
    assert written[0]["error"] == {"message": "the row is cursed", "code": "request_failed", "status": 500, "line": 1}


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["none", "{in}", "{out}"], 3, "'none' does not exist"),
        (["Not/There", "{in}", "{out}"], 3, "does not exist"),
        (["tiny", "{in}", "{out}", "--url", "http://127.0.0.1:1"], 7, "cannot be reached"),
        (["tiny", "{in}", "{out}", "--api-key", "é"], 1, "is not allowed in a header"),
        (["tiny", "{in}", "{in}"], 2, "same file"),
        (["tiny", "{in}.no", "{out}"], 1, "in.jsonl.no: No such file"),
        (["tiny", "{in}", "{out}/no"], 1, "No such file"),
        (["tiny", "{in}", "{out}", "--labels", "a,,b"], 2, "a label is empty"),
        (["tiny", "{in}", "{out}", "--labels", "a", "--generate"], 2, "--labels and --generate cannot be combined"),
        (["tiny", "{in}", "{out}", "--options", "{"], 2, "not JSON"),
        (["tiny", "{in}", "{out}", "--options", "[]"], 2, "JSON object"),
        (["tiny", "{in}", "{out}", "--options", "[" * 100_000], 2, "not JSON"),
        (["tiny", "{in}", "{out}", "--options", '{"stop": "\\ud800"}'], 2, "options is not valid UTF-8"),
        (["tiny", "{in}", "{out}", "--labels", "a,\udcff"], 2, "labels is not valid UTF-8"),
        (["\udcff", "{in}", "{out}"], 2, "NAME is not valid UTF-8"),
        (["tiny", "/dev/null", "{out}"], 2, "/dev/null is not a regular file"),
        (["tiny", "{in}", "{out}", "--options", '{"n": 2}'], 2, "n cannot be set by this option"),
    ],
)
def test_a_run_that_cannot_start_prints_the_reason(
    live: LiveServer, tmp_path: Path, arguments: list[str], status: int, reason: str
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    names = {"{in}": str(tmp_path / "in.jsonl"), "{out}": str(tmp_path / "out.jsonl")}
    line = arguments
    for name, path in names.items():
        line = [argument.replace(name, path) for argument in line]
    result = CliRunner().invoke(cli, ["run", *line], env={"PRELUDE_URL": live.url, "COLUMNS": "200"})
    assert result.exit_code == status, result.output
    assert reason in " ".join(result.stderr.replace("│", " ").split())


def test_a_run_ended_by_a_signal_can_be_resumed(
    live: LiveServer, engine: FakeEngine, bulk: Bulk, tmp_path: Path, eventually: WaitUntil
) -> None:
    rows = [{"prompt": f"t{index}"} for index in range(400)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine.step_seconds = 0.005
    output = tmp_path / "out.jsonl"
    command = [*PRELUDE, "run", "tiny", str(tmp_path / "in.jsonl")]
    command += [str(output), "--concurrency", "8", "--rows-per-request", "4", "--json"]
    environment = {**os.environ, "PRELUDE_URL": live.url}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    eventually(lambda: output.exists() and output.read_bytes().count(b"\n") > 8, 20.0)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"stopped by SIGINT; run the same command to resume" in stderr
    summary = json.loads(stdout)
    assert summary["state"] == "interrupted"
    assert 8 < summary["rows_done"] < 400
    assert output.read_bytes().count(b"\n") == summary["rows_done"]
    eventually(lambda: engine.in_flight == 0)
    engine.step_seconds = 0.0
    result, written = bulk(rows)
    assert result.exit_code == 0, result.output
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a,b", ("a", "b")),
        (r"\na, b\tc", ("\na", " b\tc")),
        (r"a\,b,c\\n", ("a,b", r"c\n")),
    ],
)
def test_labels_are_parsed(text: str, labels: tuple[str, str]) -> None:
    assert parse_labels(text) == labels


@pytest.mark.parametrize("text", ["", ",", "a,", "a,a", r"a\x", "a\\"])
def test_bad_labels_are_refused(text: str) -> None:
    import typer

    with pytest.raises(typer.BadParameter):
        parse_labels(text)
