"""The text fields of an upload."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import ErrorDetails

from prompt_store.changes import ImportedVersion
from prompt_store.errors import Fault
from prompt_store.files.strict_json import parse_json
from prompt_store.formats import FormatType, PromptFormat
from prompt_store.types import CONFIG_FILE, DEFAULT_ALIAS, WEIGHTS_FILE, Lineage, PromptRef, TaskType, check_name
from server.api.http.multipart import FILES_FIELD
from server.api.inference.format_templates import check_template
from server.api.prompts.bodies import check_reason
from server.errors import InvalidRequestError

MAX_TAGS = 32
MAX_JSON_DEPTH = 31
MAX_DESCRIPTION_CHARS = 4096


def check_description(text: str) -> str:
    """Return a description unchanged; ValueError if it is too long or cannot be stored."""
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


def _format(text: str) -> PromptFormat:
    return check_format(text if text in list(FormatType) else _json_object(text))


def check_format(value: object) -> PromptFormat:
    """Check a format in JSON; ValueError if it is not one, or its template is not valid."""
    found = PromptFormat.parse(value)
    if found.template is not None:
        try:
            check_template(found.template)
        except ValueError as error:
            raise ValueError(f"the template is not valid: {error}") from error
    return found


def _number(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise ValueError(f"must be a number from {least} to {most}, not {text[:100]!r}")
    return int(text)


def _over(text: str) -> str:
    ref = PromptRef.parse(text)
    if ref.version is None:
        raise ValueError(f"must name a version, NAME@VERSION, not {text[:200]!r}")
    return str(ref)


Switch = Annotated[bool, PlainValidator(_switch, json_schema_input_type=bool)]


class UploadForm(BaseModel):
    """The text fields of an upload. An empty text means absence, except for ``id``."""

    id: Annotated[str, AfterValidator(lambda text: check_name(text, "name"))] = Field(
        "", description="The soft prompt's name; empty only in a dry run."
    )
    alias: Annotated[str, AfterValidator(lambda text: check_name(text, "alias"))] = Field(
        DEFAULT_ALIAS, description="The alias to point at the new version; default: `latest`."
    )
    description: Annotated[str, AfterValidator(check_description)] = Field("", description="Free text.")
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
    format: Annotated[PromptFormat | None, PlainValidator(_format, json_schema_input_type=str)] = Field(
        None,
        description="How the version wants to be asked: `raw`, `chat`, or a JSON object with `type` (raw, chat, "
        "template), and optional `separator`, `system` (chat), `template` (Jinja) and `sampling` (max_tokens, "
        "temperature, stop).",
    )
    dry_run: Switch = Field(
        False,
        description="Store nothing: answer with what would be stored, or with the error of a real upload. `id` may "
        "be left out.",
    )
    shared: Switch = Field(False, description="Share it with all tenants; needs the scope admin.")
    allow_other_base: Switch = Field(False, description="Accept files that name another base model.")
    task_type: Annotated[
        TaskType | None, PlainValidator(_task_type, json_schema_input_type=Literal["CAUSAL_LM", "SEQ_CLS"])
    ] = Field(None, description=f"Task type, if {CONFIG_FILE} does not state it.")

    over: Annotated[str, AfterValidator(_over)] | None = Field(
        None, description="NAME@VERSION of the adapter that a soft prompt was trained over; it is used with it."
    )
    version: Annotated[
        int | None, PlainValidator(lambda text: _number(text, 1, 2**63 - 1), json_schema_input_type=int)
    ] = Field(None, description="Number of a version of another server, to import it; no alias is moved.")
    created_at: Annotated[
        int | None, PlainValidator(lambda text: _number(text, 0, 2**36), json_schema_input_type=int)
    ] = Field(None, description="When it was published there; Unix time in seconds. Only with `version`.")
    created_by: Annotated[str | None, AfterValidator(lambda text: text and check_reason(text))] = Field(
        None, description="API key that published it there. Only with `version`."
    )

    @property
    def imported(self) -> ImportedVersion | None:
        """What the version was on another server; None for a new version."""
        if self.version is None:
            return None
        now = int(time.time())
        created_at = now if self.created_at is None else min(self.created_at, now)
        return ImportedVersion(self.version, created_at * 1_000_000, self.created_by)

    @model_validator(mode="before")
    @classmethod
    def _take_single_texts(cls, texts: dict[str, list[str]]) -> dict[str, str | list[str]]:
        is_dry = texts.get("dry_run") == ["true"]
        if not texts.get("id") and not is_dry:
            raise InvalidRequestError("id: the name of the soft prompt is missing", param="id")
        for field, values in texts.items():
            if field != "tags" and len(values) > 1:
                raise InvalidRequestError(f"{field}: sent {len(values)} times", param=field)
        return {
            field: values if field == "tags" else values[0]
            for field, values in texts.items()
            if any(values) or (field == "id" and not is_dry)
        }

    @classmethod
    def parse(cls, texts: Mapping[str, list[str]]) -> UploadForm:
        """Read the values of each field.

        Raises:
            InvalidRequestError: If fields are missing, repeated or invalid; it names the first.
        """
        return ReadForm.read(texts).required

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


@dataclass(frozen=True, slots=True)
class ReadForm:
    """The text fields of an upload as they came, so that their faults can be reported with those of the files.

    Attributes:
        form: The fields; None if one is at fault.
        faults: All faults.
        task_type: The stated task type, if it is valid.
        allow_other_base: Whether it is stated.
    """

    form: UploadForm | None
    faults: tuple[Fault, ...] = ()
    task_type: TaskType | None = None
    allow_other_base: bool = False

    @classmethod
    def read(cls, texts: Mapping[str, list[str]]) -> Self:
        """Read the values of each field."""
        try:
            form = UploadForm.model_validate(texts)
        except InvalidRequestError as error:
            faults = [Fault("invalid_field", error.message, field=error.param)]
        except ValidationError as error:
            faults = [_fault(one) for one in error.errors(include_url=False, include_input=False)]
        else:
            return cls(form, (), form.task_type, form.allow_other_base)
        task_type = TaskType.__members__.get("".join(texts.get("task_type", ())))
        return cls(None, tuple(faults), task_type, texts.get("allow_other_base") == ["true"])

    @property
    def required(self) -> UploadForm:
        """The fields.

        Raises:
            InvalidRequestError: If one is at fault; it names the first, and ``details`` has all.
        """
        if self.form is not None:
            return self.form
        first = self.faults[0]
        error = InvalidRequestError(first.message, param=first.field)
        error.details = [
            {"code": fault.code, "message": fault.message, "file": None, "field": fault.field}
            for fault in self.faults
        ]
        raise error


def _fault(item: ErrorDetails) -> Fault:
    field = str(item["loc"][0])
    return Fault("invalid_field", f"{field}: {item['msg'].removeprefix('Value error, ')}", field=field)
