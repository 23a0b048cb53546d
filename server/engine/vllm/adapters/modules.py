"""The modules of a base that adapters can change under vLLM, by the names that they have in transformers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.lora.utils import parse_fine_tuned_lora_name

from prompt_store.files.lora.adapter_layout import PREFIX
from prompt_store.types import ModuleShape
from server.config import EngineSettings
from server.engine.adapters.modules import module_shapes
from server.errors import EngineStartError

_OUTSIDE = "engine vllm adapts the linear layers of the decoder alone"
_UNWRAPPED = "vLLM does not adapt it in this model"


class AdaptableModules:
    """A method that vLLM adds to its workers (``worker_extension_cls``)."""

    model_runner: Any

    def adaptable_modules(self, names: list[str]) -> list[str]:
        """Those of these modules that a LoRA changes in this worker; vLLM drops all others without an error."""
        model = self.model_runner.get_model()
        manager = model.lora_manager
        wrapped: set[str] = set()
        for name in manager.modules:
            wrapped.update(manager.packed_modules.get(name, (name,)))
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        mapper = None if mapper is None else mapper.get_rename_mapper()
        return [
            name
            for name in names
            if parse_fine_tuned_lora_name(f"{PREFIX}{name}.lora_A.weight", mapper)[0] in wrapped
        ]


def base_modules(settings: EngineSettings) -> dict[str, ModuleShape]:
    """The modules of the model in transformers, without their weights.

    Embeddings and head are none that can be adapted: with an adapted head, vLLM has no logprobs of a text.

    Raises:
        EngineStartError: If transformers does not know the model.
    """
    try:
        config = AutoConfig.from_pretrained(settings.model, revision=settings.revision, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise EngineStartError(
            f"--max-loras: the modules of {settings.model!r} are not known ({type(error).__name__}: {error})"
        ) from error
    found = module_shapes(model)
    head = model.get_output_embeddings()
    outside = {name for name, module in model.named_modules() if module is head}
    outside |= {name for name, shape in found.items() if shape.kind == "embedding"}
    outside |= _beside_experts(found)
    return {name: _without(shape, _OUTSIDE) if name in outside else shape for name, shape in found.items()}


def target_suffixes(modules: Mapping[str, ModuleShape]) -> list[str]:
    """The last parts of the names of the modules that can be adapted: what vLLM reserves memory for."""
    return sorted({name.rpartition(".")[2] for name, shape in modules.items() if shape.unsupported is None})


def confirmed(modules: Mapping[str, ModuleShape], adaptable: Collection[str]) -> dict[str, ModuleShape]:
    """The modules, with a reason at those that vLLM's workers do not adapt."""
    return {name: shape if name in adaptable else _without(shape, _UNWRAPPED) for name, shape in modules.items()}


def _without(shape: ModuleShape, reason: str) -> ModuleShape:
    return shape if shape.unsupported is not None else replace(shape, unsupported=reason)


def _beside_experts(names: Iterable[str]) -> set[str]:
    """Modules of blocks that have experts: routers and shared experts."""
    every = list(names)
    blocks = {name.partition(".experts")[0] + "." for name in every if ".experts" in name}
    return {name for name in every if any(name.startswith(block) for block in blocks)}
