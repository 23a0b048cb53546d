"""Text that is generated under an accepted schema is valid by jsonschema."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.api.generation.tools import Tool, forced_constraint
from server.api.structured.schema_checks import check_schema
from server.api.structured.structured_outputs import schema_constraint
from server.engine.constraints import Constraint
from server.engine.sampling.grammar_check import GrammarError, compile_grammar
from server.engine.sampling.grammar_trials import GrammarTrials, TooSlowError
from server.engine.sampling.grammars import GrammarVocabulary, Matcher, lark_of
from server.engine.sampling.trial_process import Vocabulary, make_tokenizer
from tests.support.engine.grammars import END_ID, follow, save_tokenizer
from tests.support.presence import present

pytestmark = pytest.mark.slow


class Writer:
    """Writes random texts under a constraint, without a model."""

    def __init__(self, path: Path) -> None:
        self.tokenizer: PreTrainedTokenizerFast = save_tokenizer(path)
        source = Vocabulary(self.tokenizer.backend_tokenizer.to_str(), len(self.tokenizer), [END_ID])
        self.vocabulary = GrammarVocabulary(make_tokenizer(source), None, source)
        self.trials = GrammarTrials(source)

    def write(self, constraint: Constraint, seed: int, *, patience: int = 12) -> Any:
        """A random value; raises GrammarError if the constraint is refused, TimeoutError if the text does not end."""
        lark = lark_of(constraint)
        self.trials.try_out(lark, 10, threading.Event())  # like the engine, because some schemas crash the compiler
        matcher = Matcher(compile_grammar(self.vocabulary.lowlevel, lark), self.vocabulary)
        token_ids = follow(matcher, random.Random(seed), longest=200, patience=patience)
        if matcher.error is not None:
            raise GrammarError(matcher.error)
        if not matcher.is_finished:
            raise TimeoutError
        return json.loads(str(self.tokenizer.decode(token_ids, skip_special_tokens=True)))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writer]:
    writer = Writer(tmp_path_factory.mktemp("tokenizer"))
    yield writer
    writer.trials.release()


ends = st.sampled_from([2**53, 2**60, 2**62, 2**63 - 1, 2**63, 10**17, 10**18, 0])
big = st.builds(lambda end, off, sign: sign * (end + off), ends, st.integers(-3, 3), st.sampled_from([1, -1]))
small = st.sampled_from([0, 1, -1, 0.5, 0.001, -0.001, 10, 100, 0.1, 1e-7, 2.5, -2.5, 99.99, 7, -10, 123456.789])
numbers = st.one_of(small, big, big.map(float))
lowers, uppers = st.sampled_from(["minimum", "exclusiveMinimum"]), st.sampled_from(["maximum", "exclusiveMaximum"])


@st.composite
def ranges(draw: st.DrawFn) -> dict[str, Any]:
    low, high = sorted((draw(numbers), draw(numbers)))
    if draw(st.booleans()):  # close bounds, to find rounding errors
        high = low + draw(st.integers(0, 4))
    bounds = {draw(lowers): low, draw(uppers): high}
    if draw(st.integers(0, 4)) == 0:
        bounds.popitem()
    schema = {"type": draw(st.sampled_from(["integer", "number"]))} | bounds
    return {"allOf": [{key: value} for key, value in schema.items()]} if draw(st.integers(0, 4)) == 0 else schema


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), numbers, st.floats(allow_nan=False, allow_infinity=False),
        st.integers(-(2**70), 2**70), st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=4),
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=4,
)  # fmt: skip
strings = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={
        "pattern": st.sampled_from(["^a+$", "^[a-c]{2,3}$", "b", "^x|y$", r"^\d\.\d$", "^(ab)*$"]),
        "minLength": st.integers(0, 3),
        "maxLength": st.integers(3, 5),
    },
)
leaves = st.one_of(
    ranges(),
    values.map(lambda value: {"const": value}),
    st.lists(values, min_size=1, max_size=3).map(lambda choices: {"enum": choices}),
    strings,
    st.builds(
        lambda divisor, low, high: {"type": "integer", "multipleOf": divisor, "minimum": low, "maximum": high},
        st.sampled_from([1, 2, 3, 7, 2.5, 0.5]),
        st.integers(-20, 0),
        st.integers(20, 60),
    ),
)
names = st.sampled_from(["a", "b", "minimum", "$ref", "const"])
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(names, inner, min_size=1, max_size=2).map(
            lambda own: {"type": "object", "properties": own, "required": list(own)}
        ),
        inner.map(lambda item: {"type": "array", "items": item, "minItems": 1, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
        inner.map(lambda item: {"$ref": "#/$defs/x", "$defs": {"x": item}}),
    ),
    max_leaves=3,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas, seed=st.integers(0, 99))
def test_generated_text_validates_or_the_schema_is_refused(schema: dict[str, Any], seed: int, writer: Writer) -> None:
    try:
        check_schema(schema)
        value = writer.write(schema_constraint(schema, is_strict=True), seed)
    except (ValueError, GrammarError, TooSlowError, TimeoutError):
        pass
    else:
        jsonschema.Draft202012Validator(schema).validate(value)


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}
OTHER = {"type": "null"}


def holding(reference: str, definitions: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"p": {"$ref": reference}},
        "required": ["p"],
        "$defs": definitions,
    } | more


PARAMETERS = {
    "plain": holding("#/$defs/P", {"P": POINT}),
    "identified": holding("#/$defs/P", {"P": POINT}, **{"$id": "https://example.com/a.json"}),
    "identified with a fragment": holding("#/$defs/P", {"P": POINT}, **{"$id": "https://example.com/a.json#"}),
    "by its own name": holding("https://example.com/a#/$defs/P", {"P": POINT}, **{"$id": "https://example.com/a"}),
    "anchored": holding("#pp", {"P": POINT | {"$anchor": "pp"}}),
    "anchored by name": holding(
        "https://example.com/a#pp", {"P": POINT | {"$anchor": "pp"}}, **{"$id": "https://example.com/a"}
    ),
    "identified inside": holding("point.json", {"P": POINT | {"$id": "point.json"}}),
    "identified from the root": holding("/point.json", {"P": POINT | {"$id": "/point.json"}}),
    "escaped": holding("#/$defs/a~1b%20c", {"a/b c": POINT}),
    "recursive": {
        "type": "object",
        "properties": {"p": POINT, "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["p", "next"],
    },
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"p": {"$ref": "#/definitions/P"}},
        "required": ["p"],
        "definitions": {"P": POINT},
    },
}


def tool(name: str, parameters: dict[str, Any]) -> Tool:
    function = {"name": name, "parameters": parameters, "strict": True}
    return Tool.model_validate({"type": "function", "function": function})


@pytest.mark.parametrize("name", PARAMETERS)
def test_references_in_combined_function_schemas_are_kept(name: str, writer: Writer) -> None:
    own = PARAMETERS[name]
    # The other schema has the same reference to another definition.
    other = json.loads(json.dumps(own).replace(json.dumps(POINT)[1:-1], json.dumps(OTHER)[1:-1]))
    assert other != own
    parameters = {"f": own, "F": other}
    constraint = present(
        forced_constraint([tool(called, schema) for called, schema in parameters.items()], "required")
    )
    calls = []
    for seed in range(16):
        try:
            calls.append(writer.write(constraint, seed, patience=30))
        except TimeoutError:
            continue
        jsonschema.Draft202012Validator(parameters[calls[-1]["name"]]).validate(calls[-1]["arguments"])
    assert {call["name"] for call in calls} == {"f", "F"}
