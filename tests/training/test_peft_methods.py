"""Each method's initial state, its saved state, and PEFT's result after loading it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from server.training.encoding import Encoded
from server.training.peft_methods import (
    load_adapter,
    load_state,
    make_peft_model,
    mean_norm,
    remove_adapter,
    repeated,
    restore,
    save_adapter,
    save_state,
    state_of,
)
from server.training.scoring import can_limit_logits, collate, completion_loss, score, text_logprobs
from server.training.settings import DEFAULTS, Method
from tests.training.conftest import MakeSettings

CONTEXT = [Encoded([11, 12, 13], [14, 0]), Encoded([21, 22], [23, 0])]
PEFT_TYPES = {
    Method.PROMPT_TUNING: "PROMPT_TUNING",
    Method.P_TUNING: "P_TUNING",
    Method.PREFIX_TUNING: "PREFIX_TUNING",
    Method.P_TUNING_V2: "PREFIX_TUNING",
    Method.CPT: "CPT",
    Method.MULTITASK: "MULTITASK_PROMPT_TUNING",
    Method.CARTRIDGE: "CARTRIDGE",
    Method.LORA: "LORA",
}


@pytest.fixture
def make(base: Any, tokenizer: Any, settings: MakeSettings) -> Callable[..., Any]:
    def build(method: Method, **changes: Any) -> PeftModel:
        made = settings(method=method, **changes)
        torch.manual_seed(0)
        return make_peft_model(base, tokenizer, made, text="Route this request", context=CONTEXT, num_tasks=2)

    return build


def example_for(method: Method) -> Encoded:
    return Encoded([31, 32, 33], [34, 0], 1 if method is Method.MULTITASK else None)


def one_step(model: Any, method: Method) -> float:
    """Do a step of plain gradient descent; returns the loss before it."""
    batch = collate([example_for(method)] * 2, 1)
    labels = batch.pop("labels")
    model.train()
    loss = completion_loss(model(**batch), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 0.05 * weight.grad / (weight.grad.norm() + 1e-9)
                weight.grad = None
    return float(loss.detach())


@pytest.mark.parametrize("method", Method)
def test_each_method_learns_and_is_saved_completely(
    make: Callable[..., Any], method: Method, tmp_path: Path, base: Any, tiny: Path
) -> None:
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    model = make(method)
    losses = [one_step(model, method) for _ in range(6)]
    assert losses[-1] < losses[0]

    state = state_of(model)
    save_state(state, tmp_path / "state.safetensors")
    before = text_logprobs(model, example_for(method))
    one_step(model, method)
    assert text_logprobs(model, example_for(method)) != before
    restore(model, load_state(tmp_path / "state.safetensors"))
    assert text_logprobs(model, example_for(method)) == before

    save_adapter(model, tmp_path / "adapter", base_name="some-base", keeps_text=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tokens = 4 if method.is_soft_prompt else None
    assert (config["peft_type"], config.get("num_virtual_tokens")) == (PEFT_TYPES[method], tokens)
    assert config["base_model_name_or_path"] == "some-base"
    assert str(tiny) not in json.dumps(config)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert mean_norm(model) > 0
    base = remove_adapter(model)
    assert base.state_dict().keys() == frozen.keys()
    assert all(torch.equal(frozen[key], value) for key, value in base.state_dict().items())
    reloaded = load_adapter(base, tmp_path / "adapter")
    assert text_logprobs(reloaded, example_for(method)) == pytest.approx(before, abs=1e-5)


def test_every_method_has_a_learning_rate_with_a_source() -> None:
    assert DEFAULTS.keys() == set(Method)
    assert all(0 < default.learning_rate < 1 and "20" in default.source for default in DEFAULTS.values())


@pytest.mark.parametrize("method", [Method.PROMPT_TUNING, Method.MULTITASK])
def test_embeddings_start_as_those_of_the_text(
    make: Callable[..., Any], method: Method, base: Any, tokenizer: Any
) -> None:
    model = make(method, num_virtual_tokens=5)
    ids = repeated(tokenizer("Route this request")["input_ids"], 5)
    indices, tasks = torch.arange(5)[None], {"task_ids": torch.tensor([1])} if method is Method.MULTITASK else {}

    rows = model.prompt_encoder["default"](indices, **tasks)

    assert torch.allclose(rows[0], base.get_input_embeddings().weight[ids], atol=1e-6)


@pytest.mark.parametrize("method", [Method.PREFIX_TUNING, Method.CARTRIDGE])
def test_keys_and_values_start_as_those_of_the_text(
    make: Callable[..., Any], method: Method, base: Any, tokenizer: Any
) -> None:
    ids = repeated(tokenizer("Route this request")["input_ids"], 7)
    example = Encoded([31, 32, 33], [34, 0])
    in_words = text_logprobs(base, Encoded(ids + example.prompt_ids, example.completion_ids))

    assert text_logprobs(make(method, num_virtual_tokens=7), example) == pytest.approx(in_words[7:], abs=1e-4)


def test_an_initial_text_from_the_data_is_not_saved(make: Callable[..., Any], tmp_path: Path, base: Any) -> None:
    model = make(Method.PROMPT_TUNING)
    save_adapter(model, tmp_path, base_name="b", keeps_text=False)

    assert "Route" not in (tmp_path / "adapter_config.json").read_text()
    reloaded = PeftModel.from_pretrained(base, str(tmp_path))
    example = example_for(Method.PROMPT_TUNING)
    assert text_logprobs(reloaded, example) == pytest.approx(text_logprobs(model, example), abs=1e-6)


def test_the_first_row_of_a_cartridge_is_frozen(make: Callable[..., Any]) -> None:
    model = make(Method.CARTRIDGE)
    before = model.prompt_encoder["default"].weight.detach().clone()
    one_step(model, Method.CARTRIDGE)
    after = model.prompt_encoder["default"].weight

    assert torch.equal(before[:1], after[:1])
    assert not torch.equal(before[1:], after[1:])


def test_cpt_starts_from_examples_truncated_at_the_left(make: Callable[..., Any], tokenizer: Any) -> None:
    gap = tokenizer("\n")["input_ids"][0]
    config = make(Method.CPT, num_virtual_tokens=8).peft_config["default"]

    assert config.cpt_token_ids == [0, gap, 11, 12, 13, 14, 0, gap]
    assert config.cpt_tokens_type_mask == [4, 3, 2, 2, 2, 4, 4, 3]


def test_cpt_can_start_from_a_text_and_every_row_is_trained(make: Callable[..., Any], tokenizer: Any) -> None:
    model = make(Method.CPT, init_text="Route this request")

    assert model.peft_config["default"].cpt_token_ids == [*tokenizer("Route this request")["input_ids"] * 2][:4]
    one_step(model, Method.CPT)
    assert bool((model.prompt_encoder["default"].delta_embedding.weight.norm(dim=-1) > 0).all())


def test_cpt_stays_within_its_radius(make: Callable[..., Any], base: Any) -> None:
    model = make(Method.CPT, init_text="Route this request", cpt_epsilon=0.01)
    for _ in range(5):
        one_step(model, Method.CPT)
    norm = float(base.get_input_embeddings().weight.norm(dim=-1).mean())
    weights = model.get_prompt_embedding_to_save("default")
    moved = (weights - model.prompt_encoder["default"].embedding.weight).norm(dim=-1)

    assert float(moved.max()) <= 0.01 * norm * 1.001


@pytest.mark.parametrize(("ids", "count", "expected"), [([1, 2], 5, [1, 2, 1, 2, 1]), ([1, 2, 3], 2, [1, 2])])
def test_a_text_is_repeated_or_truncated(ids: list[int], count: int, expected: list[int]) -> None:
    assert repeated(ids, count) == expected


def test_the_loss_equals_the_models_and_accuracy_equals_greedy_generation(
    make: Callable[..., Any], base: Any
) -> None:
    model = make(Method.PROMPT_TUNING).eval()
    prompts = [[31, 32, 33], [41, 42], [51]]
    examples = []
    for place, prompt in enumerate(prompts):
        new = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=3, do_sample=False, pad_token_id=1)
        greedy = new[0, len(prompt) :].tolist()
        examples.append(Encoded(prompt, greedy if place < 2 else [*greedy[:-1], (greedy[-1] + 1) % 1585]))

    scores = score(model, examples, batch_size=2, pad_id=1)
    batch = collate(examples, 1)
    own = float(model(**batch).loss.detach())

    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.loss == pytest.approx(own, rel=1e-5)
    assert not model.training


def test_logprobs_cover_only_the_text(make: Callable[..., Any], base: Any) -> None:
    example = Encoded([31, 32, 33], [34, 0])
    ids = torch.tensor([example.token_ids])
    expected = base(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]

    assert text_logprobs(base, example) == pytest.approx(expected.tolist(), abs=1e-6)
    assert len(text_logprobs(make(Method.P_TUNING), example)) == 4


def test_a_batch_is_padded_on_the_right_and_labels_only_the_completion() -> None:
    batch = collate([Encoded([5, 6], [7], 0), Encoded([8], [9, 0], 1), Encoded([3], [4], 1)], 1)

    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0], [3, 4, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, 0], [-100, 4, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert batch["task_ids"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("method", Method)
def test_logits_before_the_first_completion_are_not_computed(make: Callable[..., Any], method: Method) -> None:
    model = make(method).eval()
    task = 1 if method is Method.MULTITASK else None
    examples = [Encoded([31, 32, 33, 35, 36], [34, 0], task), Encoded([41, 42, 43], [44], task)]
    found = []
    for limit in (False, True):
        batch = collate(examples, 1, limit_logits=limit)
        labels = batch.pop("labels")
        outputs = model(**batch)
        found.append(float(completion_loss(outputs, labels).detach()))

    assert can_limit_logits(model)
    assert outputs.logits.shape[1] == 5  # only positions from the shorter prompt's last token on, of seven tokens
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_loss_of_accumulated_batches_equals_that_of_one_batch(make: Callable[..., Any]) -> None:
    model = make(Method.CPT)
    examples = [Encoded([31, 32], [33, 0]), Encoded([41], [42, 43, 44, 0])]
    whole = collate(examples, 1)
    labels = whole.pop("labels")
    together = completion_loss(model(**whole), labels).detach()
    apart = 0.0
    for example in examples:
        batch = collate([example], 1)
        labels = batch.pop("labels")
        apart += float(completion_loss(model(**batch), labels, num_items_in_batch=6).detach())

    assert math.isclose(apart, float(together), rel_tol=1e-5)
