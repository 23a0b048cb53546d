"""A malformed upload is always a client error and never a server error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from prompt_store.open_store import open_store
from prompt_store.store import PromptStore
from prompt_store.types import BaseModelSpec
from server.api.errors import describe
from server.api.http.multipart import UploadParser
from server.api.prompts.upload_form import UploadForm

BASE = BaseModelSpec("tiny", 32, 2, 2, 8, 64, "float32")
BOUNDARY = "XboundaryX"
CONFIG = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
WEIGHTS = save({"prompt_embeddings": np.ones((4, 32), np.float32)})

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
field_texts = st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode())


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
    return f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + data + b"\r\n"


def body(parts: list[bytes]) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


VALID = body(
    [
        part("id", b"p"),
        part("files", json.dumps(CONFIG).encode(), "adapter_config.json"),
        part("files", WEIGHTS, "adapter_model.safetensors"),
    ]
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptStore]:
    opened = open_store(tmp_path_factory.mktemp("fuzz"), max_upload_bytes=64 * 1024)
    yield opened
    opened.close()


def send(store: PromptStore, data: bytes, piece: int = 1000) -> int:
    """The status of an upload of these bytes."""
    with store.upload() as upload:
        try:
            parser = UploadParser(f"multipart/form-data; boundary={BOUNDARY}", upload.open, UploadForm.model_fields)
            for start in range(0, len(data), piece):
                parser.feed(data[start : start + piece])
            form = UploadForm.parse(parser.texts())
            _, is_new = store.publish(
                upload,
                name=form.id,
                base=BASE,
                require_same_base=not form.allow_other_base,
                task_type=form.task_type,
                alias=form.alias,
                description=form.description,
                tags=form.tags,
                metadata=form.metadata,
                lineage=form.lineage,
            )
        except Exception as error:
            return describe(error, request_id="fuzz").status
        return 201 if is_new else 200


def test_the_valid_upload_is_accepted(store: PromptStore) -> None:
    assert send(store, VALID, piece=7) == 201
    assert send(store, VALID) == 200


@pytest.mark.parametrize(
    "field",
    [
        ("metadata", b'{"a": 1e999}'),
        ("metadata", b'{"a": NaN}'),
        ("metadata", b'{"a": ' + b"9" * 5000 + b"}"),
        ("metadata", b"[" * 30_000),
        ("lineage", b'{"scores": {"a": 1e999}}'),
        ("lineage", b'{"parent": "p"}'),
        ("lineage", b'{"run": "p"}'),
        ("lineage", b"[]"),
        ("metadata", b'{"a": "\\ud800"}'),
        ("metadata", b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}"),
        ("lineage", b'{"training_run": "\\ud800"}'),
        ("lineage", b'{"scores": {"a": 1' + b"0" * 400 + b"}}"),
        ("description", b"a\0b"),
        ("description", b"\xff"),
    ],
    ids=lambda field: field[1][:24],
)
def test_fields_that_no_catalog_can_store_are_refused(store: PromptStore, field: tuple[str, bytes]) -> None:
    files = [part("files", json.dumps(CONFIG).encode(), "adapter_config.json")]
    files += [part("files", WEIGHTS, "adapter_model.safetensors")]
    assert send(store, body([part("id", b"p"), part(*field), *files])) == 400


@given(st.binary(max_size=300), st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(store: PromptStore, data: bytes, piece: int) -> None:
    assert send(store, data, piece) == 400


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_mutated_upload_is_never_a_server_error(store: PromptStore, data: st.DataObject) -> None:
    changed = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 5))):
        position = data.draw(st.integers(0, len(changed) - 1))
        match data.draw(st.sampled_from(["replace", "insert", "cut"])):
            case "replace":
                changed[position] = data.draw(st.integers(0, 255))
            case "insert":
                changed[position:position] = data.draw(st.binary(max_size=20))
            case "cut":
                del changed[position : position + data.draw(st.integers(1, 60))]
    assert send(store, bytes(changed)) in {200, 201, 400, 413, 415}


FIELDS = ["id", "alias", "description", "tags", "metadata", "lineage", "shared", "allow_other_base", "task_type"]


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(FIELDS), field_texts))
@settings(max_examples=300, deadline=None)
def test_arbitrary_fields_are_never_a_server_error(store: PromptStore, fields: dict[str, bytes]) -> None:
    parts = [part(name, data) for name, data in fields.items() if BOUNDARY.encode() not in data]
    parts += [part("files", json.dumps(CONFIG).encode(), "adapter_config.json")]
    parts += [part("files", WEIGHTS, "adapter_model.safetensors")]
    assert send(store, body(parts)) in {200, 201, 400}


SPEAKING = st.dictionaries(
    st.sampled_from(["task_type", "auto_mapping", "modules_to_save", "base_model_name_or_path", "peft_type"]),
    json_values,
)
"""Configuration fields that are compared with the uploader's fields."""


@pytest.mark.slow
@given(json_values | SPEAKING, st.sampled_from([b"", b"CAUSAL_LM", b"SEQ_CLS"]), st.sampled_from([b"", b"true"]))
@settings(max_examples=300, deadline=None)
def test_arbitrary_configurations_are_never_a_server_error(
    store: PromptStore, value: object, task: bytes, other_base: bytes
) -> None:
    config = {**CONFIG, **value} if isinstance(value, dict) else value
    parts = [part("id", b"p"), part("files", json.dumps(config).encode(), "adapter_config.json")]
    parts += [part("task_type", task), part("allow_other_base", other_base)]
    assert send(store, body([*parts, part("files", WEIGHTS, "adapter_model.safetensors")])) in {200, 201, 400}


def test_a_too_large_upload_is_413(store: PromptStore, tmp_path: Path) -> None:
    large = part("files", b"x" * 70_000, "adapter_model.safetensors")
    assert send(store, body([part("id", b"p"), large])) == 413
