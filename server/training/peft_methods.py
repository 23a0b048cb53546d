"""PEFT's configuration of each training method; initialising, saving and restoring a soft prompt or an adapter.

PEFT saves what is served, which is not what is trained: P-tuning and prefix tuning with a projection are saved
without their network, and CPT with its change added to the embeddings. So a checkpoint contains the whole encoder,
and PEFT's two files are written once, at the end.
"""

from __future__ import annotations

import json
import math
import warnings
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
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save

from prompt_store.durable import write_file
from server.training.encoding import Encoded
from server.training.heads.classifier import HEAD_PREFIX, head_state, restore_head, without_trained_head
from server.training.lora import ADAPTER, adapter_state, make_adapter, mean_change, restore_adapter
from server.training.settings import Method, TrainSettings

CONFIG_FILE = "adapter_config.json"
MAX_ENCODER_WIDTH = 512
"""The code of Li & Liang 2021 uses 512, and 800 for one task; wider is slower."""

_INPUT_TEMPLATE, _INPUT, _OUTPUT_TEMPLATE, _LABEL = 1, 2, 3, 4
"""CPT's types of the tokens of a context; it does not change labels."""


def make_peft_model(
    base: Any, tokenizer: Any, settings: TrainSettings, *, text: str, context: Sequence[Encoded], num_tasks: int
) -> PeftModel:
    """Add an initialised soft prompt, or an untrained adapter, to a frozen model.

    Args:
        base: The causal model (transformers), possibly with an adapter of ``add_over``.
        tokenizer: Its tokenizer.
        settings: The method and its settings.
        text: Text to initialise from, if the method uses one.
        context: Examples to initialise a CPT prompt from, unless ``settings.init_text`` is given.
        num_tasks: Number of tasks of a multitask prompt.

    Raises:
        SettingsError: If the settings of an adapter do not fit the model.
    """
    if settings.gradient_checkpointing:
        # transformers 5.23 renamed the method, and warns about the old name.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if not settings.method.is_soft_prompt:
        return make_adapter(base, settings)
    ids = repeated(tokenizer(text)["input_ids"] or [0], settings.num_virtual_tokens)
    config = _config(base, tokenizer, settings, text=text, ids=ids, context=context, num_tasks=num_tasks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        model = _with_all_embeddings(get_peft_model(base, config))
    if settings.method in (Method.PREFIX_TUNING, Method.CARTRIDGE):
        _init_from_cache(model, ids)
    elif settings.method is Method.MULTITASK:
        _init_tasks_with_ones(model)
    return model


def repeated(ids: Sequence[int], count: int) -> list[int]:
    """Repeat or truncate ids to a length, as PEFT's TEXT initialisation does."""
    return (list(ids) * math.ceil(count / len(ids)))[:count]


def state_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy on the CPU of the encoder's state with its frozen parts, or of an adapter's weights; and of the head."""
    if is_adapter(model):
        return adapter_state(model)
    encoder = {
        key: value.detach().to("cpu", copy=True).contiguous() for key, value in _encoder(model).state_dict().items()
    }
    return encoder | head_state(model)


def restore(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Load a state of ``state_of``."""
    if is_adapter(model):
        restore_adapter(model, state)
    else:
        own = {key: value for key, value in state.items() if not key.startswith(HEAD_PREFIX)}
        _encoder(model).load_state_dict(own)
        restore_head(model, state)


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
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_name
    if config.get("tokenizer_name_or_path"):
        config["tokenizer_name_or_path"] = base_name
    if config.get("prompt_tuning_init_text") and not keeps_text:
        config |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    if isinstance(config.get("modules_to_save"), list):
        config["modules_to_save"] = sorted(set(config["modules_to_save"]))  # PEFT repeats the head's names
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()  # a set in PEFT, whose order changes from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(base: Any, folder: Path) -> PeftModel:
    """Load what ``save_adapter`` wrote, as a program would that uses PEFT alone."""
    return _with_all_embeddings(PeftModel.from_pretrained(base, str(folder)))


def remove_adapter(model: PeftModel) -> Any:
    """The model as it was before ``make_peft_model`` or ``load_adapter``."""
    return model.unload() if is_adapter(model) else without_trained_head(model.get_base_model())


def is_adapter(model: PeftModel) -> bool:
    """Whether the model has an adapter, rather than a soft prompt."""
    return not model.peft_config[ADAPTER].is_prompt_learning


def mean_norm(model: PeftModel) -> float:
    """Mean Euclidean norm of the rows as they would be saved; for a multitask prompt, of the shared rows.

    For an adapter: the mean size of its changes, as shares of the weights' norms.
    """
    if is_adapter(model):
        return mean_change(model)
    with torch.no_grad():
        if model.peft_config[ADAPTER].peft_type == "MULTITASK_PROMPT_TUNING":
            rows = _encoder(model).embedding.weight
        else:
            rows = model.get_prompt_embedding_to_save(ADAPTER)
        return float(rows.float().norm(dim=-1).mean())


def _with_all_embeddings(model: PeftModel) -> PeftModel:
    """Let PEFT use adapted embeddings, if an adapter below the soft prompt changes them.

    PEFT searches the parameters for a matrix with a row per token, and finds that of the unchanged embeddings.
    """
    base: Any = model.get_base_model()
    embeddings: Any = base.get_input_embeddings()
    has_adapter = isinstance(embeddings, BaseTunerLayer)
    if has_adapter and not is_adapter(model):
        model.word_embeddings = embeddings
    return model


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
    common: dict[str, Any] = {"task_type": TaskType.SEQ_CLS if settings.has_head else TaskType.CAUSAL_LM}
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
        case Method.LORA:
            raise ValueError("lora trains no soft prompt")


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
    # PEFT cannot disable the soft prompt of a classifier; the model below it has none.
    base: Any = model.get_base_model()
    with torch.no_grad():
        cache = base(input_ids=tokens, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, num_virtual_tokens=len(ids))


def _init_tasks_with_ones(model: PeftModel) -> None:
    """Initialise the matrix of every task with ones, so that each task starts with the rows of the text.

    PEFT draws columns and rows around zero, so that their products, and all rows, would start near zero.
    """
    encoder = _encoder(model)
    with torch.no_grad():
        encoder.prefix_task_cols[..., 0].fill_(1.0)
        encoder.prefix_task_rows[:, 0].fill_(1.0)
