"""The text fields of an upload."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, PlainValidator, ValidationError, model_validator

from prompt_store.files.strict_json import parse_json
from prompt_store.types import CONFIG_FILE, DEFAULT_ALIAS, WEIGHTS_FILE, Lineage, TaskType, check_name
from server.api.http.multipart import FILES_FIELD
from server.api.request_body import first_message
from server.errors import InvalidRequestError

MAX_TAGS = 32
MAX_JSON_DEPTH = 31
MAX_DESCRIPTION_CHARS = 4096


def _description(text: str) -> str:
    if len(text) > MAX_DESCRIPTION_CHARS:
        raise ValueError(f"at most {MAX_DESCRIPTION_CHARS} characters, not {len(text)}")
    if "\0" in text:  # PostgreSQL cannot store it
        raise ValueError("NUL characters are not allowed")
    return text


def _tags(values: list[str]) -> tuple[str, ...]:
    """Read repeated fields, comma-separated lists, or both."""
    words = [word.strip() for value in values for word in value.split(",")]
    tags = tuple(dict.fromkeys(check_name(word, "tag") for word in words if word))
    if len(tags) > MAX_TAGS:
        raise ValueError(f"at most {MAX_TAGS}, not {len(tags)}")
    return tags


def _json_object(text: str) -> dict[str, object]:
    try:
        value = parse_json(text, max_depth=MAX_JSON_DEPTH)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could not be sent back
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"must be true or false, not {text[:100]!r}")
    return text == "true"


def _task_type(text: str) -> TaskType:
    if text not in TaskType.__members__:
        raise ValueError(f"must be {' or '.join(TaskType)}, not {text[:100]!r}")
    return TaskType(text)


Switch = Annotated[bool, PlainValidator(_switch, json_schema_input_type=bool)]


class UploadForm(BaseModel):
    """The text fields of an upload. An empty text means absence, except for ``id``."""

    id: Annotated[str, AfterValidator(lambda text: check_name(text, "name"))] = Field(
        description="The soft prompt's name."
    )
    alias: Annotated[str, AfterValidator(lambda text: check_name(text, "alias"))] = Field(
        DEFAULT_ALIAS, description="The alias to point at the new version; default: `latest`."
    )
    description: Annotated[str, AfterValidator(_description)] = Field("", description="Free text.")
    tags: Annotated[tuple[str, ...], PlainValidator(_tags, json_schema_input_type=list[str])] = Field(
        (), description="Tags to filter by: repeated fields, comma-separated lists, or both."
    )
    metadata: Annotated[dict[str, object], PlainValidator(_json_object, json_schema_input_type=str)] = Field(
        {}, description="A JSON object of the uploader."
    )
    lineage: Annotated[
        Lineage, PlainValidator(lambda text: Lineage.parse(_json_object(text)), json_schema_input_type=str)
    ] = Field(
        Lineage(),
        description="A JSON object: training_run, parent (NAME@VERSION), dataset_digest, scores (numbers by name).",
    )
    shared: Switch = Field(False, description="Share it with all tenants; needs the scope admin.")
    allow_other_base: Switch = Field(False, description="Accept files that name another base model.")
    task_type: Annotated[
        TaskType | None, PlainValidator(_task_type, json_schema_input_type=Literal["CAUSAL_LM", "SEQ_CLS"])
    ] = Field(None, description=f"Task type, if {CONFIG_FILE} does not state it.")

    @model_validator(mode="before")
    @classmethod
    def _take_single_texts(cls, texts: dict[str, list[str]]) -> dict[str, str | list[str]]:
        if not texts.get("id"):
            raise InvalidRequestError("id: the name of the soft prompt is missing", param="id")
        for field, values in texts.items():
            if field != "tags" and len(values) > 1:
                raise InvalidRequestError(f"{field}: sent {len(values)} times", param=field)
        return {
            field: values if field == "tags" else values[0]
            for field, values in texts.items()
            if field == "id" or any(values)
        }

    @classmethod
    def parse(cls, texts: Mapping[str, list[str]]) -> Self:
        """Read the values of each field.

        Raises:
            InvalidRequestError: If a field is missing, repeated or invalid; the field is named.
        """
        try:
            return cls.model_validate(texts)
        except ValidationError as error:
            field = str(error.errors()[0]["loc"][0])
            raise InvalidRequestError(f"{field}: {first_message(error)}", param=field) from error

    @classmethod
    def schema_with_files(cls) -> dict[str, Any]:
        """The JSON schema of the whole form."""
        texts = {
            name: {key: value for key, value in schema.items() if key not in ("title", "default")}
            for name, schema in cls.model_json_schema()["properties"].items()
        }
        files = {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "description": f"{CONFIG_FILE} and {WEIGHTS_FILE}, by filename.",
        }
        return {"type": "object", "required": ["id", FILES_FIELD], "properties": {**texts, FILES_FIELD: files}}
