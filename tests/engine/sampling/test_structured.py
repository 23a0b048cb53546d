from __future__ import annotations

import json
import random
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.engine.constraints import Constraint
from server.engine.sampling import grammars as structured
from server.engine.sampling.grammar_check import MAX_ERROR_CHARS, NO_WAY_ON
from server.engine.sampling.grammar_trials import GrammarTrials
from server.engine.sampling.grammars import GrammarCompiler, Matcher, TokenMasks
from server.engine.types import RequestFailure
from tests.support.engine.grammars import (
    END,
    END_ID,
    allowed_ids,
    compiled,
    compiled_or_error,
    constraint,
    follow,
    make_compiler,
)
from tests.support.engine.harness import VOCABULARY
from tests.support.presence import present
from tests.support.waiting import wait_until


def text_of(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))


def follows(tokenizer: PreTrainedTokenizerFast, matcher: Matcher, text: str) -> bool:
    """Whether the grammar accepts exactly this text."""
    for token_id in tokenizer.encode(text):
        if token_id not in allowed_ids(TokenMasks(), matcher):
            return False
        matcher.advance(token_id)
    return matcher.is_complete


@pytest.mark.parametrize(
    ("kind", "text", "taken", "refused"),
    [
        ("choice", '["yes", "no", "yes, sir", "a.c|(d"]', ["yes", "no", "yes, sir", "a.c|(d"], ["ye", "abc", ""]),
        ("choice", '["a/b\\n", "\\"q\\"", "^x$"]', ["a/b\n", '"q"', "^x$"], ["x", "a/b"]),
        ("regex", r"\d{2}/[a-c]+", ["12/a", "99/cab"], ["1/a", "12/", "12/d"]),
        ("regex", r"^ab?$", ["a", "ab"], ["b", "^a$"]),
        ("regex", r"a\n#/b ", ["a\n#/b "], ["a"]),
        ("json_object", "", ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", '{"a":1}', "{ }"]),
        ("json_schema", '{"type": "integer"}', ["12", "-3"], ["1.5", '"1"']),
        ("json_schema", '{"enum": ["a", 1]}', ['"a"', "1"], ["a", "2"]),
        ("json_schema", '{"x-guidance": {"whitespace_flexible": true}, "type": "array"}', ["[1, 2]"], ["[ 1,2]"]),
        ("grammar", 'start: "x" item+\nitem: "1" | "2"', ["x1", "x212"], ["x", "1"]),
    ],
)
def test_what_each_kind_takes(
    kind: str,
    text: str,
    taken: list[str],
    refused: list[str],
    compiler: GrammarCompiler,
    endless: GrammarCompiler,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for own in (compiler, endless):
        for sample in taken:
            assert follows(tokenizer, compiled(own, constraint(kind, text)), sample), sample
        for sample in refused:
            assert not follows(tokenizer, compiled(own, constraint(kind, text)), sample), sample


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("regex", "(a|b", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"[^\s\S]", NO_WAY_ON),
        ("regex", "((" * 200 + "a" + "))" * 200, "nest"),
        ("regex", "é", NO_WAY_ON),  # no token of this tokenizer contains it
        ("json_schema", '{"type": "strin"}', "strin"),
        ("json_schema", "[]", "must be an object"),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}', "minLength"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"$ref": "https://example.com/schema"}', "does not fetch"),
        ("json_schema", '{"$ref": "#/$defs/absent"}', "absent"),
        ("grammar", "", "no start rule"),
        ("grammar", 'start: a\na: a "x"', NO_WAY_ON),
        ("grammar", "start: absent", "absent"),
        ("grammar", 'start: "a', "lexer error"),
        ("grammar", f'start: {"(" * 500}"a"{")" * 500}', "nested"),
    ],
)
def test_what_cannot_be_used_is_told(kind: str, text: str, reason: str, compiler: GrammarCompiler) -> None:
    error = compiled_or_error(compiler, constraint(kind, text))
    assert isinstance(error, str)
    assert reason in error
    assert len(error) <= MAX_ERROR_CHARS
    assert "no_forcing" not in error


