"""A whole server with a tokenizer that adds and removes a space before every text, like Llama 2's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tests.support.serving import BASE, serving, upload
from tests.support.vocabularies import sentencepiece_bpe

TEXT = "Question: hello Answer:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    tokenizer = sentencepiece_bpe()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tuned = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    tuned.save_pretrained(str(folder / "tuned"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "base")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    flags = ("--dtype", "float32", "--num-threads", "1")
    with serving(folder / "server", *flags, model=folder / "base") as (client, _):
        files = ("adapter_config.json", "adapter_model.safetensors")
        config, weights = ((folder / "tuned" / name).read_bytes() for name in files)
        upload(client, "tuned", config, weights).raise_for_status()
        yield client


def choices(client: httpx.Client, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
    body = {"model": BASE, "max_tokens": 16, "return_token_ids": True, "ignore_eos": True} | fields
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    return found


def decoded(tokenizer: Any, ids: list[int], *, skip: bool = True) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def test_label_scores_equal_pefts_for_the_whole_text(client: httpx.Client, folder: Path, tokenizer: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, folder / "tuned")
    before = tokenizer(TEXT)["input_ids"]
    labels = [" positive", "\npositive", "positive", " no maybe"]
    for given in (TEXT, before):
        body = {"model": "tuned", "input": given, "labels": labels}
        logprobs = client.post("/v1/classify", json=body).json()["data"][0]["logprobs"]
        for label in labels:
            whole = tokenizer(TEXT + label)["input_ids"]
            assert whole[: len(before)] == before
            with torch.no_grad():
                rows = torch.log_softmax(peft(torch.tensor([whole])).logits[0, -len(whole) :], -1)
            want = sum(rows[i - 1, whole[i]].item() for i in range(len(before), len(whole)))
            assert logprobs[label] == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("skip", [True, False])
def test_prompt_and_answer_equal_the_decoding_of_all_tokens(client: httpx.Client, tokenizer: Any, skip: bool) -> None:
    words = [index for piece, index in tokenizer.get_vocab().items() if piece.startswith("▁")]
    fields: dict[str, Any] = {
        "prompt": TEXT,
        "n": 4,
        "seed": 3,
        "skip_special_tokens": skip,
        "logit_bias": dict.fromkeys(map(str, [*words, 2]), 5),
        "logprobs": 1,
    }
    answers, echoes = choices(client, **fields), choices(client, echo=True, **fields)
    num_compared = 0
    for answer, echo in zip(answers, echoes, strict=True):
        ids = [*answer["prompt_token_ids"], *answer["token_ids"]]
        whole = decoded(tokenizer, ids, skip=skip)
        before = decoded(tokenizer, answer["prompt_token_ids"], skip=skip)
        if "\ufffd" in whole:  # transformers replaces a whole run of bytes
            continue
        num_compared += 1
        assert answer["text"] == whole.removeprefix(before)
        assert echo["text"] == whole
        for choice in (answer, echo):
            logprobs = choice["logprobs"]
            for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
                if not token.startswith("bytes:") and not (skip and token in {"<s>", "</s>"}):
                    assert choice["text"][offset:].startswith(token)
    assert num_compared


def test_a_stream_equals_the_answer(client: httpx.Client, tokenizer: Any) -> None:
    for prompt in (TEXT, [1], "é", [1, 230]):  # 230 is the first byte of a character
        fields: dict[str, Any] = {
            "model": BASE,
            "prompt": prompt,
            "max_tokens": 40,
            "temperature": 0,
            "ignore_eos": True,
        }
        (whole,) = choices(client, **fields)
        with client.stream("POST", "/v1/completions", json={**fields, "stream": True}) as response:
            events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]


@pytest.mark.parametrize("stop", ["</s>", " the"])
def test_stop_strings_may_have_spaces_and_special_tokens(client: httpx.Client, tokenizer: Any, stop: str) -> None:
    the, end = tokenizer.convert_tokens_to_ids("▁the"), tokenizer.eos_token_id
    token = end if stop == "</s>" else the
    fields: dict[str, Any] = {"prompt": TEXT, "max_tokens": 6, "logit_bias": {str(token): 100}, "temperature": 0}
    (choice,) = choices(client, stop=stop, **fields)
    assert (choice["text"], choice["finish_reason"], len(choice["token_ids"])) == ("", "stop", 1)


def test_chat_answers_keep_their_first_space(client: httpx.Client, tokenizer: Any) -> None:
    the = tokenizer.convert_tokens_to_ids("▁the")
    fields = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "logit_bias": {str(the): 100}}
    (choice,) = choices(client, "/v1/chat/completions", temperature=0, **fields)
    assert choice["message"]["content"] == " the the"
    assert choice["prompt_token_ids"].count(1) == 1
