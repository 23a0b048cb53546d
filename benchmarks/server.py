"""A server in a process of its own, and soft prompts for it, for the benchmarks that measure over HTTP."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import save

from benchmarks.workload import HIDDEN_SIZE, KEY_VALUES_PER_LAYER, build_model
from server.demo.tour import MODEL_DIRECTORY

BASE = "bench"
START_SECONDS = 120


def build_served_model(folder: Path, *, layers: int) -> Path:
    """The model of 135M shape, with a tokenizer of fewer words than it: the benchmarks send token ids."""
    path = build_model(folder, layers=layers)
    for file in MODEL_DIRECTORY.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def soft_prompt_files(
    seed: int, *, layers: int, num_virtual_tokens: int = 20, is_prefix: bool = False
) -> list[bytes]:
    """A random soft prompt's ``adapter_config.json`` and ``adapter_model.safetensors``."""
    width = layers * KEY_VALUES_PER_LAYER if is_prefix else HIDDEN_SIZE
    kind = "PREFIX_TUNING" if is_prefix else "PROMPT_TUNING"
    config = f'{{"peft_type": "{kind}", "task_type": "CAUSAL_LM", "num_virtual_tokens": {num_virtual_tokens}}}'
    rows = np.random.default_rng(seed).normal(0, 0.02, (num_virtual_tokens, width)).astype(np.float32)
    return [config.encode(), save({"prompt_embeddings": rows})]


@contextmanager
def serving(model: Path, store: Path, *flags: str) -> Iterator[str]:
    """``prelude serve`` until the block ends; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--model", str(model)]
    command += ["--served-model-name", BASE, "--port", str(port), "--store", str(store), "--log-level", "WARNING"]
    process = subprocess.Popen([*command, *flags], env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"})
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start (status {process.poll()})")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False