def test_lenient_schemas_leave_out_what_cannot_be_enforced(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    schema = '{"type": "array", "uniqueItems": true, "items": {"enum": [1]}}'
    assert follows(tokenizer, compiled(compiler, constraint("json_schema", schema, is_lenient=True)), "[1, 1]")


def test_special_tokens_and_rows_without_a_token_are_never_text(
    compiler: GrammarCompiler, endless: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    for own, ends in ((compiler, [END_ID]), (endless, [])):
        matcher = compiled(own, constraint("regex", r"(?s:.*)"))
        allowed = allowed_ids(TokenMasks(), matcher)
        assert [token_id for token_id in allowed if tokenizer.decode([token_id]) in {END, "<other>", ""}] == ends
        assert max(allowed) < len(tokenizer)


def test_logits_narrower_than_the_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    compiler = make_compiler(folder, vocab_size=20)
    matcher = compiled(compiler, constraint("regex", r"[!-~]*"))
    assert allowed_ids(TokenMasks(), matcher, 20) == [END_ID, *range(2, 20)]
    compiler.close()


def test_a_finite_grammar_is_finished_with_its_last_token(
    compiler: GrammarCompiler, endless: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    for own in (compiler, endless):
        matcher = compiled(own, constraint("choice", '["ab", "abab"]'))
        for token_id in tokenizer.encode("abab"):
            assert not matcher.is_finished
            matcher.advance(token_id)
        assert matcher.is_finished
        assert matcher.error is None


def test_a_model_without_an_end_has_nothing_to_choose_where_only_that_is_left(endless: GrammarCompiler) -> None:
    matcher = compiled(endless, constraint("regex", "a{0}"))
    assert allowed_ids(TokenMasks(), matcher) == []
    assert matcher.is_complete
    assert matcher.error is None


def test_masks_of_many_matchers_are_those_of_each(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [("regex", "[a-f]+"), ("choice", '["x", "y"]'), ("json_object", ""), ("regex", "[a-f]+")]
    matchers = [compiled(compiler, constraint(*text)) for text in texts]
    matchers[3].advance(tokenizer.encode("a")[0])
    masks = TokenMasks()
    together = masks.allowed(matchers, VOCABULARY, torch.device("cpu"))
    assert together.shape == (4, VOCABULARY)
    for row, matcher in enumerate(matchers):
        assert together[row].nonzero()[:, 0].tolist() == allowed_ids(masks, matcher)
    assert not together[0, END_ID]
    assert together[3, END_ID]


def test_a_failed_matcher_allows_nothing_and_says_why(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    matcher = compiled(compiler, constraint("regex", "b+"))
    other = compiled(compiler, constraint("regex", "b+"))
    matcher.advance(tokenizer.encode("x")[0])
    assert allowed_ids(TokenMasks(), matcher) == []
    assert "doesn't satisfy the grammar" in present(matcher.error)
    assert not matcher.is_complete
    assert other.error is None


def test_a_limit_reached_on_the_way_is_an_error_of_that_matcher(compiler: GrammarCompiler) -> None:
    matcher = compiled(compiler, constraint("regex", "(([a-z]{1,20}){1,20}){1,20}"))
    follow(matcher, random.Random(0))
    assert "too many" in present(matcher.error)


# Chains of rules recurse in the compiler, and nested repetition makes automata explode; both have to end soon.
BOMBS = {
    "chain of rules": (
        "grammar",
        "start: r0\n" + "\n".join(f'r{i}: r{i + 1}|"a"' for i in range(3900)) + '\nr3900: "b"',
    ),
    "chain of references": (
        "json_schema",
        json.dumps(
            {
                "$defs": {str(i): {"type": "array", "items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1200)}
                | {"1200": {"type": "integer"}},
                "$ref": "#/$defs/0",
            }
        ),
    ),
    "doubled terminals": (
        "grammar",
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(30)) + '\nA30: "a"',
    ),
    "doubled rules": (
        "grammar",
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(30)) + '\nr30: "a"',
    ),
    "nested repetition": ("regex", "[bc](((x{100}){100}){100}){100}"),
    "long repetition": ("regex", "[bc](abcdefgh){1000000}"),
    "optional repetition": ("regex", "[xy](a?){5000}a{5000}"),
    "long text": ("regex", "a" * 60_000),
    "many optional properties": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
    ),
    "exponential choice of objects": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"a{i}{k}": {}}} for k in "xy"]} for i in range(14)]}),
    ),
    "intersections": ("grammar", "start: A\nA: /[ab]*a[ab]{12}/ & /[ab]*b[ab]{13}/ & ~/(.*abab.*){3}/"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_as_an_error_or_as_a_grammar(bomb: str, compiler: GrammarCompiler) -> None:
    matcher = compiled_or_error(compiler, constraint(*BOMBS[bomb]))
    if isinstance(matcher, str):
        assert matcher
        return
    follow(matcher, random.Random(0), longest=50, patience=50)
    assert matcher.error is None or "too" in matcher.error or "max" in matcher.error


def test_identical_constraints_are_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = make_compiler(folder)
    texts: list[str] = []
    own = structured.lark_of

    def counted(wanted: Constraint) -> str:
        texts.append(wanted.text)
        return own(wanted)

    monkeypatch.setattr(structured, "lark_of", counted)
    monkeypatch.setattr(structured, "MAX_COMPILED", 2)
    for text in ("a", "a", "b", "c", "c", "a"):
        if compiler.matcher(constraint("regex", text)) is None:
            compiled(compiler, constraint("regex", text))
        compiler.take_compiled()
    assert texts == ["a", "b", "c", "a"]
    compiler.forget(constraint("regex", "a"))
    compiled(compiler, constraint("regex", "a"))
    assert texts == ["a", "b", "c", "a", "a"]
    compiler.close()


SLOW = constraint("json_schema", '{"type": "integer", "multipleOf": 49999999}')


def outcomes(compiler: GrammarCompiler, count: int) -> dict[str, RequestFailure | None]:
    """The results of a number of constraints by their text, in order of completion."""
    ended: dict[str, RequestFailure | None] = {}

    def are_there() -> bool:
        ended.update((c.text, failure) for c, failure in compiler.take_compiled())
        return len(ended) >= count

    wait_until(are_there, 60)
    return ended


def test_a_grammar_that_takes_too_long_is_refused_and_tried_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(structured, "SLOW_SECONDS", 0.1)
    compiler = make_compiler(folder)
    assert compiled_or_error(compiler, SLOW) == structured.TOO_SLOW.message
    monkeypatch.setattr(GrammarTrials, "try_out", None)
    assert compiled_or_error(compiler, SLOW) == structured.TOO_SLOW.message
    monkeypatch.undo()
    monkeypatch.setattr(structured, "MAX_REFUSED", 0)
    assert compiled_or_error(compiler, SLOW) == structured.TOO_SLOW.message
    assert not compiler._refused
    compiler.close()


def test_slow_grammars_do_not_delay_quick_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(structured, "SLOW_SECONDS", 10_000.0)
    compiler = make_compiler(folder)
    slow = [
        constraint("json_schema", f'{{"type": "integer", "multipleOf": {49_999_991 + index}}}')
        for index in (0, 2, 6, 8)
    ]
    for one in slow:
        assert compiler.matcher(one, "flood") is None
    for index in range(3):  # quick grammars of the flooding tenant are not delayed either
        assert compiler.matcher(constraint("regex", f"a{{{index + 1}}}"), "flood" if index else "other") is None
    assert outcomes(compiler, 3) == {"a{1}": None, "a{2}": None, "a{3}": None}
    wait_until(lambda: compiler._slow.jobs.num_waiting("flood") == 3, 60)
    for one in slow:
        compiler.abandon(one)
        compiler.abandon(one)
    wait_until(lambda: compiler._slow.jobs._running is None, 60)
    assert not compiler._slow.jobs.num_waiting("flood")
    assert compiler.take_compiled() == []
    compiler.close()


def test_another_tenants_grammar_waits_for_one_of_a_flood(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = make_compiler(folder)
    go, own = threading.Event(), compiler._compile

    def wait_and_compile(*turn: Any) -> object:
        go.wait()
        return own(*turn)

    monkeypatch.setattr(compiler, "_compile", wait_and_compile)
    for index in range(20):
        compiler.matcher(constraint("regex", f"a{{{index}}}"), "flood")
    wait_until(lambda: compiler._quick.jobs._running is not None, 60)
    compiler.matcher(constraint("regex", "b"), "other")
    go.set()
    ended = list(outcomes(compiler, 21))
    assert ended.index("b") == 2
    compiler.close()


def test_waiting_constraints_of_a_tenant_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "MAX_WAITING", 2)
    compiler = make_compiler(folder)
    for _ in range(3):
        for text in "ab":
            compiler.matcher(constraint("regex", text), "x")
    with pytest.raises(structured.TooManyGrammarsError, match="2 different structures"):
        compiler.matcher(constraint("regex", "c"), "x")
    compiler.matcher(constraint("regex", "c"), "y")
    assert set(outcomes(compiler, 3)) == set("abc")
    assert compiler.matcher(constraint("regex", "d"), "x") is None
    compiler.close()


def test_compiled_grammars_are_bounded_by_their_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "MAX_COMPILED_BYTES", 4 << 20)
    compiler = make_compiler(folder)
    small = constraint("regex", "a")
    large = [constraint("json_schema", f'{{"type": "integer", "multipleOf": {49_990 + index}}}') for index in (1, 3)]
    for one in (*large, small):
        compiled_or_error(compiler, one)
    compiler.take_compiled()
    assert list(compiler._compiled) == [small]
    compiler.close()


