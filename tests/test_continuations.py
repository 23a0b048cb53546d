"""A continuation's tokens, for each kind of tokenizer that models use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.continuations import Context, continuations_of
from server.tokenizer import Tokenizer
from tests.support.vocabularies import KINDS, byte_level, sentencepiece_bpe, unigram, wordpiece

TEXTS = ["the cat", "Question: fine? ", "é 日", "yes\n", "  a", "pos", "the pos", "b.", "", " "]
LABELS = [" positive", "\npositive", "positive", "itive", "é", "\n", " ", ".", "s"]


@pytest.fixture(scope="module", params=KINDS)
def theirs(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def by_harness(tokenizer: PreTrainedTokenizerFast, text: str, label: str) -> tuple[list[int], list[int]] | None:
    """The harness's tokens of text and label if the text's tokens are a prefix of both together, else None."""
    whole, before = ids_of(tokenizer, text + label), ids_of(tokenizer, text)
    return (before, whole[len(before) :]) if whole[: len(before)] == before else None


words = st.lists(st.sampled_from(TEXTS), max_size=40).map("".join)
labels = st.lists(st.sampled_from(LABELS), min_size=1, max_size=3).map("".join)


@given(words, labels)
@settings(deadline=None)
def test_tokens_equal_those_of_both_texts_after_those_of_the_first(
    theirs: PreTrainedTokenizerFast, text: str, label: str
) -> None:
    token_ids = ids_of(theirs, text)
    expected = by_harness(theirs, text, label)
    (found,) = continuations_of(theirs).encode(Context(token_ids, text), [label])
    context, (scored,) = continuations_of(theirs).encode_labels(Context(token_ids, text), [label])
    if expected is not None:
        assert found == scored == expected[1]
        assert context == Context(token_ids, text)
    elif isinstance(context, str):
        spaces = text[len(text.rstrip()) :]
        assert spaces
        assert by_harness(theirs, text.rstrip(), spaces + label) == (ids_of(theirs, context), scored)
    else:
        assert found == scored


@given(words.filter(str.strip), labels)
@settings(deadline=None)
@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe])
def test_tokens_decode_to_the_continuation(make: Callable[..., Any], text: str, label: str) -> None:
    theirs = make()
    ours = continuations_of(theirs)
    token_ids = ids_of(theirs, text)
    for context in (Context(token_ids, text), Context(token_ids)):
        (found,) = ours.encode(context, [label])
        before, whole = (theirs.decode(ids, skip_special_tokens=False) for ids in (token_ids, token_ids + found))
        assert whole == before + label


@pytest.mark.parametrize(
    ("make", "text", "label", "pieces"),
    [
        (sentencepiece_bpe, "the", " cat", ["▁cat"]),
        (sentencepiece_bpe, "the", "\ncat", ["<0x0A>", "c", "at"]),
        (sentencepiece_bpe, "the pos", "itive", ["itive"]),
        (sentencepiece_bpe, "the ", "cat", ["c", "at"]),
        (unigram, "Question:", " cat", ["▁c", "at"]),
        (wordpiece, "the", " cat", ["cat"]),
        (byte_level, "the ", "cat", ["c", "at"]),
    ],
)
def test_tokens_merged_across_the_border_do_not_change_the_texts_tokens(
    make: Callable[..., Any], text: str, label: str, pieces: list[str]
) -> None:
    theirs = make()
    for given_text in (text, None):
        (found,) = continuations_of(theirs).encode(Context(ids_of(theirs, text), given_text), [label])
        assert theirs.convert_ids_to_tokens(found) == pieces


@pytest.mark.anyio
@pytest.mark.parametrize("text", ["Question: ", "Question: \n"])
async def test_all_labels_of_a_text_are_scored_from_the_same_position(text: str) -> None:
    theirs = sentencepiece_bpe()
    tokenizer = Tokenizer(theirs)
    names = ["cat", "\ncat"]
    context = Context(ids_of(theirs, text), text)
    token_ids, found = await tokenizer.encode_labels(context, names, add_special_tokens=True)
    tokenizer.close()
    expected = "Question:" if text.endswith(" ") else text
    assert token_ids == ids_of(theirs, expected)
    assert [token_ids + ids for ids in found] == [ids_of(theirs, text + name) for name in names]


@pytest.mark.anyio
async def test_a_text_of_spaces_keeps_them() -> None:
    theirs = sentencepiece_bpe()
    tokenizer = Tokenizer(theirs)
    context = Context(ids_of(theirs, " "), " ")
    token_ids, ((*found,),) = await tokenizer.encode_labels(context, ["cat"], add_special_tokens=True)
    tokenizer.close()
    assert token_ids == context.token_ids
    assert theirs.convert_ids_to_tokens(found) == ["c", "at"]


def test_an_end_token_added_by_the_tokenizer_is_ignored() -> None:
    theirs = wordpiece()
    ends = theirs.convert_tokens_to_ids("[SEP]")
    assert isinstance(ends, int)
    context = Context([*ids_of(theirs, "the cat"), ends], "the cat")
    (found,) = continuations_of(theirs).encode(context, [" sat"])
    assert theirs.convert_ids_to_tokens(found) == ["sat"]


def test_only_the_end_of_a_long_text_is_tokenised_again() -> None:
    theirs = byte_level()
    seen: list[int] = []

    def counted(texts: list[str], **options: bool) -> object:
        seen.extend(map(len, texts))
        return theirs(texts, **options)

    counted.decode = theirs.decode  # type: ignore[attr-defined]
    text = "the cat sat " * 10_000 + "x" * 300
    for context in (Context(ids_of(theirs, text), text), Context(ids_of(theirs, text))):
        assert len(continuations_of(counted).encode(context, [" dog"] * 256)) == 256
    assert max(seen) <= 600
