"""PEFT's configuration of each training method; initialising, saving and restoring a soft prompt.

PEFT saves what is served, which is not what is trained: P-tuning and prefix tuning with a projection are saved
without their network, and CPT with its change added to the embeddings. So a checkpoint contains the whole encoder,
and PEFT's two files are written once, at the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from safetensors.torch import load_file, save

from prompt_store.durable import write_file
from server.training.encoding import Encoded
from server.training.settings import Method, TrainSettings

ADAPTER = "default"
CONFIG_FILE = "adapter_config.json"
MAX_ENCODER_WIDTH = 512
"""The code of Li & Liang 2021 uses 512, and 800 for one task; wider is slower."""

_INPUT_TEMPLATE, _INPUT, _OUTPUT_TEMPLATE, _LABEL = 1, 2, 3, 4
"""CPT's types of the tokens of a context; it does not change labels."""


def make_soft_prompt(
    base: Any, tokenizer: Any, settings: TrainSettings, *, text: str, context: Sequence[Encoded], num_tasks: int
) -> PeftModel:
    """Add an initialised soft prompt to a frozen model.

    Args:
        base: The causal model (transformers).
        tokenizer: Its tokenizer.
        settings: The method and its settings.
        text: Text to initialise from, if the method uses one.
        context: Examples to initialise a CPT prompt from, unless ``settings.init_text`` is given.
        num_tasks: Number of tasks of a multitask prompt.
    """
    count = settings.num_virtual_tokens
    ids = repeated(tokenizer(text)["input_ids"] or [0], count)
    config = _config(base, tokenizer, settings, text=text, ids=ids, context=context, num_tasks=num_tasks)
    if settings.gradient_checkpointing:
        # transformers 5.23 renamed the method, and warns about the old name.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model = get_peft_model(base, config)
    if settings.method in (Method.PREFIX_TUNING, Method.CARTRIDGE):
        _init_from_cache(model, ids)
    elif settings.method is Method.MULTITASK:
        _init_tasks_with_ones(model)
    return model


def repeated(ids: Sequence[int], count: int) -> list[int]:
    """Repeat or truncate ids to a length, as PEFT's TEXT initialisation does."""
    return (list(ids) * math.ceil(count / len(ids)))[:count]


def state_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the encoder's state on the CPU, including its frozen parts."""
    return {
        key: value.detach().to("cpu", copy=True).contiguous() for key, value in _encoder(model).state_dict().items()
    }


