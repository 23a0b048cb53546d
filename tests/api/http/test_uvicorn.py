"""The private names of uvicorn that the server's protocol uses, and the version's upper bound."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

ROOT = Path(__file__).parents[3]
MODULE = "uvicorn.protocols.http.httptools_impl"
WHAT_TO_DO = (
    f"uvicorn {version('uvicorn')} changed {MODULE}, which server/api/http/connections.py extends. Install the "
    "version of constraints.txt to go on. To support this version: adapt LimitedProtocol to it, run tests/api/http, "
    "and raise the upper bound in pyproject.toml and the pin in constraints.txt."
)

METHODS = (
    *("connection_made", "connection_lost", "data_received", "on_message_begin", "on_url", "on_header"),
    *("on_headers_complete", "on_body", "on_message_complete", "on_response_complete", "send_400_response"),
    *("timeout_keep_alive_handler", "pause_writing", "_unset_keepalive_if_required"),
)
"""Methods that LimitedProtocol overrides or calls."""

ATTRIBUTES = (
    *("connections", "cycle", "client", "expect_100_continue", "flow", "headers", "logger", "loop", "parser"),
    *("pipeline", "server_state", "transport", "url"),
)
"""Attributes of a connection that it reads or sets."""

OF_A_REQUEST = ("disconnected", "keep_alive", "message_event", "response_complete", "response_started", "scope")
"""Attributes of a RequestResponseCycle that it reads or sets."""


@pytest.fixture(scope="module")
def module() -> ModuleType:
    try:
        found = importlib.import_module(MODULE)
    except ImportError as error:
        pytest.fail(f"{error}. {WHAT_TO_DO}")
    for name in ("HttpToolsProtocol", "RequestResponseCycle"):
        assert hasattr(found, name), f"no class {name}. {WHAT_TO_DO}"
    return found


@pytest.mark.parametrize("name", METHODS)
def test_uvicorns_connection_has_the_methods_in_use(module: ModuleType, name: str) -> None:
    assert callable(getattr(module.HttpToolsProtocol, name, None)), f"no method {name}. {WHAT_TO_DO}"


def test_uvicorns_connection_has_the_attributes_in_use(module: ModuleType) -> None:
    async def attributes() -> set[str]:
        config = Config("uvicorn:Config", lifespan="off", log_config=None)
        return set(dir(module.HttpToolsProtocol(config, ServerState(), {})))

    source = inspect.getsource(module.HttpToolsProtocol)
    known = asyncio.run(attributes()) | set(re.findall(r"self\.(\w+)\b.* = ", source))
    missing = set(ATTRIBUTES) - known
    assert not missing, f"no attributes {sorted(missing)}. {WHAT_TO_DO}"


@pytest.mark.parametrize("name", OF_A_REQUEST)
def test_uvicorns_request_has_the_attributes_in_use(module: ModuleType, name: str) -> None:
    source = inspect.getsource(module.RequestResponseCycle)
    assert re.search(rf"self\.{name}\b.* = ", source), f"no attribute {name} of a request. {WHAT_TO_DO}"


def test_the_upper_bound_is_the_next_minor_version() -> None:
    (pinned,) = re.findall(r"^uvicorn==(\d+)\.(\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (uvicorn,) = [line for line in dependencies if line.startswith("uvicorn>=")]
    assert uvicorn.endswith(f",<{pinned[0]}.{int(pinned[1]) + 1}"), f"{uvicorn}: private names need an upper bound"
