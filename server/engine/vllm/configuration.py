"""From our settings to vLLM's, and from vLLM's configuration to ``ModelInfo``."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

import vllm
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from prompt_store.types import ModuleShape
from server.config import VLLM_VERSION, EngineSettings
from server.engine.generation_defaults import NO_RULES
from server.engine.model.generation_config import CheckpointGeneration, read_generation_config
from server.engine.model.loading import eos_token_ids_of
from server.engine.sampling.grammars import load_tokenizer
from server.engine.types import Capability, ModelInfo
from server.engine.vllm.adapters.files import PARTS
from server.engine.vllm.adapters.modules import AdaptableModules, target_suffixes
from server.engine.vllm.connector import BUDGET_KEY
from server.errors import EngineStartError

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM can reserve memory."""

CPU_SPARE_SLOTS = 1
"""Slots for adapters that stay empty: the CPU build computes rows without an adapter with the last one."""

CPU_BLOCK_SIZE = 32
"""The attention kernels of vLLM's CPU build need a multiple of this."""

OWN_ARGUMENTS = frozenset(
    {
        "model",
        "kv_transfer_config",
        "enable_prompt_embeds",
        "generation_config",
        "scheduling_policy",
        "seed",
        "logprobs_mode",
        "structured_outputs_config",
        "skip_tokenizer_init",
        "enable_lora",
        "max_loras",
        "max_lora_rank",
        "lora_dtype",
        "lora_target_modules",
        "default_mm_loras",
        "worker_extension_cls",
    }
)
"""Arguments that would make answers wrong if an operator changed them."""


def check_version() -> None:
    """Refuse untested versions.

    Raises:
        EngineStartError: If this is another minor version of vLLM.
    """
    found = str(vllm.__version__)
    if found.split(".")[:2] != VLLM_VERSION.split("."):
        raise EngineStartError(
            f"--engine-python has vLLM {found}; this version of Prelude is tested with vLLM {VLLM_VERSION}.x only"
        )


