"""Servers as users start them, for tests over HTTP."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from server.demo.tour import MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY
from tests.support.processes import PRELUDE, free_port, server_process

BASE = "prelude-demo"


def adapter(task: str) -> tuple[bytes, bytes]:
    """The embedded soft prompt's two files."""
    folder = SOFT_PROMPTS_DIRECTORY / task
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


def upload(client: httpx.Client, name: str, config: bytes, weights: bytes, **fields: str) -> httpx.Response:
    """Upload two files unchanged."""
    files = [("files", ("adapter_config.json", config)), ("files", ("adapter_model.safetensors", weights))]
    return client.post("/v1/prompts", data={"id": name, **fields}, files=files)


@contextmanager
def serving(
    folder: Path,
    *flags: str,
    model: Path = MODEL_DIRECTORY,
    store: str | None = None,
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = PRELUDE,
) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """Run ``prelude serve`` until the block ends, by default with the embedded model; it is ready to answer."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *program,
        "serve",
        "--model",
        str(model),
        "--served-model-name",
        BASE,
        "--port",
        str(port),
    ]
    command += ["--store", store or str(folder / "store"), "--kv-cache-memory", "64MiB", *flags]
    folder.mkdir(exist_ok=True)
    with (
        server_process(command, f"{url}/ready", log=folder / "log", env=environment) as process,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        yield client, process
