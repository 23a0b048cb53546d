"""Classification heads: trained over the labels, saved for plain PEFT, and published with the golden check."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from server.client.commands import ExitStatus
from server.training import publish
from server.training.encoding import Encoded, Encoder
from server.training.heads.classifier import class_logits, load_classifier, text_class_logits
from server.training.heads.scoring import class_loss, collate_classes, score_classes
from server.training.peft_methods import make_peft_model, restore, state_of
from server.training.settings import Method, Task
from tests.support.serving import serving
from tests.training.conftest import WORDS, MakeSettings, Prelude, Trained, rows, write_rows

pytestmark = pytest.mark.slow

HEADS = [method for method in Method if method.can_have_head]
LABELS = tuple(sorted(WORDS))
EXAMPLES = [
    Encoded([31, 32, 33], [], class_id=0),
    Encoded([41, 42, 43, 44, 45, 1, 46], [], class_id=3),  # with the id that pads
    Encoded([51], [], class_id=1),
]


def plain_base(tiny: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=len(LABELS), dtype=torch.float32)


@pytest.mark.parametrize("method", HEADS)
def test_logits_of_padded_rows_equal_plain_pefts_one_by_one(
    tiny: Path, tokenizer: Any, settings: MakeSettings, method: Method
) -> None:
    torch.manual_seed(0)
    base = load_classifier(str(tiny), None, labels=LABELS, dtype=torch.float32, pad_id=1)
    made = settings(method=method, task_type=Task.SEQ_CLS)
    model = make_peft_model(base, tokenizer, made, text="Route this", context=[], num_tasks=2).eval()
    examples = EXAMPLES
    if method is Method.MULTITASK:
        examples = [Encoded(one.prompt_ids, [], place % 2, one.class_id) for place, one in enumerate(EXAMPLES)]
    batch = collate_classes(examples, 1)
    del batch["labels"]

    logits = class_logits(model, batch)

    alone = torch.tensor([text_class_logits(model, example) for example in examples])
    # The head at the last position, as transformers reads it for one row, whatever the ids are.
    ends = [
        class_logits(model, {k: v for k, v in collate_classes([x], 1).items() if k != "labels"}) for x in examples
    ]
    torch.testing.assert_close(logits, torch.cat(ends), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)


def test_the_loss_is_divided_by_the_texts_of_all_accumulated_batches(
    tiny: Path, tokenizer: Any, settings: MakeSettings
) -> None:
    torch.manual_seed(0)
    base = load_classifier(str(tiny), None, labels=LABELS, dtype=torch.float32, pad_id=1)
    model = make_peft_model(
        base, tokenizer, settings(task_type=Task.SEQ_CLS), text="Route this", context=[], num_tasks=1
    ).eval()
    with torch.no_grad():
        mean, logits = class_loss(model, collate_classes(EXAMPLES, 1))
        half, _ = class_loss(model, collate_classes(EXAMPLES, 1), 6)

    assert float(mean) == pytest.approx(2 * float(half), rel=1e-6)
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3, 1]))
    assert float(mean) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("method", HEADS)
def test_a_state_restores_the_head_too(tiny: Path, tokenizer: Any, settings: MakeSettings, method: Method) -> None:
    made = settings(method=method, task_type=Task.SEQ_CLS)

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        base = load_classifier(str(tiny), None, labels=LABELS, dtype=torch.float32, pad_id=1)
        return make_peft_model(base, tokenizer, made, text="Route this", context=[], num_tasks=2).eval()

    first, second = build(0), build(1)
    batch = collate_classes([Encoded(x.prompt_ids, [], 0, x.class_id) for x in EXAMPLES], 1)
    if method is not Method.MULTITASK:
        del batch["task_ids"]
    del batch["labels"]
    want = class_logits(first, batch)
    assert not torch.allclose(class_logits(second, batch), want)
    restore(second, state_of(first))
    torch.testing.assert_close(class_logits(second, batch), want)


def test_a_head_is_trained_and_plain_peft_has_its_score(
    tiny: Path, settings: MakeSettings, trained: Trained, tmp_path: Path, tokenizer: Any
) -> None:
    held_out = write_rows(tmp_path / "eval.jsonl", rows(8))
    changes = {"max_steps": 40, "eval_steps": 10, "method": Method.P_TUNING_V2, "learning_rate": 1e-2}
    result = trained(settings(task_type=Task.SEQ_CLS, eval_data=held_out, **changes))

    scores = result["scores"]
    assert scores["trained"]["accuracy"] == 1.0
    assert scores["untrained"]["accuracy"] < 1.0
    assert "bare" not in scores
    folder = Path(result["adapter"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config.get("modules_to_save") in (None, ["classifier", "score"])
    assert load_file(folder / "adapter_model.safetensors")["base_model.score.weight"].shape == (4, 32)
    assert json.loads((folder / "prompt_format.json").read_text()) == {"type": "raw"}
    model = PeftModel.from_pretrained(plain_base(tiny), str(folder)).eval()
    encoder = Encoder(tokenizer, (0,), "\n", LABELS)
    examples = [encoder.encode(example) for example in _examples(held_out)]
    assert score_classes(model, examples, batch_size=3, pad_id=1).loss == pytest.approx(
        scores["trained"]["loss"], rel=1e-5
    )


def test_a_resumed_head_is_the_uninterrupted_one(
    settings: MakeSettings, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(settings(task_type=Task.SEQ_CLS, run_dir=tmp_path / "whole"))
    halted = settings(task_type=Task.SEQ_CLS, run_dir=tmp_path / "halted")

    def halt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("server.training.run.save_adapter", halt)
        with pytest.raises(KeyboardInterrupt):
            trained(halted)
    resumed = trained(settings(task_type=Task.SEQ_CLS, run_dir=tmp_path / "halted", resume=True))

    files = [Path(one["adapter"]) / "adapter_model.safetensors" for one in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("form", "arguments", "status", "reason"),
    [
        ([{"prompt": "a", "completion": "b"}], [], ExitStatus.INVALID, "a classification head needs {text, label}"),
        ([{"text": "a", "label": "b"}], [], ExitStatus.INVALID, "a classification head needs two"),
        (None, ["--method", "cpt"], ExitStatus.USAGE, "task_type seq-cls cannot be used with cpt"),
        (None, ["--method", "cartridge"], ExitStatus.USAGE, "task_type seq-cls cannot be used with cartridge"),
        (None, ["--over", "tone@1"], ExitStatus.USAGE, "task_type seq-cls cannot be used with over"),
    ],
)
def test_what_a_head_cannot_be_trained_from_is_refused(
    prelude_train: Prelude,
    data: Path,
    form: list[dict[str, str]] | None,
    arguments: list[str],
    status: ExitStatus,
    reason: str,
) -> None:
    if form is not None:
        write_rows(data, form)
    result = prelude_train("--task-type", "seq-cls", *arguments)

    assert result.exit_code == status
    assert reason in " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(tmp_path_factory.mktemp("server"), "--dtype", "float32", model=tiny) as (client, _):
        yield client


@pytest.mark.parametrize("method", [Method.PROMPT_TUNING, Method.P_TUNING_V2, Method.MULTITASK, Method.LORA])
def test_a_published_head_classifies_as_peft_does(
    prelude_train: Prelude, server: httpx.Client, method: Method, tiny: Path, tokenizer: Any, tmp_path: Path
) -> None:
    name, arguments = f"head-{method.replace('_', '-')}", ["--method", method, "--task-type", "seq-cls"]
    if method is Method.MULTITASK:
        tasks = write_rows(tmp_path / "tasks.jsonl", rows(12, task_id=0) + rows(12, task_id=1))
        arguments += ["--data", str(tasks)]
    result = prelude_train(*arguments, "--id", name, "--push", "--url", str(server.base_url), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["published"]["golden_check"]["is_passed"] is True

    model = PeftModel.from_pretrained(plain_base(tiny), report["adapter"]).eval()
    task = {"task_id": 1} if method is Method.MULTITASK else {}
    for text in ("call number 3 please", "great"):
        body = {"model": f"{name}@candidate", "input": text, **task}
        (found,) = server.post("/v1/classify", json=body).raise_for_status().json()["data"]
        want = text_class_logits(model, Encoded(tokenizer(text)["input_ids"], [], task.get("task_id"), 0))
        assert list(found["logits"]) == list(LABELS)
        assert list(found["logits"].values()) == pytest.approx(want, abs=1e-4)


def test_a_server_with_other_logits_gets_nothing(
    prelude_train: Prelude, server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "text_class_logits", lambda *_: [9.0, 0.0, 0.0, 0.0])
    result = prelude_train("--task-type", "seq-cls", "--id", "wrong", "--push", "--url", str(server.base_url))

    assert result.exit_code == ExitStatus.FAILED
    assert "the golden check failed: the logit of a label differs from PEFT's by" in " ".join(result.stderr.split())
    assert server.get("/v1/prompts/wrong").status_code == 404


def _examples(path: Path) -> Any:
    from server.datasets import read_examples

    return read_examples(path)
