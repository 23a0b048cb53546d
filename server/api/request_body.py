"""What all JSON bodies, and the objects in them, have in common."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, model_validator


class RequestBody(BaseModel):
    """A JSON object whose explicit nulls mean the same as absence, and whose unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def check_unicode(texts: Sequence[str]) -> None:
    """JSON can spell half of a surrogate pair; that is no text, and no tokenizer takes it.

    Raises:
        ValueError: If one of them has such a half.
    """
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"should be Unicode: character {error.start} is half of a surrogate pair") from error
