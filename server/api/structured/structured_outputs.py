"""``response_format`` and ``structured_outputs``: constraints on the generated text, and their bounds.

The engine compiles constraints and reports errors of compilation. Only quick checks are made here: types, sizes,
depths, and the few things that no limit of the compiler covers.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PlainValidator, model_validator

from prompt_store.files.strict_json import parse_json
from server.api.request_body import RequestBody, half_pair_in
from server.api.structured.closed_schemas import closed
from server.api.structured.schema_checks import MAX_CONSTRAINT_CHARS, check_grammar, check_schema, text_of
from server.engine.constraints import Constraint, ConstraintKind
from server.errors import UnsupportedError

MAX_CHOICE_STRINGS = 1024
MAX_CHOICE_CHARS = 1024
MAX_REGEX_CHARS = 8192


def schema_constraint(schema: dict[str, Any], *, is_strict: bool) -> Constraint:
    """Constrain the text to a schema; without ``is_strict``, keywords that cannot be enforced are ignored.

    Objects get no additional properties unless the schema mentions them.
    """
    return Constraint(kind=ConstraintKind.JSON_SCHEMA, text=text_of(closed(schema)), is_lenient=not is_strict)


def _schema(value: object) -> dict[str, Any]:
    """A schema as an object, or as its JSON."""
    if isinstance(value, str):
        if len(value) > MAX_CONSTRAINT_CHARS:
            raise ValueError(f"should have at most {MAX_CONSTRAINT_CHARS} characters")
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError("should be a JSON schema: an object, or a string that holds one") from error
    if not isinstance(value, dict):
        raise ValueError("should be a JSON schema: an object, or a string that holds one")
    if half_pair_in(value) is not None:
        raise ValueError("should be Unicode: its JSON has half of a surrogate pair")
    return check_schema(value)


def _choice(value: list[str]) -> list[str]:
    if not all(0 < len(item) <= MAX_CHOICE_CHARS for item in value):
        raise ValueError(f"should hold strings of 1 to {MAX_CHOICE_CHARS} characters")
    if sum(map(len, value)) > MAX_CONSTRAINT_CHARS:
        raise ValueError(f"should have at most {MAX_CONSTRAINT_CHARS} characters together")
    return value


Schema = Annotated[dict[str, Any], AfterValidator(check_schema)]
SchemaOrText = Annotated[dict[str, Any], PlainValidator(_schema, json_schema_input_type=dict[str, Any] | str)]


class JsonSchemaFormat(RequestBody):
    """A JSON schema in OpenAI's format."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="Name of the schema; it has no effect.")
    schema_: Schema = Field(alias="schema", description="The JSON schema.")
    strict: bool = Field(
        False, description="Reject schema keywords that cannot be enforced instead of ignoring them."
    )


class ResponseFormat(RequestBody):
    """Structured output, in OpenAI's format."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`text`: any text; `json_object`: any JSON object; `json_schema`: JSON that satisfies the schema."
    )
    json_schema: JsonSchemaFormat | None = Field(None, description="The schema; required with type `json_schema`.")

    @model_validator(mode="after")
    def _check_json_schema(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema is required with type json_schema, and not allowed otherwise")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """The required structure of the text; None for any text."""
        if self.json_schema is not None:
            return schema_constraint(self.json_schema.schema_, is_strict=self.json_schema.strict)
        return Constraint(kind=ConstraintKind.JSON_OBJECT) if self.type == "json_object" else None


class StructuredOutputs(RequestBody):
    """Structured output in vLLM's format: one of these fields."""

    choice: Annotated[
        list[str] | None,
        Field(
            min_length=1,
            max_length=MAX_CHOICE_STRINGS,
            fail_fast=True,
            description="The allowed texts; the output is one of them.",
        ),
        AfterValidator(_choice),
    ] = None
    regex: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_REGEX_CHARS,
        description="Regular expression in Rust's syntax; it must match the whole text.",
    )
    json_: SchemaOrText | None = Field(None, alias="json", description="JSON schema, as an object or a string.")
    json_object: bool = Field(False, description="Allow any JSON object.")
    grammar: Annotated[
        str | None,
        Field(min_length=1, max_length=MAX_CONSTRAINT_CHARS, description="Grammar in llguidance's Lark syntax."),
        AfterValidator(check_grammar),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: object) -> object:
        for name in ("structural_tag", "whitespace_pattern"):
            if isinstance(value, dict) and value.get(name) is not None:
                param = f"structured_outputs.{name}"
                raise UnsupportedError(f"{param}: not supported by this server; leave it out", param=param)
        return value

    @model_validator(mode="after")
    def _check_single_field(self) -> Self:
        given = [self.choice, self.regex, self.json_, self.grammar, self.json_object or None]
        if len(given) - given.count(None) > 1:
            raise ValueError("should have only one of choice, regex, json, json_object and grammar")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """The required structure of the text; None for any text."""
        if self.choice is not None:
            return Constraint(kind=ConstraintKind.CHOICE, text=json.dumps(self.choice))
        if self.regex is not None:
            return Constraint(kind=ConstraintKind.REGEX, text=self.regex)
        if self.json_ is not None:
            return schema_constraint(self.json_, is_strict=True)
        if self.grammar is not None:
            return Constraint(kind=ConstraintKind.GRAMMAR, text=self.grammar)
        return Constraint(kind=ConstraintKind.JSON_OBJECT) if self.json_object else None
