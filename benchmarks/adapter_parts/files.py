"""Random adapters in PEFT's format, for the model of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from server.engine.types import AdapterSource

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "v_proj")


@dataclass(frozen=True)
class AdapterFiles:
    """A PEFT directory.

    Attributes:
        folder: Where its two files are.
        num_parameters: Elements of its tensors.
    """

    folder: Path
    num_parameters: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the tensors in a dtype."""
        return self.num_parameters * dtype.itemsize

    def source(self, name: str) -> AdapterSource:
        """The adapter for the engine. Another name is another adapter, which is read and stored separately."""
        return AdapterSource(
            digest=f"{self.folder.name}-{name}",
            path=str(self.folder / "adapter_model.safetensors"),
            config_path=str(self.folder / "adapter_config.json"),
            num_parameters=self.num_parameters,
        )


def write_adapter(
    model_folder: Path, folder: Path, *, rank: int, targets: Sequence[str] = ALL_LINEAR, seed: int = 0
) -> AdapterFiles:
    """Write a random adapter in bfloat16 for a Llama, with changes that are small beside the weights."""
    config = AutoConfig.from_pretrained(model_folder)
    width, inner = config.hidden_size, config.intermediate_size
    heads = width // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "q_proj": ("self_attn", width, width),
        "k_proj": ("self_attn", width, heads),
        "v_proj": ("self_attn", width, heads),
        "o_proj": ("self_attn", width, width),
        "gate_proj": ("mlp", width, inner),
        "up_proj": ("mlp", width, inner),
        "down_proj": ("mlp", inner, width),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers):
        for target in targets:
            block, in_features, out_features = shapes[target]
            name = f"base_model.model.model.layers.{layer}.{block}.{target}"
            for part, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
                tensor = torch.randn(shape, generator=generator) * 0.01
                tensors[f"{name}.{part}.weight"] = tensor.to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    fields |= {"target_modules": sorted(targets), "base_model_name_or_path": str(model_folder)}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return AdapterFiles(folder, sum(tensor.numel() for tensor in tensors.values()))
