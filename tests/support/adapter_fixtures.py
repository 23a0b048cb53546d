"""Fixtures of LoRA adapters for the scripted engine's model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.api_fixtures import UploadParts
from tests.support.fake_engine import BASE, MODULES, WIDTH

AdapterFolder = Callable[..., Path]


@pytest.fixture
def adapter_directory(tmp_path: Path) -> AdapterFolder:
    """Write a PEFT directory of a LoRA on the products of attention, as PEFT saves it."""

    def write(
        name: str = "triage", *, seed: int = 0, rank: int = 2, num_labels: int | None = None, at: Path | None = None
    ) -> Path:
        directory = (at or tmp_path) / f"lora-{name}-{seed}"
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "base_model_name_or_path": BASE,
            "bias": "none",
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": 4,
            "lora_dropout": 0.0,
            "modules_to_save": None if num_labels is None else ["score"],
            "peft_type": "LORA",
            "r": rank,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM" if num_labels is None else "SEQ_CLS",
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        random = np.random.default_rng(seed)
        tensors = {}
        for module in MODULES:
            for part, shape in (("A", (rank, WIDTH)), ("B", (WIDTH, rank))):
                tensor = random.standard_normal(shape).astype(np.float32)
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = tensor
        if num_labels is not None:
            tensors["base_model.model.score.weight"] = np.ones((num_labels, WIDTH), np.float32)
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        return directory

    return write


@pytest.fixture
def adapter_parts(adapter_directory: AdapterFolder) -> UploadParts:
    """Arguments for an httpx POST that uploads a LoRA."""

    def parts(
        name: str = "triage", *, seed: int = 0, rank: int = 2, num_labels: int | None = None, **fields: Any
    ) -> dict[str, Any]:
        directory = adapter_directory(name, seed=seed, rank=rank, num_labels=num_labels)
        files = [("files", (path.name, path.read_bytes())) for path in sorted(directory.iterdir())]
        return {"data": {"id": name, **fields}, "files": files}

    return parts


@pytest.fixture
async def pair(client: httpx.AsyncClient, upload_parts: UploadParts, adapter_parts: UploadParts) -> None:
    """The soft prompts ``tone`` and ``other``, and the adapters ``triage`` and ``style``."""
    for seed, name in enumerate(("tone", "other")):
        (await client.post("/v1/prompts", **upload_parts(name, seed=seed))).raise_for_status()
    for seed, name in enumerate(("triage", "style")):
        (await client.post("/v1/prompts", **adapter_parts(name, seed=seed))).raise_for_status()
