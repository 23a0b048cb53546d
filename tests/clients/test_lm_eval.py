"""EleutherAI's evaluation harness against a whole server: its scores equal those of PEFT in this process."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from server.demo.tour import MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY
from tests.clients.documents import command
from tests.clients.running import ClientEnvironment, heldout
from tests.support.serving import BASE

TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIRECTORY)
LABELS = ("alarm", "call", "music", "payment", "restaurant", "translate", "travel", "weather")
LIMIT = 50
TOLERANCE = 1e-3


def evaluate(clients: ClientEnvironment, arguments: list[str], folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Run a documented command; returns the metrics of its one task, and its samples in order."""
    more = ["--limit", str(LIMIT), "--log_samples", "--output_path", str(folder)]
    clients.call([clients.command(arguments[0]), *arguments[1:], *more])
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob("samples_*.jsonl")
    (metrics,) = json.loads(results.read_text())["results"].values()
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return metrics, sorted(lines, key=lambda line: line["doc_id"])


def for_model(arguments: list[str], model: str) -> list[str]:
    return [argument.replace("model=intent,", f"model={model},") for argument in arguments]


def peft_model(name: str) -> PreTrainedModel | PeftModel:
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)
    return base if name == BASE else PeftModel.from_pretrained(base, SOFT_PROMPTS_DIRECTORY / name).eval()


@torch.no_grad()
def loglikelihood(model: PreTrainedModel | PeftModel, context: str, continuation: str) -> tuple[float, bool]:
    """The continuation's log likelihood after the context, and whether greedy decoding gives it."""
    start = len(TOKENIZER.encode(context))
    ids = TOKENIZER.encode(context + continuation)
    logprobs = model(torch.tensor([ids])).logits[0, -len(ids) :].log_softmax(-1)[start - 1 : -1]
    tokens = torch.tensor(ids[start:])
    own = logprobs.gather(1, tokens[:, None]).sum().item()
    return own, bool((logprobs.argmax(-1) == tokens).all())


@functools.cache
def generated() -> list[str]:
    """The answers of PEFT's model to the held-out orders."""
    model: Any = peft_model("extract")
    texts = []
    for pair in heldout("extract")[:LIMIT]:
        ids = torch.tensor([TOKENIZER.encode(pair["input"])])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=1
        )
        texts.append(str(TOKENIZER.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts


@pytest.mark.parametrize("model", ["intent", "dates", BASE])
def test_multiple_choice_scores_equal_pefts(
    server: str, python_clients: ClientEnvironment, tmp_path: Path, model: str
) -> None:
    metrics, samples = evaluate(python_clients, for_model(command("lm-eval", server), model), tmp_path)
    pairs = heldout("intent")[:LIMIT]
    assert len(samples) == LIMIT
    reference = peft_model(model)
    num_right = 0
    for pair, sample in zip(pairs, samples, strict=True):
        want = [loglikelihood(reference, pair["input"], f"\n{label}") for label in LABELS]
        got = [(float(score), is_greedy == "True") for ((score, is_greedy),) in sample["resps"]]
        assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=TOLERANCE)
        assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in want]
        chosen = LABELS[max(range(len(LABELS)), key=lambda index: want[index][0])]
        assert sample["acc"] == float(chosen == pair["output"])
        num_right += chosen == pair["output"]
    assert metrics["acc,none"] == pytest.approx(num_right / len(pairs), abs=1e-12)


@pytest.mark.parametrize(
    ("model", "more"),
    [("extract", []), (BASE, ["--gen_kwargs", "prompt_id=extract"])],
    ids=["model", "prompt_id"],
)
def test_generated_answers_equal_pefts(
    server: str, python_clients: ClientEnvironment, tmp_path: Path, model: str, more: list[str]
) -> None:
    arguments = [argument.replace("prelude_intent", "prelude_extract") for argument in command("lm-eval", server)]
    metrics, samples = evaluate(python_clients, [*for_model(arguments, model), *more], tmp_path)
    pairs = heldout("extract")[:LIMIT]
    assert [sample["resps"] for sample in samples] == [[[text]] for text in generated()]
    num_right = sum(text.strip() == pair["output"] for text, pair in zip(generated(), pairs, strict=True))
    assert metrics["exact_match,first_line"] == pytest.approx(num_right / len(pairs), abs=1e-12)
