"""``prelude eval`` and ``prelude promote --if-better-than`` against a server over a scripted engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace
from typer.testing import CliRunner, Result

from server.cli import app as cli
from server.datasets import digest
from server.engine.types import GenerateRequest, Logprobs, TokenEvent
from tests.api.classification.test_classify import classifier_parts
from tests.support.api_fixtures import PeftDirectory, UploadParts
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import FakeEngine
from tests.support.live_server import LiveServer

pytestmark = pytest.mark.slow

Data = Callable[..., Path]
Judging = Callable[..., list[str]]
Prelude = Callable[..., Result]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.client.bulk.sender._BACKOFF_SECONDS", 0.001)


@pytest.fixture
def prelude(live: LiveServer) -> Prelude:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, list(arguments), env={"PRELUDE_URL": live.url, "COLUMNS": "200"})

    return invoke


@pytest.fixture
def versions(prelude: Prelude, peft_directory: PeftDirectory) -> None:
    """Two versions of sentiment, of 4 and 5 virtual tokens; latest is the second."""
    for rows in (4, 5):
        directory = peft_directory("sentiment", seed=rows, rows=rows)
        assert prelude("push", str(directory), "--id", "sentiment").exit_code == 0


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """A file of ``n`` texts with two labels, by default ten."""

    def write(count: int = 10) -> Path:
        path = tmp_path / "test.jsonl"
        rows = [{"text": f"t{index}", "label": "good" if index % 2 else "bad"} for index in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def judging(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Judging:
    """``judge({virtual tokens: errors})``: a soft prompt of this size (0: the base) labels the first texts wrong."""

    def judge(wrong: dict[int, int], separator: str = "\n") -> list[str]:
        generate, texts = engine.generate, []

        async def answer(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
            start = request.params.prompt_logprobs_start
            text = bytes(token for token in request.prompt_token_ids[:start] if token < 256).decode()
            label = bytes(request.prompt_token_ids[start:]).decode().removeprefix(separator)
            number = int(text.rstrip("?").rsplit("t", 1)[1])
            rows = request.soft_prompt.num_virtual_tokens if request.soft_prompt else 0
            right = ("good" if number % 2 else "bad") == label
            texts.append(text)
            score = 0.0 if right == (number >= wrong[rows]) else -5.0
            async for event in generate(request):
                yield replace(event, prompt_logprobs=[Logprobs(score, [])])

        monkeypatch.setattr(engine, "generate", answer)
        return texts

    return judge


def test_eval_prints_accuracy_f1_and_confusion(
    prelude: Prelude, versions: None, data: Data, judging: Judging, tmp_path: Path
) -> None:
    judging({5: 3})
    path, png = data(), tmp_path / "matrix.png"
    result = prelude("eval", "sentiment", "--data", str(path), "--json", "--png", str(png))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["object"] == "evaluation"
    assert (report["model"], report["metric"], report["rows"]) == ("sentiment@2", "accuracy", 10)
    assert report["dataset_digest"] == digest(path)
    assert report["accuracy"] == pytest.approx(0.7)
    # t0 and t2 are bad and predicted good, t1 is good and predicted bad.
    assert report["confusion"] == {"labels": ["bad", "good", "(other)"], "counts": [[3, 2, 0], [1, 4, 0]]}
    assert report["labels"]["bad"]["f1"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert report["against"] is report["comparison"] is None
    assert png.read_bytes().startswith(b"\x89PNG")
    text = prelude("eval", "sentiment@2", "--data", str(path)).stdout
    assert "sentiment@2: label, answer" in text
    assert "0.7000" in text


def test_eval_compares_two_versions(prelude: Prelude, versions: None, data: Data, judging: Judging) -> None:
    judging({4: 8, 5: 0})
    arguments = ["eval", "sentiment", "--data", str(data(12)), "--against", "sentiment@1"]
    report = json.loads(prelude(*arguments, "--json").stdout)
    assert (report["accuracy"], report["against"]["accuracy"]) == (1.0, pytest.approx(4 / 12))
    assert report["against"]["model"] == "sentiment@1"
    found = report["comparison"]
    assert (found["only_first"], found["only_second"], found["both_right"], found["both_wrong"]) == (8, 0, 4, 0)
    assert found["p_value"] == pytest.approx(2 / 2**8)
    assert found["interval"][0] > 0
    text = " ".join(prelude(*arguments).stdout.split())
    assert "p = 0.00781" in text
    assert "sentiment@2 minus sentiment@1: +0.6667" in text


@pytest.mark.parametrize(
    ("options", "name", "begin"),
    [
        (["--against-base"], "tiny", "t"),
        (["--text-prompt", "Rate: "], "tiny with a text prompt", "Rate: t"),
        (["--text-prompt", "Is {}?"], "tiny with a text prompt", "Is t"),
    ],
)
def test_eval_compares_with_the_bare_model_and_a_text_prompt(
    prelude: Prelude, versions: None, data: Data, judging: Judging, options: list[str], name: str, begin: str
) -> None:
    texts = judging({5: 0, 0: 10})
    report = json.loads(prelude("eval", "sentiment", "--data", str(data()), *options, "--json").stdout)
    assert (report["against"]["model"], report["against"]["accuracy"]) == (name, 0.0)
    assert texts[-1].startswith(begin)


def test_the_separator_is_the_one_of_the_training(
    prelude: Prelude, peft_directory: PeftDirectory, data: Data, judging: Judging
) -> None:
    metadata = json.dumps({"training": {"settings": {"separator": " = "}}})
    prelude("push", str(peft_directory("trained", rows=4)), "--id", "trained", "--metadata", metadata)
    judging({4: 0}, separator=" = ")
    assert json.loads(prelude("eval", "trained", "--data", str(data()), "--json").stdout)["accuracy"] == 1.0
    arguments = ["eval", "trained", "--data", str(data()), "--json", "--separator", "|"]
    assert json.loads(prelude(*arguments).stdout)["accuracy"] < 1.0


def test_a_head_is_requested_without_labels(prelude: Prelude, live: LiveServer, tmp_path: Path) -> None:
    parts = classifier_parts(metadata=json.dumps({"labels": ["x", "y", "z"]}))
    httpx.post(f"{live.url}/v1/prompts", **parts).raise_for_status()
    path = tmp_path / "test.jsonl"
    path.write_text('{"text": "a", "label": "z"}\n{"text": "b", "label": "x"}\n')
    report = json.loads(prelude("eval", "topics", "--data", str(path), "--json").stdout)
    assert report["confusion"]["counts"] == [[0, 1, 0], [0, 1, 0]]  # the labels are x and z; both predictions are z
    refused = prelude("eval", "topics", "--data", str(path), "--generate")
    assert refused.exit_code == 2
    assert "has a classification head, and does not generate" in " ".join(refused.stderr.replace("│", " ").split())


def test_completions_and_conversations_are_scored_by_exact_match(
    prelude: Prelude, engine: FakeEngine, tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"prompt": "a", "completion": " hello world"}\n{"prompt": "b", "completion": "hello"}\n')
    report = json.loads(prelude("eval", "tiny", "--data", str(path), "--json").stdout)
    assert (report["metric"], report["accuracy"]) == ("exact_match", 0.5)
    assert "labels" not in report
    assert engine.requests[0].params.temperature == 0.0
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path.write_text(json.dumps({"messages": turns}))
    arguments = ["eval", "tiny", "--data", str(path), "--max-tokens", "5", "--text-prompt", "Be brief.", "--json"]
    report = json.loads(prelude(*arguments).stdout)
    assert (report["accuracy"], report["against"]["accuracy"]) == (1.0, 1.0)
    assert tokenizer.turns == [{"role": "system", "content": "Be brief."}, turns[0]]
    arguments = ["eval", "tiny", "--data", str(path), "--stop", "lo", "--json"]
    assert json.loads(prelude(*arguments).stdout)["accuracy"] == 0.0


def test_tasks_are_sent_only_to_multitask_prompts(
    prelude: Prelude, live: LiveServer, engine: FakeEngine, other_parts: UploadParts, tmp_path: Path
) -> None:
    httpx.post(f"{live.url}/v1/prompts", **other_parts("many")).raise_for_status()
    path = tmp_path / "test.jsonl"
    path.write_text('{"text": "a", "label": "z", "task_id": 2}\n')
    result = prelude("eval", "many", "--data", str(path), "--against-base")
    assert result.exit_code == 0, result.output
    assert [request.soft_prompt and request.soft_prompt.task_id for request in engine.requests] == [2, None]


@pytest.mark.parametrize(("mode", "sentence"), [([], "vote"), (["--ensemble", "mean"], "mean")])
def test_an_ensemble_is_scored_as_one_model(
    prelude: Prelude,
    versions: None,
    peft_directory: PeftDirectory,
    data: Data,
    judging: Judging,
    mode: list[str],
    sentence: str,
) -> None:
    prelude("push", str(peft_directory("third", rows=6)), "--id", "third")
    judging({4: 6, 5: 2, 6: 2})
    members = "sentiment@1,sentiment@2,third"
    arguments = ["eval", members, "--data", str(data()), "--against", "sentiment@1", *mode, "--json"]
    result = prelude(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model"] == f"sentiment@1, sentiment@2, third@1 ({sentence})"
    assert (report["accuracy"], report["against"]["accuracy"]) == (pytest.approx(0.8), pytest.approx(0.4))


def test_the_members_of_an_ensemble_need_one_separator(
    prelude: Prelude, versions: None, peft_directory: PeftDirectory, data: Data, judging: Judging
) -> None:
    for name, separator, rows in (("first", " = ", 6), ("second", "|", 7)):
        metadata = json.dumps({"training": {"settings": {"separator": separator}}})
        prelude("push", str(peft_directory(name, rows=rows)), "--id", name, "--metadata", metadata)
    result = prelude("eval", "first,second", "--data", str(data()))
    assert result.exit_code == 2
    assert "trained with other separators" in " ".join(result.stderr.replace("│", " ").split())
    judging({6: 0, 7: 0}, separator=" = ")
    arguments = ["eval", "first,second", "--data", str(data()), "--separator", " = ", "--json"]
    assert json.loads(prelude(*arguments).stdout)["accuracy"] == 1.0


def test_generated_answers_are_scored_as_labels(
    prelude: Prelude, versions: None, engine: FakeEngine, data: Data
) -> None:
    path = data(4)
    arguments = ["eval", "sentiment", "--data", str(path), "--generate", "--max-tokens", "9", "--json"]
    engine.reply = "\ngood "
    report = json.loads(prelude(*arguments).stdout)
    assert report["metric"] == "accuracy"
    assert report["confusion"] == {"labels": ["bad", "good", "(other)"], "counts": [[0, 2, 0], [0, 2, 0]]}
    assert {request.params.max_tokens for request in engine.requests} == {9}
    assert all(not request.params.classify and not request.params.prompt_logprobs for request in engine.requests)
    engine.reply = "\ngood enough"
    assert json.loads(prelude(*arguments).stdout)["confusion"]["counts"] == [[0, 0, 2], [0, 0, 2]]


def test_a_row_without_an_answer_is_wrong_and_reported(prelude: Prelude, tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"text": "x" * 300, "label": "a"}) + '\n{"text": "t", "label": "a"}\n')
    result = prelude("eval", "tiny", "--data", str(path), "--json")
    assert result.exit_code == 4
    report = json.loads(result.stdout)
    assert (report["errors"], report["accuracy"]) == (1, 0.5)
    assert report["confusion"]["counts"] == [[1, 1]]
    assert "line 1: input: the model's context is 256 tokens" in prelude("eval", "tiny", "--data", str(path)).stdout


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["eval", "tiny", "--data", "{bad}"], 4, "{bad}:2: has no 'label'"),
        (["eval", "tiny", "--data", "{data}.no"], 4, "{data}.no: cannot be read: No such file"),
        (["eval", "none", "--data", "{data}"], 3, "does not exist"),
        (["eval", "tiny", "--data", "{data}", "--against", "none"], 3, "does not exist"),
        (["eval", "tiny", "--data", "{data}", "--against-base", "--text-prompt", "x"], 2, "one of --against"),
        (["eval", "tiny", "--data", "{data}", "--url", "http://127.0.0.1:1"], 7, "cannot be reached"),
        (["eval", "tiny", "--data", "{texts}", "--png", "{data}.png"], 1, "needs data with labels"),
        (["eval", "tiny", "--data", "{data}", "--stop", "\udcff"], 2, "stop is not valid UTF-8"),
        (["eval", "tiny,sentiment", "--data", "{data}", "--adapter", "x"], 2, "--adapter cannot be combined"),
        (["eval", "tiny,sentiment", "--data", "{chats}"], 2, "an ensemble answers texts, not conversations"),
        (["eval", "tiny", "--data", "{data}", "--ensemble", "vote"], 2, "--ensemble needs several names"),
        (["eval", "tiny", "--data", "{texts}", "--generate"], 2, "--generate needs data with labels"),
        (["promote", "sentiment", "1", "--if-better-than", "latest"], 2, "must be given together"),
        (["promote", "sentiment", "1", "--data", "{data}"], 2, "must be given together"),
        (["promote", "sentiment", "1", "--significant", "0.05"], 2, "--significant needs"),
        (["promote", "sentiment", "1", "--if-better-than", "Bad", "--data", "{data}"], 2, "Bad"),
        (["promote", "sentiment", "1", "--if-better-than", "gone", "--data", "{data}"], 3, "gone"),
        (["promote", "none", "1", "--if-better-than", "latest", "--data", "{data}"], 3, "none"),
        (["promote", "sentiment", "1", "--if-better-than", "latest", "--data", "{bad}"], 4, "has no 'label'"),
    ],
)
def test_bad_arguments_and_data_are_refused(
    prelude: Prelude, versions: None, data: Data, tmp_path: Path, arguments: list[str], status: int, reason: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "a"}\n')
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    names = {f"{{{name}}}": str(tmp_path / f"{name}.jsonl") for name in ("bad", "texts", "chats")}
    names["{data}"] = str(data())

    def filled(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, path)
        return text

    result = prelude(*map(filled, arguments))
    assert result.exit_code == status, result.output
    assert filled(reason) in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


def test_an_unwritable_picture_does_not_lose_the_scores(prelude: Prelude, versions: None, data: Data) -> None:
    path = data()
    result = prelude("eval", "tiny", "--data", str(path), "--png", f"{path}/x.png", "--json")
    assert result.exit_code == 1
    assert "Not a directory" in result.stderr
    assert json.loads(result.stdout)["object"] == "evaluation"


def test_a_picture_needs_matplotlib(
    prelude: Prelude, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.client.evaluation.report.find_spec", lambda _: None)
    result = prelude("eval", "tiny", "--data", str(data()), "--png", str(tmp_path / "x.png"), "--json")
    assert result.exit_code == 1
    assert "--png needs matplotlib" in json.loads(result.stdout)["error"]["message"]


def aliases(live: LiveServer) -> Any:
    return httpx.get(f"{live.url}/v1/prompts/sentiment").json()["aliases"]


def test_a_better_version_is_promoted(
    prelude: Prelude, live: LiveServer, versions: None, data: Data, judging: Judging
) -> None:
    judging({4: 0, 5: 4})
    arguments = ["promote", "sentiment", "1", "--if-better-than", "latest", "--data", str(data())]
    result = prelude(*arguments, "--reason", "measured")
    assert (result.exit_code, result.stdout) == (0, "sentiment@latest is version 1\n"), result.output
    assert aliases(live) == {"latest": 1}
    history = httpx.get(f"{live.url}/v1/prompts/sentiment/history").json()["data"]
    assert history[0]["reason"] == "measured"


def test_a_better_version_with_significance_and_json(
    prelude: Prelude, live: LiveServer, versions: None, data: Data, judging: Judging
) -> None:
    judging({4: 0, 5: 8})
    arguments = ["promote", "sentiment", "1", "--alias", "stable", "--if-better-than", "2", "--data", str(data())]
    result = prelude(*arguments, "--significant", "0.01", "--json")
    reply = json.loads(result.stdout)
    assert (reply["alias"], reply["version"]) == ("stable", 1)
    assert reply["evaluation"]["comparison"]["p_value"] == pytest.approx(2 / 2**8)
    assert aliases(live) == {"latest": 2, "stable": 1}


@pytest.mark.parametrize(
    ("wrong", "options", "reason"),
    [
        ({4: 4, 5: 4}, [], "accuracy 0.6000 for sentiment@1 against 0.6000 for sentiment@2 on 10 rows is not better"),
        ({4: 4, 5: 0}, [], "is not better"),
        ({4: 0, 5: 3}, ["--significant", "0.05"], "is not significant: McNemar's p-value is 0.25, not below 0.05"),
    ],
)
def test_a_version_that_is_not_better_is_not_promoted(
    prelude: Prelude,
    live: LiveServer,
    versions: None,
    data: Data,
    judging: Judging,
    wrong: dict[int, int],
    options: list[Any],
    reason: str,
) -> None:
    judging(wrong)
    arguments = ["promote", "sentiment", "1", "--if-better-than", "latest", "--data", str(data()), *options]
    result = prelude(*arguments)
    assert result.exit_code == 1
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
    report = json.loads(prelude(*arguments, "--json").stdout)
    assert report["error"]["code"] == "not_better"
    assert report["evaluation"]["rows"] == 10
    assert aliases(live) == {"latest": 2}


def test_a_version_is_not_compared_with_itself(prelude: Prelude, versions: None, data: Data) -> None:
    result = prelude("promote", "sentiment", "2", "--if-better-than", "latest", "--data", str(data()))
    assert result.exit_code == 1
    assert "sentiment@latest is already version 2" in result.stderr


def test_with_unanswered_rows_no_version_is_promoted(prelude: Prelude, versions: None, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "x" * 300, "label": "a"}) + "\n")
    result = prelude("promote", "sentiment", "1", "--if-better-than", "latest", "--data", str(path))
    assert result.exit_code == 1
    assert "2 rows have no answer (line 1: input: the model's context" in result.stderr


def test_an_alias_that_moves_during_the_evaluation_is_a_conflict(
    prelude: Prelude,
    live: LiveServer,
    versions: None,
    data: Data,
    judging: Judging,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judging({4: 0, 5: 8})
    generate = engine.generate
    url = f"{live.url}/v1/prompts/sentiment/aliases/latest"

    async def answer(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        if not moved:
            moved.append(request)
            async with httpx.AsyncClient() as client:
                (await client.put(url, json={"version": 1})).raise_for_status()
        async for event in generate(request):
            yield event

    moved: list[GenerateRequest] = []
    monkeypatch.setattr(engine, "generate", answer)
    result = prelude("promote", "sentiment", "1", "--if-better-than", "2", "--data", str(data()))
    assert result.exit_code == 5, result.output
    assert moved
