"""Loads a checkpoint, and reads its context length and end-of-sequence tokens."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from server.config import GPU_MEMORY_UTILIZATION, EngineSettings
from server.engine.model.platform import Platform
from server.errors import EngineStartError

logger = logging.getLogger(__name__)


def load_model(settings: EngineSettings, platform: Platform) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """Load a checkpoint onto the platform's device, in the configured dtype or else the platform's best.

    Returns:
        The frozen model, and the configuration of its text model.

    Raises:
        EngineStartError: If it cannot be loaded, or weights are missing.
    """
    model: PreTrainedModel
    loaded: dict[str, set[str]]
    try:
        config = _load_config(settings)
        dtype: torch.dtype | str = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
        best = platform.best_dtype(config.dtype)
        if dtype == "auto" and best is not None and best is not config.dtype:
            dtype = best
        # bitsandbytes quantises on the device, and some of its models cannot be moved afterwards.
        is_placed = _quant_method(config) == "bitsandbytes"
        model, loaded = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            settings.model,
            revision=settings.revision,
            dtype=dtype,
            device_map=platform.device if is_placed else None,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,  # without it, transformers asks on the terminal
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise EngineStartError(f"cannot load the model {settings.model!r}: {error}") from error
    except SafetensorError as error:
        raise EngineStartError(
            f"cannot load the model {settings.model!r}: a weights file is damaged or truncated ({error})"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers initialises them randomly
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise EngineStartError(
            f"cannot load the model {settings.model!r}: its checkpoint has no weights for {missing[0]}{more}, which "
            f"{type(model).__name__} needs"
        )
    best = platform.best_dtype(model.dtype)
    if best is not model.dtype:
        name = str(best).removeprefix("torch.")
        logger.warning("this CPU has no fast products of %s; --dtype %s would be faster", model.dtype, name)
    module: nn.Module = model
    if not is_placed:
        module.to(platform.device)
    module.eval().requires_grad_(False)
    return model, config.get_text_config(decoder=True)


def _quant_method(config: PreTrainedConfig) -> str | None:
    """The library of a quantised checkpoint, by its name in transformers; None if the checkpoint is not quantised."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return None
    if not isinstance(described, dict):
        described = described.to_dict()
    if described.get("load_in_8bit") or described.get("load_in_4bit"):  # old checkpoints name no method
        return "bitsandbytes"
    return str(described.get("quant_method"))


def _load_config(settings: EngineSettings) -> Any:
    """The checkpoint's configuration.

    Raises:
        ValueError: If transformers does not know the type of model, or the model is no decoder without an encoder.
    """
    try:
        config = AutoConfig.from_pretrained(settings.model, revision=settings.revision, trust_remote_code=False)
    except ValueError as error:
        found = re.search(r"model type `([^`]+)` but Transformers does not recognize", str(error))
        if found is None:
            raise
        raise ValueError(
            f"transformers {transformers.__version__} has no model of the type {found[1]!r}: a newer release may "
            "have it, and vLLM has types of its own (--engine vllm)"
        ) from error
    _check_is_causal(config)
    return config


def _check_is_causal(config: PreTrainedConfig) -> None:
    """Check that a model is a decoder without an encoder.

    Raises:
        ValueError: If it is not.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"transformers has no causal language model of the type {config.model_type!r}")
    if config.is_encoder_decoder:
        raise ValueError(f"models of the type {config.model_type!r} have an encoder beside their decoder")


def max_model_len_of(configured: int | None, config: PreTrainedConfig) -> int:
    """Maximum positions of a sequence: as configured, or the model's own limit.

    Raises:
        EngineStartError: If the configured number exceeds the model's limit, or both are unknown.
    """
    own = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and own is not None:
        # Beyond this length transformers changes the frequencies of the whole batch, for all sequences.
        own = min(own, int(rope.get("original_max_position_embeddings") or own))
    if configured is None:
        if own is None:
            raise EngineStartError(
                "the model's configuration does not state its context length: give --max-model-len"
            )
        return int(own)
    if own is not None and configured > own:
        raise EngineStartError(f"--max-model-len {configured} is more than the model's limit of {own} positions")
    return configured


def eos_token_ids_of(config: PreTrainedConfig, generation_config: GenerationConfig | None) -> tuple[int, ...]:
    """The end-of-sequence tokens: of the generation configuration, or else of the model's configuration."""
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def check_utilization(utilization: float, *, is_measured: bool) -> None:
    """Raises ``EngineStartError`` if the device's memory cannot be used to this fraction."""
    if not 0.0 < utilization <= 1.0:
        raise EngineStartError(f"--gpu-memory-utilization {utilization:g} must be above 0, and at most 1")
    if not is_measured and utilization != GPU_MEMORY_UTILIZATION:
        raise EngineStartError("--gpu-memory-utilization is for GPUs; on a CPU, set --kv-cache-memory instead")
