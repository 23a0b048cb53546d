"""Validation of an uploaded soft prompt or adapter against the served model. All faults are reported together.

The codes are stable; programs may switch on them.

==============================  ====================================================================================
code                            what is wrong
==============================  ====================================================================================
``config_too_large``            the configuration is over 1 MiB
``invalid_json``                the configuration is not strict JSON: encoding, syntax, repeated keys, NaN, depth
``missing_field``               a field that serving needs is absent or null
``invalid_field``               a field has the wrong type or is out of range
``unsupported_peft_type``       not one of PEFT's prompt-learning methods, LORA or IA3
``unsupported_task_type``       a task other than CAUSAL_LM or, if the method supports it, SEQ_CLS
``task_type_conflict``          the uploader states another task than the configuration
``unsupported_submodules``      ``num_transformer_submodules`` is not 1 (an encoder-decoder prompt)
``inconsistent_token_dim``      ``token_dim`` is not the width of the rows
``base_model_mismatch``         trained on another base, and the server does not accept that
``pickle_file``                 the weights are a torch.save file
``invalid_safetensors``         the weights are not a well-formed safetensors file, or are truncated
``header_too_large``            the safetensors header is over 1 MiB
``missing_tensor``              no ``prompt_embeddings``, no task factors (multitask), no head (SEQ_CLS); of an
                                adapter A without B, no magnitude (DoRA) or bias, LoRA and IA3 mixed
``unexpected_tensor``           another tensor, which PEFT would load over the frozen base
``several_heads``               the file has both ``base_model.score`` and ``base_model.classifier``
``unsupported_dtype``           a tensor is not F32, F16 or BF16 (or F64, where that is allowed)
``shape_mismatch``              a tensor does not have the shape that the base, or another tensor, requires
``layer_count_mismatch``        a key/value prefix for another number of layers
``num_virtual_tokens_mismatch`` the number of rows is not that of the configuration
``num_tasks_mismatch``          the number of tasks of the multitask factors is not that of the configuration
``num_ranks_mismatch``          the rank of the multitask factors is not that of the configuration
``context_exceeded``            no room for one token of text and one new token
``non_finite_values``           NaN or infinity
``dtype_overflow``              values, scales, or products of a task, that become infinite in the serving dtype
``adapters_off``                a LoRA or IA3, and the server serves none
``unknown_module``              a tensor of an adapter belongs to a module that the base does not have
``unsupported_module``          it belongs to one that no adapter can change, such as an expert of a mixture
``unsupported_variant``         another computation than LoRA, rsLoRA, DoRA or IA3, or DoRA of an embedding
``rank_mismatch``               the rank of a tensor is not that of the configuration
``rank_too_large``              a rank above ``--max-adapter-rank``
``unsafe_pattern``              a pattern of ranks, alphas or modules that could take long to match, or is none
``changes_base``                PiSSA, OLoRA, CorDA or LoftQ that was not converted
``replaces_base``               trained biases, whole modules, or embeddings that are not the base's own
``adapter_too_large``           more bytes than the memory for adapters
``unknown_adapter``             the adapter that a soft prompt was trained over does not exist
==============================  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prompt_store.adapters import NO_LIMITS, Adapter, AdapterLimits
from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files.adapter_config import AdapterConfig, parse_adapter_config
from prompt_store.files.base_names import base_faults
from prompt_store.files.foreign_tensors import foreign_faults, guess_content
from prompt_store.files.head_validation import head_faults
from prompt_store.files.lora.adapter_validation import validate_adapter
from prompt_store.files.multitask import factor_faults, product_faults
from prompt_store.files.tensor_faults import shown_number, value_faults, weights_fault
from prompt_store.files.tensors import read_tensors
from prompt_store.types import (
    CONFIG_FILE,
    HEAD_TENSOR_PATTERN,
    ROWS_TENSOR,
    TASK_COLS_TENSOR,
    TASK_ROWS_TENSOR,
    WEIGHTS_FILE,
    BaseModelSpec,
    PeftType,
    PromptKind,
    SoftPrompt,
    TaskType,
    TensorData,
)


def validate(
    config_bytes: bytes,
    weights: bytes | Path,
    base: BaseModelSpec,
    *,
    require_same_base: bool,
    allow_float64: bool = False,
    task_type: TaskType | None = None,
    limits: AdapterLimits = NO_LIMITS,
) -> SoftPrompt | Adapter:
    """Read the two files of a soft prompt or an adapter and check that the base can serve it.

    Weights given by a path are mapped; this uses at most a few MiB of memory.

    Args:
        config_bytes: ``adapter_config.json``.
        weights: ``adapter_model.safetensors``: its bytes or its path.
        base: The served model.
        require_same_base: Reject a configuration that names another base.
        allow_float64: Accept F64 tensors whose values the serving dtype can hold. They lose precision when served, so
            this is a decision of the operator.
        task_type: The task that the uploader states. It replaces a missing task of the configuration, unless the
            files contradict it.
        limits: What the operator allows of adapters.

    Returns:
        The soft prompt or adapter; its ``overrides`` are the statements of the uploader or operator that were used.

    Raises:
        InvalidPromptError: With all faults of both files.
        OSError: If the path cannot be read.
    """
    config, faults = parse_adapter_config(config_bytes, task_type)
    if config.is_other_method:  # its tensors belong to another kind of adapter
        raise InvalidPromptError(faults)
    overrides: dict[str, object] = {}
    other_base = base_faults(config.base_model_name_or_path, base)
    if require_same_base:
        faults += other_base
    elif other_base:
        overrides["allow_other_base"] = True
    if task_type is not None and config.fields.get("task_type") is None:
        overrides["task_type"] = task_type.value
    if config.peft_type is not None and config.peft_type.kind is PromptKind.ADAPTER:
        return validate_adapter(config, faults, weights, base, limits=limits, overrides=overrides)
    tensors: Mapping[str, TensorData] = {}
    try:
        tensors = read_tensors(weights)
        faults += _tensor_faults(config, tensors, base, allow_float64=allow_float64)
    except InvalidPromptError as error:
        faults += error.faults
    if faults or config.peft_type is None or config.task_type is None or config.num_virtual_tokens is None:
        raise InvalidPromptError(faults)
    return SoftPrompt(
        peft_type=config.peft_type,
        task_type=config.task_type.value,
        num_virtual_tokens=config.num_virtual_tokens,
        base_model_name_or_path=config.base_model_name_or_path,
        tensors=tensors,
        overrides=overrides,
    )


def _tensor_faults(
    config: AdapterConfig, tensors: Mapping[str, TensorData], base: BaseModelSpec, *, allow_float64: bool
) -> list[Fault]:
    is_multitask = config.peft_type is PeftType.MULTITASK_PROMPT_TUNING
    has_head = config.task_type is TaskType.SEQ_CLS
    faults = _name_faults(config, tensors)
    heads = {name: tensor for name, tensor in tensors.items() if HEAD_TENSOR_PATTERN.fullmatch(name)}
    names = [
        ROWS_TENSOR,
        *((TASK_COLS_TENSOR, TASK_ROWS_TENSOR) if is_multitask else ()),
        *(heads if has_head else ()),
    ]
    for name in names:
        if name in tensors:
            # PEFT multiplies the factors in float32; only their products are rounded to the serving dtype.
            dtype = "float32" if is_multitask and name not in heads else base.dtype
            faults += value_faults(name, tensors[name], dtype, allow_float64=allow_float64)
    if ROWS_TENSOR in tensors:
        faults += _row_faults(config, tensors[ROWS_TENSOR], base)
    if is_multitask:
        faults += factor_faults(config, tensors)
    if has_head:
        faults += head_faults(heads, base)
    if is_multitask and not faults:
        faults += product_faults(tensors, base)
    return faults


def _row_faults(config: AdapterConfig, rows: TensorData, base: BaseModelSpec) -> list[Fault]:
    if len(rows.shape) != 2:
        message = f"has shape {list(rows.shape)}; [num_virtual_tokens, width] is needed"
        return [weights_fault("shape_mismatch", message)]
    num_rows, width = rows.shape
    faults = []
    if config.peft_type is not None:
        find = _key_value_faults if config.peft_type.is_key_values else _embedding_faults
        faults += find(config, width, base)
    return faults + _length_faults(config, num_rows, base)


def _name_faults(config: AdapterConfig, tensors: Mapping[str, TensorData]) -> list[Fault]:
    """Missing rows, and tensors that do not belong to the file.

    If the configuration does not name a valid method or task, there is a fault for that already, and every tensor
    that some soft prompt may have is accepted here.
    """
    extra = tensors.keys() - {ROWS_TENSOR}
    if config.peft_type in (None, PeftType.MULTITASK_PROMPT_TUNING):
        extra -= {TASK_COLS_TENSOR, TASK_ROWS_TENSOR}
    if config.task_type is not TaskType.CAUSAL_LM:
        extra = {name for name in extra if not HEAD_TENSOR_PATTERN.fullmatch(name)}
    faults = foreign_faults(extra, tensors)
    if ROWS_TENSOR not in tensors:
        guess = guess_content(tensors)
        faults.append(weights_fault("missing_tensor", f"is missing: {guess}" if guess else "is missing"))
    return faults


def _embedding_faults(config: AdapterConfig, width: int, base: BaseModelSpec) -> list[Fault]:
    faults = []
    if width != base.embedding_width:
        message = f"rows have width {width}; the embeddings of {base.name!r} have width {base.embedding_width}"
        faults.append(weights_fault("shape_mismatch", message))
    if config.token_dim not in (None, width):
        stated = shown_number(config.token_dim)
        message = f"{CONFIG_FILE}: token_dim is {stated}; the rows in {WEIGHTS_FILE} have width {width}"
        faults.append(Fault("inconsistent_token_dim", message, CONFIG_FILE, "token_dim"))
    return faults


def _key_value_faults(config: AdapterConfig, width: int, base: BaseModelSpec) -> list[Fault]:
    """Distinguish a wrong number of layers from wrong heads, which the width alone cannot.

    A row has ``num_layers * 2 * num_kv_heads * head_dim`` values, so 4 layers of width 8 and 2 of width 16 have the
    same size; the number of layers in the configuration decides, if any. ``token_dim`` and ``num_attention_heads``
    are not checked, because PEFT replaces them by those of the base.
    """
    layer_width = 2 * base.num_kv_heads * base.head_dim
    num_layers = config.num_layers
    if num_layers is None:
        num_layers = width // layer_width if width % layer_width == 0 and width else base.num_layers
    layout = (
        f"{base.name!r} needs {base.key_values_width} "
        f"({base.num_layers} layers x 2 x {base.num_kv_heads} key/value heads x head_dim {base.head_dim})"
    )
    faults = []
    if num_layers != base.num_layers:
        message = (
            f"is a prefix for {shown_number(num_layers)} layers, but {base.name!r} has {base.num_layers}: "
            f"rows have width {width}; {layout}"
        )
        faults.append(weights_fault("layer_count_mismatch", message))
    if width != num_layers * layer_width:
        per_layer = ""
        if num_layers <= width:
            per_layer = (
                f", {width / (2 * num_layers):g} for the keys of each layer where {layer_width // 2} are needed"
            )
        message = f"rows have width {width}{per_layer}: trained for other key/value heads or hidden size; {layout}"
        faults.append(weights_fault("shape_mismatch", message))
    return faults


def _length_faults(config: AdapterConfig, num_rows: int, base: BaseModelSpec) -> list[Fault]:
    faults = []
    stated = config.num_virtual_tokens
    if num_rows == 0:
        faults.append(weights_fault("shape_mismatch", "has no rows; a soft prompt has at least 1 virtual token"))
    if stated not in (None, num_rows):
        message = f"has {num_rows} rows; {CONFIG_FILE} says num_virtual_tokens {shown_number(stated)}"
        faults.append(weights_fault("num_virtual_tokens_mismatch", message))
    if num_rows + 2 > base.max_model_len:
        message = (
            f"takes {num_rows} positions of the {base.max_model_len} that {base.name!r} has (max_model_len); "
            "at least 2 must remain, for text and a new token"
        )
        faults.append(weights_fault("context_exceeded", message))
    return faults
