"""PEFT's and vLLM's ways to generate over many adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.adapter_parts.files import AdapterFiles
from benchmarks.peers.vllm_process import VllmProcess
from benchmarks.ways import Way, generate, timed


def adapter_names_way(
    model_folder: Path, adapters: Sequence[AdapterFiles], texts: Sequence[list[int]], new_tokens: int, dtype: str
) -> Way:
    """PEFT's ``adapter_names``: one left-padded batch of all texts, which names the adapter of each row."""
    base: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    names = [f"adapter{index}" for index in range(len(adapters))]
    # The adapters' weights in the model's dtype: in float32, PEFT's default, each product would be cast.
    options: Any = {"autocast_adapter_dtype": False}
    model: Any = PeftModel.from_pretrained(base, str(adapters[0].folder), adapter_name=names[0], **options).eval()
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(adapter.folder), adapter_name=name, **options)
    of_rows = [names[index % len(names)] for index in range(len(texts))]
    return timed(lambda: generate(model, texts, new_tokens, adapter_names=of_rows))


def vllm_lora_way(
    vllm: VllmProcess, adapters: Sequence[AdapterFiles], texts: Sequence[list[int]], new_tokens: int
) -> Way:
    """The way of vLLM with ``enable_lora``: all texts at once."""
    folders = [str(adapters[index % len(adapters)].folder) for index in range(len(texts))]
    ids = [index % len(adapters) for index in range(len(texts))]
    task = vllm.task(
        "generate", prompts=list(texts), new_tokens=new_tokens, adapters=list(zip(ids, folders, strict=True))
    )

    def way() -> tuple[int, float]:
        count, seconds = vllm.perform(task)
        return count, seconds

    return way
