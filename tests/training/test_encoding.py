"""Training uses the same tokens as the server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.continuations import Context
from server.datasets import Conversation, DatasetError, LabelledText, Message, PromptCompletion
from server.tokenizer import Tokenizer
from server.training.encoding import Encoded, Encoder
from tests.support.vocabularies import sentencepiece_bpe

CHAT = Conversation((Message("user", "Play some jazz."), Message("assistant", "music")))


@pytest.mark.anyio
async def test_a_prompt_is_tokenised_as_the_server_does_it(encoder: Encoder, tokenizer: Any) -> None:
    server = Tokenizer(tokenizer)
    (prompt,) = await server.encode(["My lamp is great."], add_special_tokens=True)
    (label,) = await server.encode(["\npositive"], add_special_tokens=False)
    server.close()

    example = LabelledText("My lamp is great.", "positive", task_id=1, line=7)
    assert encoder.encode(example) == Encoded(prompt, [*label, 0], 1, line=7)


def test_special_tokens_begin_the_prompt_and_never_the_completion(encoder: Encoder) -> None:
    def tokenize(text: str | list[str], *, add_special_tokens: bool) -> dict[str, list[Any]]:
        ids = [[99] * add_special_tokens + list(one.encode()) for one in ([text] if isinstance(text, str) else text)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    fake = type("T", (), {"__call__": staticmethod(tokenize), "eos_token_id": 0, "chat_template": None})()
    encoded = replace(encoder, tokenizer=fake).encode(PromptCompletion("ab", " c"))

    assert encoded.prompt_ids == [99, 97, 98]
    assert encoded.completion_ids == [32, 99, 0]
    assert encoded.token_ids == [99, 97, 98, 32, 99, 0]


@pytest.mark.anyio
async def test_a_completion_continues_its_prompt_as_on_the_server(encoder: Encoder) -> None:
    theirs = sentencepiece_bpe()
    ours = replace(encoder, tokenizer=theirs, eos_token_ids=(theirs.eos_token_id,))
    server = Tokenizer(theirs)
    (prompt,) = await server.encode(["Question:"], add_special_tokens=True)
    _, (label,) = await server.encode_labels(Context(prompt, "Question:"), ["\ncat"], add_special_tokens=True)
    server.close()

    assert ours.encode(LabelledText("Question:", "cat")) == Encoded(prompt, [*label, theirs.eos_token_id])
    encoded = ours.encode(PromptCompletion("Question:", " cat"))
    assert theirs.convert_ids_to_tokens(encoded.completion_ids) == ["▁cat", "</s>"]
    # The prompt has the server's tokens, even if it ends with a space.
    encoded = ours.encode(PromptCompletion("Question: ", "cat"))
    assert encoded.prompt_ids == theirs("Question: ")["input_ids"]
    assert theirs.convert_ids_to_tokens(encoded.completion_ids) == ["c", "at", "</s>"]


@pytest.mark.anyio
async def test_messages_go_through_the_chat_template_as_on_the_server(encoder: Encoder, tokenizer: Any) -> None:
    server = Tokenizer(tokenizer)
    text = await server.render_chat([{"role": "user", "content": "Play some jazz."}])
    (prompt,) = await server.encode([text], add_special_tokens=False)
    server.close()

    encoded = encoder.encode(CHAT)

    assert encoded.prompt_ids == prompt
    assert encoded.completion_ids == [*tokenizer("music", add_special_tokens=False)["input_ids"], 0]


def test_an_end_of_turn_token_of_the_template_ends_the_completion(
    encoder: Encoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ends = replace(encoder, eos_token_ids=(0, 1))

    assert ends.encode(CHAT).completion_ids[-1] == 0  # '>' follows: the template writes other text
    monkeypatch.setattr(tokenizer, "chat_template", template.replace(">{% endif", "{% endif"))
    assert ends.encode(CHAT).completion_ids[-1] == 1


@pytest.mark.parametrize(("of_tokenizer", "of_model", "end"), [(5, (), [5]), (None, (), []), (5, (7, 8), [7])])
def test_the_end_is_a_token_at_which_the_server_stops(
    encoder: Encoder, of_tokenizer: int | None, of_model: tuple[int, ...], end: list[Any]
) -> None:
    fake = SimpleNamespace(eos_token_id=of_tokenizer)
    assert replace(encoder, tokenizer=fake, eos_token_ids=of_model)._end(PromptCompletion("a", "b"), "a") == end


def test_a_text_over_the_context_is_reported_by_line(encoder: Encoder) -> None:
    examples = [LabelledText("short", "call", line=1), LabelledText("long " * 50, "call", line=4)]

    with pytest.raises(DatasetError) as caught:
        encoder.encode_all(Path("d.jsonl"), examples, max_tokens=60, num_virtual_tokens=20)

    ((line, reason),) = caught.value.faults
    assert line == 4
    assert "at most 40 fit: the context has 60 tokens, 20 of them virtual" in reason


def test_a_text_that_just_fits_is_accepted(encoder: Encoder) -> None:
    example = LabelledText("short", "call", line=1)
    room = len(encoder.encode(example).token_ids)

    assert encoder.encode_all(Path("d"), [example], max_tokens=room + 3, num_virtual_tokens=3)
    with pytest.raises(DatasetError):
        encoder.encode_all(Path("d"), [example], max_tokens=room + 2, num_virtual_tokens=3)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}"])
def test_a_conversation_refused_by_the_template_is_reported_by_line(
    encoder: Encoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)

    with pytest.raises(DatasetError) as caught:
        encoder.encode_all(Path("d"), [replace(CHAT, line=3)], max_tokens=60, num_virtual_tokens=2)

    assert caught.value.faults[0][0] == 3
    assert "rejected by the chat template" in caught.value.faults[0][1]
