"""A parsed and validated LoRA or IA3 adapter, and the limits of what a server takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from prompt_store.types import AdaptedModule, PeftType, TensorData

MAX_RANK = 256


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What an operator allows.

    Attributes:
        max_rank: Largest rank of a module.
        max_bytes: Largest size in the memory of the engine, in the serving dtype; None for no limit.
    """

    max_rank: int = MAX_RANK
    max_bytes: int | None = None


NO_LIMITS = AdapterLimits()
"""The largest rank that the engine's kernels serve, and any size."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A parsed and validated adapter.

    Attributes:
        peft_type: LORA or IA3.
        task_type: PEFT's task type; ``CAUSAL_LM`` if the configuration names none.
        base_model_name_or_path: The base that its configuration names; informational.
        modules: What it changes, sorted by the modules' names; at least one.
        tensors: All tensors of the weights file, by name.
        num_labels: Labels of the classification head; None without a head.
        overrides: Overrides of the uploader or operator; see ``PromptVersion``.
    """

    peft_type: PeftType
    task_type: str
    base_model_name_or_path: str | None
    modules: tuple[AdaptedModule, ...]
    tensors: Mapping[str, TensorData]
    num_labels: int | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a module; 0 for an IA3."""
        return max(module.rank for module in self.modules)

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors that change products."""
        return num_parameters(self.modules, self.tensors)

    @property
    def targets(self) -> tuple[str, ...]:
        """The last parts of the names of the changed modules, sorted."""
        return tuple(sorted({module.name.rpartition(".")[2] for module in self.modules}))

    @property
    def dtype(self) -> str:
        """The element type of the first tensor, as safetensors names it; PEFT saves all in one."""
        module = self.modules[0]
        return self.tensors[module.tensors.get("A") or module.tensors["gain"]].dtype


def num_parameters(modules: tuple[AdaptedModule, ...], tensors: Mapping[str, TensorData]) -> int:
    """Elements of the tensors of modules."""
    return sum(math.prod(tensors[name].shape) for module in modules for name in module.tensors.values())
