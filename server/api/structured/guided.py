"""``guided_*``: vLLM's older names of ``structured_outputs``, which clients still send."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationError

from server.api.request_body import RequestBody, first_message
from server.api.structured.structured_outputs import MAX_CHOICE_STRINGS, SchemaOrText, StructuredOutputs
from server.engine.constraints import Constraint
from server.errors import InvalidRequestError

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""Name in ``structured_outputs`` by older name."""


class GuidedBody(RequestBody):
    """Structured output by its older names."""

    guided_json: Annotated[SchemaOrText | None, BeforeValidator(lambda value: None if value == "" else value)] = (
        Field(None, description="Same as `structured_outputs.json`.")
    )
    guided_regex: str | None = Field(None, description="Same as `structured_outputs.regex`.")
    guided_choice: Annotated[list[str] | None, Field(max_length=MAX_CHOICE_STRINGS)] = Field(
        None, description="Same as `structured_outputs.choice`."
    )
    guided_grammar: str | None = Field(None, description="Same as `structured_outputs.grammar`.")

    @property
    def guided_constraints(self) -> list[tuple[str, Constraint]]:
        """The given constraints, each with its field.

        Raises:
            InvalidRequestError: If ``structured_outputs`` does not accept one.
        """
        found = []
        for name, key in GUIDED.items():
            value = getattr(self, name)
            if value is None or value in ("", []):  # some clients send all fields, even unused ones
                continue
            try:
                constraint = StructuredOutputs.model_validate({key: value}).constraint
            except ValidationError as error:
                raise InvalidRequestError(f"{name}: {first_message(error)}", param=name) from error
            if constraint is not None:
                found.append((name, constraint))
        return found
