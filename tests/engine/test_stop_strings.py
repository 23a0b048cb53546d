from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.stop_strings import StopStrings, _Matcher

letters = st.text("ab", max_size=30)
strings = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)


@given(st.text("ab", min_size=1, max_size=8), letters)
def test_a_matcher_knows_how_much_of_its_string_the_text_ends_with(string: str, text: str) -> None:
    matcher = _Matcher(string)
    for end in range(1, len(text) + 1):
        found = matcher.advance(text[end - 1])
        assert found == text[:end].endswith(string)
        if found:
            return
        longest = max(length for length in range(len(string)) if text[:end].endswith(string[:length]))
        assert matcher.length == longest


@given(letters, strings, st.lists(st.integers(1, 7), min_size=1), st.booleans())
@settings(deadline=None)
def test_the_earliest_end_wins_however_the_text_is_cut(
    text: str, stop: list[str], sizes: list[int], include: bool
) -> None:
    stops = StopStrings(stop, include=include)
    released, start = "", 0
    for size in sizes * len(text):
        is_found = stops.found is not None
        if is_found or start >= len(text):
            break
        released += stops.append(text[start : start + size])
        start += size
        assert stops.found is not None or text.startswith(released)
        if stops.found is None and stop:  # nothing is held back without need
            seen = text[:start]
            held = max(n for word in stop for n in range(len(word)) if seen.endswith(word[:n]))
            assert len(released) == len(seen) - held
    if stops.found is None:
        released += stops.finish()
    found = [(text.index(word) + len(word), text.index(word), word) for word in stop if word in text]
    if not found:
        assert released == text
        return
    end, begin, word = min(found)
    assert (stops.found, released) == (word, text[: end if include else begin])


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "ab", "<s>", "<t>"]), st.booleans()), max_size=12), strings)
@settings(deadline=None)
def test_hidden_text_is_found_in_what_is_said_and_never_shown(said: list[tuple[str, bool]], plain: list[str]) -> None:
    stop = [*plain, "<s>", "a<t>b"]
    stops = StopStrings(stop, hidden=["<s>", "<t>"])
    assert stops.look_for_hidden
    released = ""
    for text, hides in said:
        if stops.found is None:
            released += stops.append(text, is_hidden=hides and text[0] == "<")
    if stops.found is None:
        released += stops.finish()
    whole, shown, expected = "", "", None
    for text, hides in said:
        hidden = hides and text[0] == "<"
        for char in text:
            whole += char
            shown += "" if hidden else char
            ends = [word for word in stop[-2:] if whole.endswith(word)]
            befores = [len(_visible(said, len(whole) - len(word))) for word in ends]
            if not hidden:
                befores += [len(shown) - len(word) for word in stop if shown.endswith(word)]
            if befores and expected is None:
                expected = shown[: min(befores)]
    assert released == (shown if expected is None else expected)


def _visible(said: list[tuple[str, bool]], length: int) -> str:
    """What is shown of the first characters that were said."""
    visible = ""
    for text, hides in said:
        visible += "" if hides and text[0] == "<" else text[: max(length, 0)]
        length -= len(text)
    return visible


def test_long_strings_cost_nothing_for_what_they_hold_back() -> None:
    """Steps are counted, not time: each character moves each matcher once, and back as often as it moved on."""
    steps = 0

    class Counted(str):
        __slots__ = ()

        def __getitem__(self, index: object) -> str:
            nonlocal steps
            steps += 1
            return str.__getitem__(self, index)  # type: ignore[index]

    stops = StopStrings([])
    stops._in_shown = [_Matcher(Counted("a" * 1023 + "b")), *(_Matcher(Counted(char * 1024)) for char in "bcdefg")]
    for _ in range(5000):
        stops.append("a")
    assert steps < 5000 * len(stops._in_shown) * 3


def test_no_strings_hold_nothing_back() -> None:
    stops = StopStrings([])
    assert stops.append("ab") == "ab"
    assert stops.append("<s>", is_hidden=True) == ""
    assert stops.finish() == ""
