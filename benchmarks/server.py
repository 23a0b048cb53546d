"""A server in a separate process, and soft prompts for it, for the benchmarks over HTTP."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from benchmarks.workload import HIDDEN_SIZE, KEY_VALUES_PER_LAYER, build_model
from server.demo.tour import MODEL_DIRECTORY
from tests.support.processes import PRELUDE, free_port, server_process

BASE = "bench"


def build_served_model(folder: Path, *, layers: int) -> Path:
    """Write a model of 135M shape and a tokenizer, and return their folder.

    The tokenizer has a smaller vocabulary than the model; the benchmarks send token ids.
    """
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
    """Run ``prelude serve`` until the block ends; yields its URL."""
    port = free_port()
    command = [*PRELUDE, "serve", "--model", str(model), "--served-model-name", BASE, "--port", str(port)]
    command += ["--store", str(store), "--log-level", "WARNING", *flags]
    url = f"http://127.0.0.1:{port}"
    with server_process(command, f"{url}/ready", env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"}):
        yield url