def test_an_error_of_the_compiler_ends_waiting_sequences(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: object) -> None:
        raise BaseException("panicked")

    compiler = make_compiler(folder)
    monkeypatch.setattr(structured, "compile_grammar", panic)
    assert compiled_or_error(compiler, constraint("regex", "a")) == "it cannot be compiled: BaseException"
    monkeypatch.undo()
    compiled(compiler, constraint("regex", "a"))
    compiler.close()


def test_closing_while_grammars_are_compiled(folder: Path) -> None:
    compiler = make_compiler(folder)
    compiler.matcher(SLOW)
    wait_until(lambda: compiler._quick.trials is not None, 60)
    compiler.close()
    assert present(compiler._quick.trials)._process is None
    with pytest.raises(RuntimeError, match="after shutdown"):
        compiler.matcher(constraint("regex", "a"))


def test_a_sequences_allowance_is_spent_once(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast) -> None:
    matcher = compiled(compiler, constraint("regex", "a+"))
    (a,) = tokenizer.encode("a")
    for _ in range(5):
        matcher.charge(structured.BURST_SECONDS / 4)
        matcher.advance(a)
        matcher.charge(-structured.BURST_SECONDS)
    assert not matcher.error
    matcher.charge(structured.BURST_SECONDS * 2)
    assert matcher.error == structured.TOO_COSTLY
    assert not matcher.is_complete
    matcher.charge(-10.0)
    assert matcher.error == structured.TOO_COSTLY
    other = compiled(compiler, constraint("regex", "a+"))
    masks = TokenMasks()
    for _ in range(2):
        allowed = masks.allowed([matcher, other], VOCABULARY, torch.device("cpu"))
        assert not allowed[0].any()
        assert allowed[1, a]
        masks._is_metered = True


