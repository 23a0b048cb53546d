"""One server for all clients, and the environments that the clients run in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.running import TASKS, ClientEnvironment, node_environment, python_environment
from tests.support.serving import adapter, serving, upload


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of ``prelude serve`` with the embedded model and its soft prompts."""
    with serving(tmp_path_factory.mktemp("clients"), "--dtype", "float32", "--max-num-seqs", "64") as (client, _):
        for task in TASKS:
            response = upload(client, task, *adapter(task))
            assert response.status_code == 201, response.text
        yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="session")
def python_clients() -> ClientEnvironment:
    """The environment of Python clients whose dependencies conflict with this project's."""
    return python_environment()


@pytest.fixture(scope="session")
def node_clients() -> ClientEnvironment:
    """The environment of the npm packages."""
    return node_environment()
