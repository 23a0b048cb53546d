"""Publishing to a real server of the tiny model: the golden check, the records and the refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from server.client.commands import ExitStatus
from server.client.http import PreludeClient
from server.datasets import digest
from server.training import publish
from server.training.encoding import Encoded, Encoder
from server.training.errors import GoldenCheckError, SettingsError, TrainingError
from server.training.peft_methods import make_peft_model
from server.training.publish import Difference, Publisher
from server.training.run_directory import RunDirectory
from server.training.scoring import text_logprobs
from server.training.settings import Method
from tests.support.serving import BASE, serving
from tests.training.conftest import MakeSettings, Prelude, make_model, rows, write_rows
from tests.training.test_lora import randomised

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server of the tiny model, shared by this module's tests."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "--dtype", "float32", "--api-keys", "writer", model=tiny) as (client, _):
        client.headers["authorization"] = "Bearer writer"
        yield client


@pytest.fixture
def push(server: httpx.Client, prelude_train: Prelude, monkeypatch: pytest.MonkeyPatch) -> Prelude:
    monkeypatch.setenv("PRELUDE_URL", str(server.base_url))
    monkeypatch.setenv("PRELUDE_API_KEY", "writer")
    return lambda *arguments, **options: prelude_train("--push", *arguments, **options)


def served_tokens(server: httpx.Client, model: str, prompt: str, **more: Any) -> list[int]:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 6, "return_token_ids": True, **more}
    answer = server.post("/v1/completions", json=body).raise_for_status().json()
    token_ids: list[int] = answer["choices"][0]["token_ids"]
    return token_ids


def peft_tokens(model: Any, tokenizer: Any, prompt: str, **more: Any) -> list[int]:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    new = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=1, **more)
    token_ids: list[int] = new[0, ids.shape[1] :].tolist()
    return token_ids


@pytest.mark.parametrize("method", Method)
def test_a_published_soft_prompt_gives_pefts_tokens(
    push: Prelude, server: httpx.Client, method: Method, tmp_path: Path, base: Any, tokenizer: Any
) -> None:
    name, arguments = method.replace("_", "-"), ["--method", method]
    if method is Method.MULTITASK:
        tasks = write_rows(tmp_path / "tasks.jsonl", rows(12, task_id=0) + rows(12, task_id=1))
        arguments += ["--data", str(tasks)]
    result = push(*arguments, "--id", name, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (
        report["published"]["id"],
        report["published"]["version"],
        report["published"]["alias"],
    ) == (
        name,
        1,
        "candidate",
    )

    task = {"task_id": 1} if method is Method.MULTITASK else {}
    of_peft = {"task_ids": torch.tensor([1])} if task else {}
    model = PeftModel.from_pretrained(base, report["adapter"])
    for prompt in ("call number 3 please", "great"):
        assert served_tokens(server, f"{name}@candidate", prompt, **task) == peft_tokens(
            model, tokenizer, prompt, **of_peft
        )


@pytest.fixture(scope="module")
def tone(server: httpx.Client, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights on the server, ``tone@1``; returns its files."""
    folder = tmp_path_factory.mktemp("tone")
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj", "lm_head"], task_type=TaskType.CAUSAL_LM)
    randomised(get_peft_model(base, config)).save_pretrained(str(folder), save_embedding_layers=False)
    with PreludeClient(str(server.base_url), api_key="writer") as client:
        client.push(folder, name="tone", allow_other_base=True)
    return folder


@pytest.mark.parametrize("method", [Method.PROMPT_TUNING, Method.P_TUNING_V2])
def test_a_soft_prompt_over_an_adapter_gives_pefts_tokens_over_the_merged_model(
    push: Prelude, server: httpx.Client, method: Method, base: Any, tokenizer: Any, tone: Path
) -> None:
    name = f"over-{method.replace('_', '-')}"
    result = push("--method", method, "--id", name, "--over", "tone", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)

    version = server.get(f"/v1/prompts/{name}/versions/1").json()
    assert version["over"] == report["over"] == "tone@1"
    check = version["metadata"]["golden_check"]
    assert check["is_passed"]
    assert check["largest_difference"] < 1e-3
    merged: Any = PeftModel.from_pretrained(base, str(tone)).merge_and_unload()  # the head is not tied
    model = PeftModel.from_pretrained(merged, report["adapter"])
    for prompt in ("call number 3 please", "great"):
        assert served_tokens(server, f"{name}@candidate", prompt) == peft_tokens(model, tokenizer, prompt)