def test_a_slow_tokenizer_and_none_at_all_are_refused(folder: Path, tmp_path: Path) -> None:
    compiler = GrammarCompiler(object, vocab_size=VOCABULARY, eos_token_ids=())  # type: ignore[arg-type]
    assert compiled_or_error(compiler, constraint("json_object")) == (
        "structured output needs a fast tokenizer, and the model's is a object"
    )
    compiler.close()
    compiler = make_compiler(tmp_path)
    assert "tokenizer cannot be loaded" in str(compiled_or_error(compiler, constraint("json_object")))
    compiler.close()


atoms = st.sampled_from(["a", "b", "[a-f]", r"\d", "x|y", "true", r"\.", "[^a]", r"\w", "(?:ab){2}"])
regexes = st.recursive(
    atoms.map(lambda atom: f"(?:{atom})"),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(regex=regexes, seed=st.integers(0, 99))
def test_what_follows_a_regex_matches_it(
    regex: str, seed: int, compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    matcher = compiled(compiler, constraint("regex", regex))
    token_ids = follow(matcher, random.Random(seed))
    assert matcher.error is None
    if matcher.is_finished:
        assert re.fullmatch(regex, text_of(tokenizer, token_ids))


@settings(deadline=None, max_examples=40)
@given(
    choices=st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1), min_size=1, max_size=8)
)
def test_what_follows_a_choice_is_one_of_it(
    choices: list[str], compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    matcher = compiled(compiler, constraint("choice", json.dumps(choices)))
    assert text_of(tokenizer, follow(matcher, random.Random(0), patience=0)) in choices


scalars = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "integer", "minimum": -3, "maximum": 12},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 5},
        {"type": "string", "pattern": "^[a-c]{1,4}$"},
        {"enum": ["x", 1, None]},
        {"const": "abab"},
        {"type": "integer", "multipleOf": 3},
    ]
)
names = st.sampled_from(["a", "b", "ab", "true", "x y"])


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(names, inner, min_size=1, max_size=3).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties))).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )


schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        objects(inner),
        inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 3}),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=80)
@given(schema=schemas, seed=st.integers(0, 99))
def test_what_follows_a_schema_validates(
    schema: dict[str, Any], seed: int, compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    matcher = compiled(compiler, constraint("json_schema", json.dumps(schema)))
    token_ids = follow(matcher, random.Random(seed))
    assert matcher.error is None
    if matcher.is_finished:
        jsonschema.validate(json.loads(text_of(tokenizer, token_ids)), schema)