def vllm_config_of(settings: EngineSettings, modules: Mapping[str, ModuleShape]) -> VllmConfig:
    """Configure vLLM.

    Args:
        settings: Ours.
        modules: The modules of the base, if adapters are served.

    Raises:
        EngineStartError: If vLLM refuses the settings or the model.
    """
    platform = "cpu" if current_platform.is_cpu() else "cuda"
    if settings.device not in ("auto", platform):
        raise EngineStartError(f"--device {settings.device}: the vLLM of --engine-python is built for {platform}")
    if platform == "cpu" and settings.pipeline_parallel_size > 1:
        # Its worker has no buffers for another's hidden states unless it has warmed up, and ends at the first step.
        raise EngineStartError("--pipeline-parallel-size: vLLM's CPU build does not serve models in several parts")
    extra = _engine_args(settings)
    block_size = settings.block_size
    if platform == "cpu" and "block_size" not in extra:
        block_size = -(-block_size // CPU_BLOCK_SIZE) * CPU_BLOCK_SIZE
    arguments: dict[str, Any] = {
        "revision": settings.revision,
        "dtype": _dtype(settings),
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "block_size": block_size,
        "kv_cache_memory_bytes": settings.kv_cache_memory,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "quantization": settings.quantization,
        "max_logprobs": -1,
        **extra,
        **_lora_arguments(settings, extra, modules, platform),
        "model": settings.model,
        "skip_tokenizer_init": not _has_tokenizer(settings),
        "enable_prompt_embeds": True,
        "generation_config": "vllm",
        "scheduling_policy": "priority",
        "structured_outputs_config": {"backend": "guidance"},
        # Requests without a seed draw from one generator.
        "seed": secrets.randbits(31),
        "kv_transfer_config": KVTransferConfig(
            kv_connector="SoftPromptConnector",
            kv_connector_module_path="server.engine.vllm.connector",
            kv_role="kv_both",
            kv_load_failure_policy="fail",
            kv_connector_extra_config={BUDGET_KEY: settings.soft_prompt_host_bytes},
        ),
    }
    try:
        config = AsyncEngineArgs(**arguments).create_engine_config()
    except Exception as error:
        raise EngineStartError(f"vLLM refuses the settings ({type(error).__name__}: {error})") from error
    if config.model_config.runner_type != "generate" or config.model_config.is_encoder_decoder:
        raise EngineStartError(f"the model {settings.model!r} is no causal language model")
    return config


def lora_capacity(config: VllmConfig) -> int:
    """Adapters that may be loaded at once."""
    lora = config.lora_config
    if lora is None:
        return 0
    return int(lora.max_loras - CPU_SPARE_SLOTS if current_platform.is_cpu() else lora.max_cpu_loras)


def model_info(settings: EngineSettings, config: VllmConfig, modules: Mapping[str, ModuleShape]) -> ModelInfo:
    """What the API needs to know, after the key/value cache has been sized.

    Args:
        settings: Ours.
        config: vLLM's.
        modules: What adapters can change; empty if none are served.

    Raises:
        EngineStartError: If the checkpoint has rules that this engine does not apply.
    """
    model = config.model_config
    text_config = model.hf_text_config
    generation_config = _generation_config(settings)
    eos_token_ids = eos_token_ids_of(text_config, generation_config)
    generation = read_generation_config(
        generation_config if settings.generation_config == "auto" else None,
        vocab_size=model.get_vocab_size(),
        max_model_len=model.max_model_len,
        eos_token_ids=eos_token_ids,
    )
    _check_rules(generation)
    generation.log()
    capabilities: set[Capability] = set()
    if not model.use_mla:
        capabilities.add(Capability.KEY_VALUES)
    if not model.skip_tokenizer_init and eos_token_ids:
        capabilities.add(Capability.STRUCTURED_OUTPUT)
    if modules:
        capabilities.add(Capability.ADAPTERS)
    return ModelInfo(
        engine="vllm",
        modules=dict(modules),
        adapters_off=None if modules else "start the server with --max-loras",
        adapter_parts=PARTS,
        capabilities=tuple(sorted(capabilities)),
        architecture=model.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        device="cpu" if current_platform.is_cpu() else "cuda",
        embedding_width=embedding_width(model),
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
        vocab_size=model.get_vocab_size(),
        max_model_len=model.max_model_len,
        block_size=config.cache_config.block_size,
        num_blocks=config.cache_config.num_gpu_blocks or 0,
        eos_token_ids=eos_token_ids,
        hidden_size=model.get_hidden_size(),
        generation_defaults=generation.defaults,
    )


def embedding_width(model: Any) -> int:
    """Width of an input embedding, of vLLM's model configuration."""
    return int(getattr(model.hf_text_config, "word_embed_proj_dim", None) or model.get_inputs_embeds_size())


def _lora_arguments(
    settings: EngineSettings, extra: Mapping[str, Any], modules: Mapping[str, ModuleShape], platform: str
) -> dict[str, Any]:
    if not settings.max_loras:
        return {}
    rank = next((rank for rank in LORA_RANKS if rank >= settings.max_adapter_rank), None)
    if rank is None:
        raise EngineStartError(f"--max-adapter-rank {settings.max_adapter_rank}: vLLM has at most {LORA_RANKS[-1]}")
    slots = settings.max_loras + (CPU_SPARE_SLOTS if platform == "cpu" else 0)
    return {
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": max(slots, extra.get("max_cpu_loras") or 0),
        "max_lora_rank": rank,
        "lora_target_modules": target_suffixes(modules),
        "worker_extension_cls": f"{AdaptableModules.__module__}.{AdaptableModules.__name__}",
    }


def _engine_args(settings: EngineSettings) -> dict[str, Any]:
    try:
        extra = json.loads(settings.engine_args or "{}")
    except ValueError as error:
        raise EngineStartError(f"--engine-args is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise EngineStartError("--engine-args is not a JSON object")
    fixed = sorted(OWN_ARGUMENTS & extra.keys())
    if fixed:
        raise EngineStartError(f"--engine-args may not set {', '.join(fixed)}")
    return extra


def _dtype(settings: EngineSettings) -> str:
    """The serving dtype; vLLM's own ``auto`` would round a float32 checkpoint to bfloat16."""
    if settings.dtype != "auto":
        return settings.dtype
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        settings.model, revision=settings.revision, trust_remote_code=False
    )
    return "float32" if str(getattr(config, "dtype", None)) == "torch.float32" else "auto"


def _has_tokenizer(settings: EngineSettings) -> bool:
    try:
        load_tokenizer(settings.model, settings.revision)
    except Exception:  # a model without a tokenizer still serves token ids
        return False
    return True


def _generation_config(settings: EngineSettings) -> GenerationConfig | None:
    disable_progress_bar()
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(
            settings.model, revision=settings.revision or "main"
        )
    except OSError:
        return None
    return config


def _check_rules(generation: CheckpointGeneration) -> None:
    if generation.rules != NO_RULES:
        names = ", ".join(sorted(generation.applied))
        raise EngineStartError(
            f"engine vllm does not apply the rules of this model's generation_config.json (among {names}); "
            "serve it with --engine native, or ignore them with --generation-config none"
        )
