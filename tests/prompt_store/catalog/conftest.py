"""A catalog on either database, and versions to publish."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.database import Database
from prompt_store.catalog.records import NewVersion
from prompt_store.types import PeftType, PromptRef, StoredFile
from tests.prompt_store.databases import postgres_url, sqlite_url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield sqlite_url(tmp_path)
        return
    with postgres_url() as found:
        yield found


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    opened = Catalog(Database(url))
    yield opened
    opened.close()


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def new(name: str, content: str, **fields: Any) -> NewVersion:
    files = (
        StoredFile("adapter_config.json", digest_of("config"), 100),
        StoredFile("adapter_model.safetensors", digest_of(content), 2000),
    )
    common = {
        "peft_type": PeftType.PREFIX_TUNING,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 7,
        "dtype": "F32",
        "base_model_name_or_path": "org/tiny",
    }
    return NewVersion(name=name, digest=digest_of(content), files=files, **{**common, **fields})


def publish(catalog: Catalog, name: str, content: str, alias: str | None = "latest", **fields: Any) -> int:
    version = new(name, content, **fields)
    catalog.reserve(version.files)
    return catalog.publish(version, alias)[0].version


def resolve(catalog: Catalog, ref: str) -> int:
    return catalog.resolve(PromptRef.parse(ref)).version