def test_only_an_adapter_of_the_server_can_be_below(push: Prelude, tmp_path: Path, untrained: None) -> None:
    missing = push("--id", "above", "--over", "none@1")
    assert missing.exit_code == ExitStatus.NOT_FOUND
    assert "none" in missing.stderr
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_the_server_refuses_is_an_error_before_training(
    push: Prelude, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.training.run.SoftPromptTrainer", lambda *_, **__: pytest.fail("training began"))
    result = push("--id", "huge", "--method", "lora", "--rank", "300")

    assert result.exit_code == ExitStatus.INVALID
    assert "rank_too_large" in result.stderr


def test_lineage_and_the_check_are_in_the_catalog(
    push: Prelude, server: httpx.Client, data: Path, tmp_path: Path
) -> None:
    result = push("--id", "lineage", "--description", "Find the word.", "--alias", "canary")
    assert result.exit_code == 0, result.output
    assert "nats from PEFT" in result.stdout

    version = server.get("/v1/prompts/lineage/versions/1").json()
    report = json.loads((tmp_path / "run" / "result.json").read_text())
    assert version["description"] == "Find the word."
    assert version["base_model_name_or_path"] == BASE
    assert version["lineage"]["dataset_digest"] == f"sha256:{digest(data)}"
    assert version["lineage"]["training_run"] == "run"
    assert version["lineage"]["scores"]["accuracy"] == report["scores"]["trained"]["accuracy"]
    assert version["lineage"]["scores"]["bare_loss"] == pytest.approx(report["scores"]["bare"]["loss"])
    stated = json.loads((tmp_path / "run" / "adapter" / "prompt_format.json").read_text())
    assert version["format"] == stated == report["format"]
    assert (stated["type"], stated["separator"], stated["sampling"]["temperature"]) == ("raw", "\n", 0.0)
    check = version["metadata"]["golden_check"]
    assert check["is_passed"]
    assert check["largest_difference"] < check["tolerance"] == 1e-3
    assert check["digest"] == version["digest"]
    assert check["tokens"] > 10
    training = version["metadata"]["training"]
    assert training["settings"]["method"] == "prompt_tuning"
    assert training["init_text"] == "Find the word."
    assert {"peft", "torch"} <= training["versions"].keys()
    assert str(tmp_path) not in json.dumps(version)
    assert version["metadata"]["labels"] == ["call", "delivery", "great", "support"]
    names = [prompt["id"] for prompt in server.get("/v1/prompts?limit=100").json()["data"]]
    assert not any("golden" in name for name in names)
    assert server.get("/v1/prompts/lineage").json()["aliases"].get("canary") == 1
    (run,) = server.get("/v1/runs?prompt_id=lineage").json()["data"]
    assert (run["status"], run["version"], run["alias"], run["step"]) == ("completed", 1, "canary", report["steps"])
    assert run["golden_check"] == check
    assert run["scores"] == report["scores"]
    assert str(tmp_path) not in json.dumps({key: run[key] for key in run if key != "base_model"} | {"settings": {}})
    points = server.get(f"/v1/runs/{run['id']}/metrics").json()["data"]
    assert [point["step"] for point in points] == list(range(1, report["steps"] + 1))
    assert "eval_accuracy" in points[-1]["values"]


def test_a_long_initial_text_is_truncated_and_many_labels_are_not_recorded(
    push: Prelude, server: httpx.Client, tmp_path: Path
) -> None:
    many = [{"text": f"number {place}", "label": f"{place}" + "x" * 50} for place in range(400)]
    result = push(
        "--id", "many", "--data", str(write_rows(tmp_path / "m.jsonl", many)), "--init-text", "one " * 30000
    )

    assert result.exit_code == 0, result.output
    metadata = server.get("/v1/prompts/many/versions/1").json()["metadata"]
    assert len(metadata["training"]["init_text"]) == 1003
    assert "labels" not in metadata


def test_a_failing_check_publishes_nothing_and_gives_the_difference(
    push: Prelude, server: httpx.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = text_logprobs

    def off(model: PreTrainedModel | PeftModel, example: Encoded) -> list[float]:
        return [value + 0.5 * isinstance(model, PeftModel) for value in own(model, example)]

    monkeypatch.setattr(publish, "text_logprobs", off)
    result = push("--id", "failing")

    assert result.exit_code == ExitStatus.FAILED
    assert "the log-probability of a token differs from PEFT's by 0.5 nats" in result.stderr
    assert server.get("/v1/prompts/failing").status_code == 404
    assert not json.loads((tmp_path / "run" / "golden_check.json").read_text())["is_passed"]
    (run,) = server.get("/v1/runs?prompt_id=failing").json()["data"]
    assert (run["status"], run["version"], run["golden_check"]["is_passed"]) == ("failed", None, False)
    assert "golden check failed" in run["error"]
    names = [prompt["id"] for prompt in server.get("/v1/prompts?limit=100").json()["data"]]
    assert not any("golden" in name for name in names)

    monkeypatch.setattr(publish, "text_logprobs", own)
    again = push("--id", "failing", "--resume")
    assert again.exit_code == 0, again.output
    assert "contains a completed training" in again.stderr
    assert server.get("/v1/prompts/failing").status_code == 200
    (again_run,) = server.get("/v1/runs?prompt_id=failing").json()["data"]
    assert (again_run["id"], again_run["status"], again_run["version"]) == (run["id"], "completed", 1)
    assert again_run["error"] is None


def test_a_wider_tolerance_can_be_configured(push: Prelude, monkeypatch: pytest.MonkeyPatch) -> None:
    own = text_logprobs

    def off(model: PreTrainedModel | PeftModel, example: Encoded) -> list[float]:
        return [value + 0.5 * isinstance(model, PeftModel) for value in own(model, example)]

    monkeypatch.setattr(publish, "text_logprobs", off)
    result = push("--id", "tolerant", "--golden-tolerance", "0.6", "--json")

    assert json.loads(result.stdout)["published"]["golden_check"]["largest_difference"] == pytest.approx(
        0.5, abs=1e-3
    )


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts to train."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("server.training.run.make_peft_model", refuse)


def test_a_server_with_other_weights_is_an_error_before_training(
    push: Prelude, tmp_path: Path, untrained: None
) -> None:
    other = make_model(tmp_path / "tiny", seed=1)
    result = push("--id", "weights", model=str(other))

    assert result.exit_code == ExitStatus.FAILED
    assert "whose weights differ from those of" in result.stderr
    assert "nats on average" in result.stderr.replace("\n", " ")


def test_a_server_with_another_tokenizer_is_an_error_before_a_model_loads(
    push: Prelude, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, untrained: None
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["number"])
    tokenizer.save_pretrained(other)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    result = push("--id", "tokens", model=str(other))

    assert result.exit_code == ExitStatus.FAILED
    assert "which is a different model from" in result.stderr


def test_an_unreachable_server_is_an_error_before_a_model_loads(
    prelude_train: Prelude, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    result = prelude_train("--push", "--url", "http://127.0.0.1:9")

    assert result.exit_code == ExitStatus.UNAVAILABLE
    assert "http://127.0.0.1:9 cannot be reached" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_key_without_the_scope_and_the_bases_name_are_refused_first(push: Prelude, untrained: None) -> None:
    assert push("--id", "key", "--api-key", "wrong").exit_code == ExitStatus.NOT_AUTHORISED
    result = push("--id", BASE)
    assert result.exit_code == ExitStatus.USAGE
    assert "is the name of the server's base model" in result.stderr


def test_a_text_over_the_servers_context_is_an_error_before_a_model_loads(
    push: Prelude, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    write_rows(data, [*rows(3), {"text": "call " * 60, "label": "call"}])
    own = PreludeClient.models
    monkeypatch.setattr(PreludeClient, "models", lambda self: [{**model, "max_model_len": 48} for model in own(self)])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    result = push("--id", "short")

    assert result.exit_code == ExitStatus.INVALID
    assert f"{data}:4: " in result.stderr
    assert "at most 44 fit: the context has 48 tokens" in result.stderr


def test_a_soft_prompt_for_conversations_is_published(push: Prelude, server: httpx.Client, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}
        for row in rows(12)
    ]
    result = push("--id", "chats", "--data", str(write_rows(tmp_path / "chats.jsonl", chats)))

    assert result.exit_code == 0, result.output
    assert server.get("/v1/prompts/chats/versions/1").json()["metadata"]["golden_check"]["is_passed"]


def test_the_output_of_a_plain_peft_script_is_served_unchanged(
    server: httpx.Client, tiny: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The script follows PEFT's documentation: get_peft_model, transformers' Trainer, save_pretrained."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = get_peft_model(base, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=6))
    texts = [tokenizer(f"{row['text']}\n{row['label']}") for row in rows(16)]
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=3e-2,
            use_cpu=True,
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=texts,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ).train()
    model.save_pretrained(str(tmp_path / "saved"))

    with PreludeClient(str(server.base_url), api_key="writer") as client:
        _, is_new = client.push(tmp_path / "saved", name="plain")
    assert is_new
    served = server.get("/v1/prompts/plain/versions/1/files/adapter_model.safetensors").content
    assert served == (tmp_path / "saved" / "adapter_model.safetensors").read_bytes()
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(tmp_path / "saved"))
    for prompt in ("call number 3 please", "delivery"):
        assert served_tokens(server, "plain", prompt) == peft_tokens(own, tokenizer, prompt)


# Without a server

NOTHING: Any = SimpleNamespace()


@pytest.mark.parametrize(
    ("noise", "given", "tolerances"),
    [
        (1e-5, None, (1e-3, None)),
        (1e-3, None, (1e-3, None)),
        (0.05, None, (0.2, 0.02)),
        (0.05, 0.01, (0.01, None)),
        (1e-5, 0.0, (0.0, None)),
    ],
)
def test_the_tolerance_follows_the_servers_rounding(
    settings: MakeSettings, noise: float, given: float | None, tolerances: tuple[Any, ...]
) -> None:
    publisher = Publisher(NOTHING, settings(golden_tolerance=given), NOTHING)

    assert publisher.tolerances(Difference(noise, noise / 10, 9)) == pytest.approx(tolerances)


def test_the_mean_difference_of_a_rounding_server_is_checked(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client: Any = SimpleNamespace(
        push=lambda *_, **__: ({"version": 1, "digest": "d"}, True),
        remove=lambda name, *, force: None,
        complete=lambda body: {"choices": [{"logprobs": {"token_logprobs": [None, -2.0, -3.5]}}]},
    )
    monkeypatch.setattr(publish, "text_logprobs", lambda model, example: [-2.1, -3.6])
    monkeypatch.setattr(publish, "_rounding", lambda *_: Difference(0.05, 0.01, 2))
    publisher = Publisher(client, settings(), RunDirectory(tmp_path))
    publisher._noise = Difference(0.04, 0.02, 2)

    with pytest.raises(GoldenCheckError, match=r"0.1 nats; the tolerance is 0.2; the mean difference is 0.1, its"):
        publisher.publish(None, [Encoded([1, 2], [0])], {})


def test_the_rounding_is_measured_with_the_soft_prompt(settings: MakeSettings, base: Any, tokenizer: Any) -> None:
    examples = [Encoded([31, 32, 33], [34, 0])]
    model: Any = make_peft_model(base, tokenizer, settings(), text="Route", context=[], num_tasks=1)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight *= 20
    reference = [text_logprobs(model, example) for example in examples]

    rounding = publish._rounding(model, examples, reference)

    assert 1e-3 < rounding.mean < rounding.largest < 5.0
    assert model.prompt_encoder["default"].embedding.weight.dtype == torch.bfloat16


def test_a_rounding_server_gets_a_larger_tolerance(tiny: Path, prelude_train: Prelude, tmp_path: Path) -> None:
    with serving(tmp_path / "server", "--dtype", "bfloat16", model=tiny) as (client, _):
        result = prelude_train("--push", "--url", str(client.base_url), "--json")

    check = json.loads(result.stdout)["published"]["golden_check"]
    assert 1e-3 < check["largest_difference"] < check["tolerance"] < 1.0


def test_not_a_number_counts_as_different_weights(
    settings: MakeSettings, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher(NOTHING, settings(), NOTHING)
    monkeypatch.setattr(publisher, "_difference", lambda *_: Difference(float("nan"), float("nan"), 3))

    with pytest.raises(TrainingError, match="weights differ"):
        publisher.check_base(base, [])


def test_a_bad_alias_is_refused(settings: MakeSettings, encoder: Encoder) -> None:
    publisher = Publisher(NOTHING, settings(alias="7"), NOTHING)

    with pytest.raises(SettingsError, match="alias"):
        publisher.check_server(encoder, [])


def test_the_staging_name_depends_on_the_run_directory(settings: MakeSettings) -> None:
    publishers = [Publisher(NOTHING, settings(name="n" * 128, run_dir=Path(run)), NOTHING) for run in ("a", "a", "b")]
    names = [publisher._staging for publisher in publishers]

    assert all(len(name) == 128 and ".golden-check-" in name for name in names)
    assert names[0] == names[1] != names[2]


def test_a_staging_name_with_versions_of_a_killed_run_is_removed(settings: MakeSettings) -> None:
    removed: list[tuple[str, bool]] = []
    client: Any = SimpleNamespace(remove=lambda name, *, force: removed.append((name, force)))
    publisher = Publisher(client, settings(), NOTHING)
    publisher._unstage()
    assert removed == [(publisher._staging, True)]


def test_the_error_has_the_difference_and_the_tolerance(
    settings: MakeSettings, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path)
    client: Any = SimpleNamespace(
        push=lambda *_, **__: ({"version": 1, "digest": "d"}, True),
        remove=lambda name, *, force: None,
        complete=lambda body: {"choices": [{"logprobs": {"token_logprobs": [None, -2.0, -3.5]}}]},
    )
    monkeypatch.setattr(publish, "text_logprobs", lambda model, example: [-2.25, -3.5])
    publisher = Publisher(client, settings(), directory)

    with pytest.raises(GoldenCheckError) as caught:
        publisher.publish(None, [Encoded([1, 2], [0])], {})

    assert (caught.value.difference, caught.value.tolerance) == (0.25, 1e-3)
