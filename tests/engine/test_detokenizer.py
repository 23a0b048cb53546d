from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.detokenizer import IncrementalDetokenizer
from tests.support.presence import present


def decode(token_ids: list[int]) -> str:
    """One token, one byte: the hardest case, since characters span tokens."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def feed(
    text: str, stop: list[str], *, include: bool = False, size: int = 1
) -> tuple[list[str], IncrementalDetokenizer]:
    detokenizer = IncrementalDetokenizer(decode, stop=stop, include_stop_str=include)
    data = list(text.encode())
    pieces = [detokenizer.append(data[i : i + size]) for i in range(0, len(data), size)]
    return [*pieces, detokenizer.finish()], detokenizer


@given(st.text(max_size=60), st.integers(1, 7))
def test_pieces_add_up_to_the_text(text: str, size: int) -> None:
    text = text.replace("\ufffd", "")
    pieces, detokenizer = feed(text, [], size=size)
    assert "".join(pieces) == text
    assert not detokenizer.stopped


@given(st.text(alphabet="abc", max_size=40), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_result_does_not_depend_on_how_tokens_arrive(text: str, stop: list[str]) -> None:
    results = {"".join(feed(text, stop, size=size)[0]) for size in (1, 2, 5, 100)}
    assert len(results) == 1


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, detokenizer = feed(text, stop)
    result = "".join(pieces)
    ends = [text.find(word) + len(word) for word in stop if word in text]
    assert detokenizer.stopped == bool(ends)
    if ends:
        assert result + present(detokenizer.stop_string) == text[: min(ends)]
    else:
        assert result == text


def test_incomplete_characters_are_held_back() -> None:
    detokenizer = IncrementalDetokenizer(decode)
    first, *rest = "é".encode()
    assert detokenizer.append([first]) == ""
    assert detokenizer.append(rest) == "é"


def test_incomplete_character_at_the_end_is_shown_as_what_it_is() -> None:
    detokenizer = IncrementalDetokenizer(decode)
    assert detokenizer.append([ord("a"), 0xC3]) == "a"
    assert detokenizer.finish() == "\ufffd"


def test_beginning_of_a_stop_string_is_held_back_until_it_is_clear() -> None:
    detokenizer = IncrementalDetokenizer(decode, stop=["END"])
    assert detokenizer.append(list(b"xE")) == "x"
    assert detokenizer.append(list(b"N")) == ""
    assert detokenizer.append(list(b"x")) == "ENx"
    assert detokenizer.append(list(b"EN")) == ""
    assert detokenizer.finish() == "EN"


@pytest.mark.parametrize(("include", "want"), [(False, "ab"), (True, "abEND")])
def test_stop_string_is_kept_only_when_asked_for(*, include: bool, want: str) -> None:
    pieces, detokenizer = feed("abENDmore", ["END"], include=include, size=3)
    assert "".join(pieces) == want
    assert detokenizer.stop_string == "END"
    assert detokenizer.append([65]) == ""


@pytest.mark.parametrize("byte", [0xFF, 0xE4, 0x80, ord("a"), 256], ids=["wrong", "first", "middle", "text", "void"])
@pytest.mark.parametrize("stop", [[], ["\ufffd" * 3 + "x", "axa", "ab<s>"]], ids=["", "stop"])
def test_work_and_text_held_back_do_not_grow_with_the_answer(byte: int, stop: list[str]) -> None:
    sizes: list[int] = []

    def counted(token_ids: list[int]) -> str:
        sizes.append(len(token_ids))
        return decode([token_id for token_id in token_ids if token_id < 256])

    detokenizer = IncrementalDetokenizer(counted, stop=stop, prompt_ids=list(b"a"), hidden={256: "<s>"})
    text = ""
    for count in range(1, 2000):
        text += detokenizer.append([byte])
        assert count - len(text) <= 6 or byte == 256
    assert max(sizes) <= 32
    assert len(sizes) <= 3 * 2000
    assert text + detokenizer.finish() == decode([byte] * 1999 if byte < 256 else [])


def test_held_text_before_endless_hidden_tokens_stays_short() -> None:
    detokenizer = IncrementalDetokenizer(
        lambda token_ids: decode([token_id for token_id in token_ids if token_id < 256]),
        stop=["a<s>b", "ax"],
        hidden={256: "<s>", 257: "<t>"},
    )
    assert detokenizer.append([ord("a"), *[257, 256] * 1000]) == ""
    assert len(detokenizer._stops._held) < 10
    assert detokenizer.append([ord("b")]) == "ab"


@pytest.mark.parametrize(
    ("tokens", "stop", "want", "include"),
    [
        ([*b"hi", 256, *b"yo"], ["<s>"], "hi", "hi<s>"),
        ([*b"hi", 256, *b"yo"], ["i<s>y"], "h", "hi<s>y"),
        ([*b"hi", 256, *b"yo"], ["iy"], "h", "hiy"),
        ([*b"hi", 256, *b"yo"], ["<s>", "iy"], "hi", "hi<s>"),
        ([*b"hi", 256, *b"yo"], ["s>", "<"], "hiyo", "hiyo"),
        ([*b"<s", *b">!"], ["<s>"], "", "<s>"),
        ([0xC3, 256, 0xA9], ["<s>"], "\ufffd", "\ufffd<s>"),
        ([0xC3, 256, 0xA9], ["<s>x"], "é", "é"),
    ],
)
def test_stop_strings_with_tokens_that_are_not_shown(
    tokens: list[int], stop: list[str], want: str, include: str
) -> None:
    for kept, expected in ((False, want), (True, include)):
        detokenizer = IncrementalDetokenizer(
            lambda token_ids: decode([token_id for token_id in token_ids if token_id < 256]),
            stop=stop,
            include_stop_str=kept,
            hidden={256: "<s>"},
        )
        text = "".join(detokenizer.append([token_id]) for token_id in tokens) + detokenizer.finish()
        assert text == expected


@pytest.mark.parametrize(
    ("prompt", "new", "echoed", "added"),
    [
        ([0xC3], [0xA9], "é", "é"),
        ([0xC3], [ord("a")], "\ufffda", "a"),
        ([0xF0, 0x9F], [0x98, 0x80], "😀", "😀"),
        ([0xC3], [], "\ufffd", ""),
        ([*b"a", 0xFF], [0xFF], "\ufffd\ufffd", "\ufffd"),
    ],
)
def test_a_character_that_the_prompt_begins(prompt: list[int], new: list[int], echoed: str, added: str) -> None:
    for repeats, want in ((True, echoed), (False, added)):
        detokenizer = IncrementalDetokenizer(decode, prompt_ids=prompt, repeats_prompt=repeats)
        assert detokenizer.append(new) + detokenizer.finish() == want
