"""Streams, answers, echoes, offsets and stop strings agree with the decoding of all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.api.inference.logprobs import ScoredToken, TokenScorer, completion_logprobs
from server.engine.detokenizer import REPLACEMENT, IncrementalDetokenizer, common_length, decided_length
from server.engine.types import Logprobs
from server.tokenizer import Tokenizer
from tests.support.vocabularies import KINDS

pytestmark = pytest.mark.slow

SENTENCES = ["the cat sat", "Question: fine?", "é 日本 🙂", "  a  b\n\nc", "\ufffd", "yes the"]


@dataclass(frozen=True)
class Kind:
    name: str
    theirs: PreTrainedTokenizerFast
    ours: Tokenizer

    def ids(self) -> st.SearchStrategy[list[int]]:
        """Tokens of sentences, byte tokens, special tokens, random tokens and ids without a token."""
        vocabulary = self.theirs.get_vocab()
        odd = sorted(index for piece, index in vocabulary.items() if self._is_odd(piece))
        written = [self.theirs(text, add_special_tokens=False)["input_ids"] for text in SENTENCES]
        one = st.one_of(
            st.sampled_from(odd + sorted(self.ours.special_tokens)).map(lambda index: [index]),
            st.integers(0, max(vocabulary.values()) + 3).map(lambda index: [index]),
            st.sampled_from(written),
        )
        return st.lists(one, max_size=12).map(lambda runs: [index for run in runs for index in run])

    def _is_odd(self, piece: str) -> bool:
        return (len(piece) == 1 and not piece.isascii()) or piece in {
            "<0xE4>", "<0xB8>", "<0x96>", "<0xF0>", "<0x9F>", "<0xFF>", "<0x41>", "▁", "##s",
        }  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    theirs = KINDS[request.param]()
    with closing(Tokenizer(theirs)) as ours:
        yield Kind(request.param, theirs, ours)


def stream(kind: Kind, prompt: list[int], new: list[int], *, skip: bool, **options: Any) -> tuple[list[str], bool]:
    decode = partial(kind.ours.decode, skip_special_tokens=skip)
    hidden = kind.ours.special_tokens if skip and options.get("stop") else None
    detokenizer = IncrementalDetokenizer(decode, prompt_ids=prompt, hidden=hidden, **options)
    pieces = [detokenizer.append([token_id]) for token_id in new]
    pieces.append(detokenizer.finish())
    return pieces, detokenizer.stopped


def added(kind: Kind, prompt: list[int], new: list[int], *, skip: bool) -> str:
    """The text that new tokens add, computed by decoding all tokens."""
    before = kind.ours.decode(prompt, skip_special_tokens=skip)
    whole = kind.ours.decode(prompt + new, skip_special_tokens=skip)
    start = common_length(before, whole)
    assert set(before[start:]) <= {REPLACEMENT}
    return whole[start:]


@given(st.data())
@settings(deadline=None)
def test_decoding_equals_transformers_except_for_runs_with_invalid_bytes(kind: Kind, data: st.DataObject) -> None:
    ids = data.draw(kind.ids())
    skip = data.draw(st.booleans())
    shown = [index for index in ids if not skip or index not in kind.ours.special_tokens]
    found: list[str | None] = [*kind.theirs.convert_ids_to_tokens(shown)]
    pieces = [piece for piece in found if piece is not None]
    for is_byte, run in groupby(pieces, lambda piece: piece.startswith("<0x")):
        if is_byte:
            row = bytes(int(piece[3:5], 16) for piece in run)
            characters = row.decode(errors="ignore")
            if characters and characters.encode() != row:
                return
    theirs = kind.theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert kind.ours.decode(ids, skip_special_tokens=skip) == theirs


@given(st.data())
@settings(deadline=None)
def test_a_stream_adds_up_to_the_text_of_all_new_tokens(kind: Kind, data: st.DataObject) -> None:
    prompt, new = data.draw(kind.ids()), data.draw(kind.ids())
    skip = data.draw(st.booleans())
    pieces, _ = stream(kind, prompt, new, skip=skip)
    assert "".join(pieces) == added(kind, prompt, new, skip=skip)


@given(st.data())
@settings(deadline=None)
def test_echo_and_answer_equal_the_decoding_of_all_tokens(kind: Kind, data: st.DataObject) -> None:
    prompt, new = data.draw(kind.ids()), data.draw(kind.ids())
    skip = data.draw(st.booleans())
    pieces, _ = stream(kind, prompt, new, skip=skip, repeats_prompt=True)
    echo = kind.ours.decode(prompt, skip_special_tokens=skip)
    text = echo[: decided_length(echo)] + "".join(pieces)
    assert text == kind.ours.decode(prompt + new, skip_special_tokens=skip)


@given(st.data())
@settings(deadline=None)
def test_a_text_ends_before_its_first_stop_string(kind: Kind, data: st.DataObject) -> None:
    prompt, new = data.draw(kind.ids()), data.draw(kind.ids())
    skip, include = data.draw(st.booleans()), data.draw(st.booleans())
    text = added(kind, prompt, new, skip=skip)
    part = st.integers(0, len(text)).flatmap(
        lambda start: st.integers(1, 5).map(lambda size: text[start : start + size])
    )
    stop = data.draw(st.lists(part | st.text("the \n", min_size=1, max_size=3), max_size=3))
    stop = [word for word in stop if word]
    pieces, stopped = stream(kind, prompt, new, skip=skip, stop=stop, include_stop_str=include)
    found = min(((text.index(word) + len(word), text.index(word)) for word in stop if word in text), default=None)
    assert stopped == (found is not None)
    assert "".join(pieces) == (text if found is None else text[: found[0] if include else found[1]])


@given(st.data())
@settings(deadline=None)
def test_a_hidden_special_token_works_as_a_stop_string(kind: Kind, data: st.DataObject) -> None:
    prompt, new = data.draw(kind.ids()), data.draw(kind.ids())
    special_id = data.draw(st.sampled_from(sorted(kind.ours.special_tokens)))
    stop = kind.ours.special_tokens[special_id]
    include = data.draw(st.booleans())
    pieces, stopped = stream(kind, prompt, new, skip=True, stop=[stop], include_stop_str=include)
    text = added(kind, prompt, new, skip=True)
    if stop in text:  # the token's text in letters, not as a special token
        return
    assert stopped == (special_id in new)
    if stopped:
        text = added(kind, prompt, new[: new.index(special_id)], skip=True) + stop * include
    assert "".join(pieces) == text


@given(st.data())
@settings(deadline=None)
def test_offsets_point_to_the_tokens_in_the_text(kind: Kind, data: st.DataObject) -> None:
    prompt, new = data.draw(kind.ids()), data.draw(kind.ids())
    skip, echoes = data.draw(st.booleans()), data.draw(st.booleans())
    decode = partial(kind.ours.decode, skip_special_tokens=skip)
    scored: list[ScoredToken]
    if echoes:
        text, ids = decode(prompt + new), prompt + new
        scorer = TokenScorer(decode, kind.ours.token_bytes)
    else:
        text, ids = added(kind, prompt, new, skip=skip), new
        scorer = TokenScorer(decode, kind.ours.token_bytes, prompt)
    scored = scorer.append(ids, [Logprobs(-1.0, [(token_id, -1.0)]) for token_id in ids])
    logprobs = completion_logprobs(scored, kind.ours.token_bytes, with_top=True)
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    if kind.name == "word_ends":  # here a token's space is added with the next token
        return
    assert logprobs.top_logprobs is not None
    for token_id, token, offset, top in zip(
        ids, logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs, strict=True
    ):
        assert top == {token: -1.0}
        if skip and token_id in kind.ours.special_tokens:
            assert offset <= len(text)
        elif token.startswith("bytes:"):
            assert offset < len(text) or (not echoes and offset == 0)
        else:
            assert text[offset:].startswith(token), (token, offset, text)
