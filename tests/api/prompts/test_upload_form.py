"""The text fields of an upload: every error is a 400 that names its field."""

from __future__ import annotations

import pytest

from prompt_store.formats import FormatType, PromptFormat, SamplingDefaults
from prompt_store.types import Lineage, TaskType
from server.api.prompts.upload_form import MAX_DESCRIPTION_CHARS, MAX_TAGS, UploadForm
from server.errors import InvalidRequestError


def test_missing_fields_have_defaults() -> None:
    form = UploadForm.parse({"id": ["p"]})
    assert (form.id, form.alias, form.description, form.tags) == ("p", "latest", "", ())
    assert (form.metadata, form.lineage) == ({}, Lineage())
    assert (form.shared, form.allow_other_base, form.task_type) == (False, False, None)


def test_an_empty_field_counts_as_absent() -> None:
    empty = {name: [""] for name in UploadForm.model_fields if name != "id"}
    assert UploadForm.parse({"id": ["p"], **empty}) == UploadForm.parse({"id": ["p"]})


def test_all_fields_are_parsed() -> None:
    form = UploadForm.parse(
        {
            "id": ["p"],
            "alias": ["canary"],
            "description": ["text"],
            "tags": ["a, b", "c,a"],
            "metadata": ['{"x": [1]}'],
            "lineage": ['{"parent": "p@1", "scores": {"accuracy": 1}}'],
            "shared": ["true"],
            "allow_other_base": ["false"],
            "task_type": ["SEQ_CLS"],
            "format": ['{"type": "template", "template": "Q: {{ text }}", "sampling": {"stop": "."}}'],
        }
    )
    assert (form.alias, form.description, form.tags) == ("canary", "text", ("a", "b", "c"))
    assert form.format == PromptFormat(
        FormatType.TEMPLATE, template="Q: {{ text }}", sampling=SamplingDefaults(stop=(".",))
    )
    assert form.metadata == {"x": [1]}
    assert form.lineage == Lineage(parent="p@1", scores={"accuracy": 1.0})
    assert (form.shared, form.allow_other_base, form.task_type) == (True, False, TaskType.SEQ_CLS)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("id", [], "the name of the soft prompt is missing"),
        ("id", [""], "name '' is not valid"),
        ("id", ["p", "q"], "sent 2 times"),
        ("alias", ["7"], "digits only"),
        ("description", ["x" * (MAX_DESCRIPTION_CHARS + 1)], "at most 4096 characters, not 4097"),
        ("description", ["a\0"], "NUL characters are not allowed"),
        ("tags", ["A"], "tag 'A' is not valid"),
        ("tags", [f"t{number}" for number in range(MAX_TAGS + 1)], "at most 32, not 33"),
        ("format", ["row"], "not valid JSON"),
        ("format", ["template"], "format.template is missing"),
        ("format", ['{"type": "template", "template": "{{ x }}"}'], "the only variable is text"),
        ("metadata", ["{"], "not valid JSON"),
        ("metadata", ["[]"], "must be a JSON object"),
        ("metadata", ["[" * 100_000], "not valid JSON"),
        ("metadata", ['{"a": NaN}'], "not valid JSON"),
        ("lineage", ["[]"], "must be a JSON object"),
        ("lineage", ['{"run": 1}'], "lineage has no field 'run'"),
        ("shared", ["yes"], "must be true or false, not 'yes'"),
        ("allow_other_base", ["1"], "must be true or false, not '1'"),
        ("task_type", ["x"], "must be CAUSAL_LM or SEQ_CLS, not 'x'"),
        ("task_type", ["SEQ_CLS", "SEQ_CLS"], "sent 2 times"),
    ],
)
def test_every_fault_names_its_field(field: str, values: list[str], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        UploadForm.parse({"id": ["p"], field: values})
    assert caught.value.param == field
    assert caught.value.message.startswith(f"{field}: ")
    assert message in caught.value.message


def test_every_field_of_the_form_is_described() -> None:
    properties = UploadForm.schema_with_files()["properties"]
    assert properties.keys() == {*UploadForm.model_fields, "files"}
    assert all(schema["description"] for schema in properties.values())