def restore(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Load a state of ``state_of``."""
    _encoder(model).load_state_dict(state)


def save_state(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write a state durably, as a safetensors file."""
    write_file(path, save(state))


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of ``save_state``."""
    state: dict[str, torch.Tensor] = load_file(path)
    return state


def save_adapter(model: PeftModel, folder: Path, *, base_name: str, keeps_text: bool) -> None:
    """Write PEFT's two files, ready for an upload.

    Args:
        model: The trained model.
        folder: Directory to write to.
        base_name: Name of the base in the configuration; PEFT would write the path that it was loaded from.
        keeps_text: Whether to keep the initial text in the configuration. A text from the training data must not be
            kept: readers of the soft prompt may have no access to the data.
    """
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_name
    if config.get("tokenizer_name_or_path"):
        config["tokenizer_name_or_path"] = base_name
    if config.get("prompt_tuning_init_text") and not keeps_text:
        config |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def mean_norm(model: PeftModel) -> float:
    """Mean Euclidean norm of the rows as they would be saved; for a multitask prompt, of the shared rows."""
    with torch.no_grad():
        if model.peft_config[ADAPTER].peft_type == "MULTITASK_PROMPT_TUNING":
            rows = _encoder(model).embedding.weight
        else:
            rows = model.get_prompt_embedding_to_save(ADAPTER)
        return float(rows.float().norm(dim=-1).mean())


def _encoder(model: PeftModel) -> Any:
    return model.prompt_encoder[ADAPTER]


def _config(
    base: Any,
    tokenizer: Any,
    settings: TrainSettings,
    *,
    text: str,
    ids: list[int],
    context: Sequence[Encoded],
    num_tasks: int,
) -> PeftConfig:
    common: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
    sized = common | {"num_virtual_tokens": settings.num_virtual_tokens}
    init_from_text = {"prompt_tuning_init_text": text, "tokenizer_name_or_path": tokenizer.name_or_path}
    width = settings.encoder_hidden_size or min(base.config.get_text_config().hidden_size, MAX_ENCODER_WIDTH)
    match settings.method:
        case Method.PROMPT_TUNING:
            return PromptTuningConfig(prompt_tuning_init=PromptTuningInit.TEXT, **init_from_text, **sized)
        case Method.P_TUNING:
            return PromptEncoderConfig(encoder_hidden_size=width, **sized)
        case Method.PREFIX_TUNING:
            return PrefixTuningConfig(**sized)
        case Method.P_TUNING_V2:
            return PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=width, **sized)
        case Method.MULTITASK:
            return MultitaskPromptTuningConfig(
                prompt_tuning_init=MultitaskPromptTuningInit.TEXT,
                num_tasks=num_tasks,
                num_ranks=settings.num_ranks,
                **init_from_text,
                **sized,
            )
        case Method.CARTRIDGE:
            return CartridgeConfig(num_frozen_tokens=settings.num_frozen_tokens, **sized)
        case Method.CPT:
            return _cpt_config(base, tokenizer, settings, ids=ids, context=context, common=common)


def _cpt_config(
    base: Any,
    tokenizer: Any,
    settings: TrainSettings,
    *,
    ids: list[int],
    context: Sequence[Encoded],
    common: dict[str, Any],
) -> CPTConfig:
    """A context of training examples (Blau et al. 2024), or of the given text.

    If the examples do not fit, the first one loses its beginning, because the end of the context is nearest to the
    text. PEFT's radius is absolute and chosen for models of 2,048 dimensions; here it is a share of the mean norm of
    the model's embeddings.
    """
    count = settings.num_virtual_tokens
    types = [_INPUT_TEMPLATE] * count
    if settings.init_text is None:
        gap = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids, types = [], []
        for example in context:
            if len(ids) >= count:
                break
            ids = example.prompt_ids + example.completion_ids + gap + ids
            types = (
                [_INPUT] * len(example.prompt_ids)
                + [_LABEL] * len(example.completion_ids)
                + [_OUTPUT_TEMPLATE] * len(gap)
                + types
            )
        ids, types = repeated(ids, max(count, len(ids)))[-count:], repeated(types, max(count, len(types)))[-count:]
        if set(types) == {_LABEL}:
            types[0] = _INPUT  # labels are not trained
    width = base.get_input_embeddings().weight.shape[-1]
    norm = float(base.get_input_embeddings().weight.detach().float().norm(dim=-1).mean())
    epsilon = settings.cpt_epsilon * norm / math.sqrt(width / 2048)
    return CPTConfig(
        cpt_token_ids=ids,
        cpt_mask=[1] * count,
        cpt_tokens_type_mask=types,
        opt_projection_epsilon=epsilon,
        opt_projection_format_epsilon=epsilon,
        tokenizer_name_or_path=tokenizer.name_or_path,
        **common,
    )


def _init_from_cache(model: PeftModel, ids: list[int]) -> None:
    """Initialise with the frozen model's keys and values of a text (Li & Liang 2021, section 7.4)."""
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, num_virtual_tokens=len(ids))


def _init_tasks_with_ones(model: PeftModel) -> None:
    """Initialise the matrix of every task with ones, so that each task starts with the rows of the text.

    PEFT draws columns and rows around zero, so that their products, and all rows, would start near zero.
    """
    encoder = _encoder(model)
    with torch.no_grad():
        encoder.prefix_task_cols[..., 0].fill_(1.0)
        encoder.prefix_task_rows[:, 0].fill_(1.0)
