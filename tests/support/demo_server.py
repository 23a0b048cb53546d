"""One server with the embedded model and its soft prompts, shared by the tests that do not change it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.serving import adapter, serving, upload

TASKS = ("sentiment", "intent", "extract", "dates")


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of ``prelude serve`` in float32 with the four embedded soft prompts."""
    flags = ("--dtype", "float32", "--max-num-batched-tokens", "512", "--max-num-seqs", "128")
    with serving(tmp_path_factory.mktemp("demo-server"), *flags) as (client, _):
        for task in TASKS:
            response = upload(client, task, *adapter(task))
            assert response.status_code == 201, response.text
        yield client
