"""Check that the base can serve a LoRA or IA3. All faults are reported together; ``validation`` lists the codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from prompt_store.adapters import Adapter, AdapterLimits, num_parameters
from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files.adapter_config import AdapterConfig
from prompt_store.files.head_validation import head_faults
from prompt_store.files.lora.adapter_layout import PREFIX, Layout, read_layout
from prompt_store.files.lora.base_copies import copy_faults
from prompt_store.files.lora.module_names import KnownNames
from prompt_store.files.tensor_faults import MAX_OF_A_CODE, limited, value_faults, weights_fault
from prompt_store.files.tensors import read_tensors
from prompt_store.types import WEIGHTS_FILE, AdaptedModule, BaseModelSpec, ModuleShape, TaskType, TensorData

_LARGEST = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": 65504.0}
_VARIANTS = {"bias": "a LoRA with lora_bias", "gain": "an IA3", "magnitude": "a DoRA"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def validate_adapter(
    config: AdapterConfig,
    faults: list[Fault],
    weights: bytes | Path,
    base: BaseModelSpec,
    *,
    limits: AdapterLimits,
    overrides: Mapping[str, object],
) -> Adapter:
    """Check the weights of an adapter with its configuration and the base.

    Args:
        config: The parsed configuration.
        faults: What is wrong with it so far.
        weights: The weights file: its bytes or its path.
        base: The served model.
        limits: What the operator allows.
        overrides: The statements of the uploader or operator that were used.

    Raises:
        InvalidPromptError: With all faults of both files.
        OSError: If the path cannot be read.
    """
    if base.adapters_off is not None or not base.modules:
        why = f": {base.adapters_off}" if base.adapters_off else ""
        raise InvalidPromptError([Fault("adapters_off", f"this server serves no LoRA or IA3 adapters{why}")])
    try:
        tensors = read_tensors(weights)
    except InvalidPromptError as error:
        _, found = read_layout(config.fields, {})
        raise InvalidPromptError(limited([*faults, *_of_config(found), *error.faults])) from error
    layout, found = read_layout(config.fields, {name: tensor.shape for name, tensor in tensors.items()})
    found += faults
    found += _module_faults(layout.modules, tensors, base)
    found += _limit_faults(layout.modules, tensors, base, limits)
    found += _head_faults(config, layout, tensors, base)
    found += copy_faults(layout.copies, tensors, base)
    for name in sorted(tensors.keys() - layout.copies.keys()):
        found += value_faults(name, tensors[name], base.dtype, allow_float64=False)
    if found or config.peft_type is None or config.task_type is None:
        raise InvalidPromptError(limited(found))
    return Adapter(
        peft_type=config.peft_type,
        task_type=config.task_type.value,
        base_model_name_or_path=config.base_model_name_or_path,
        modules=layout.modules,
        tensors=tensors,
        num_labels=next((tensors[name].shape[0] for name in layout.heads if name.endswith(".weight")), None),
        overrides=overrides,
    )


def _of_config(faults: list[Fault]) -> list[Fault]:
    """Faults without those of tensors, which could not be read."""
    return [fault for fault in faults if fault.file != WEIGHTS_FILE]


def _module_faults(
    modules: tuple[AdaptedModule, ...], tensors: Mapping[str, TensorData], base: BaseModelSpec
) -> list[Fault]:
    known = KnownNames(base.modules)
    faults = _part_faults(modules, base)
    num_unknown = 0
    for module in modules:
        shape = base.modules.get(module.name)
        tensor = module.tensors[min(module.tensors)]
        if shape is None:
            num_unknown += 1
            hint = known.hint(module.name) if num_unknown <= MAX_OF_A_CODE else ""
            message = f"belongs to a module {module.name[:200]!a} that {base.name!r} does not have{hint}"
            faults.append(weights_fault("unknown_module", message, tensor[:200]))
        elif shape.unsupported is not None:
            message = f"belongs to {module.name}, which no adapter can change here: {shape.unsupported}"
            faults.append(weights_fault("unsupported_module", message, tensor[:200]))
        else:
            faults += _shape_faults(module, shape, tensors, base)
    return faults


def _part_faults(modules: tuple[AdaptedModule, ...], base: BaseModelSpec) -> list[Fault]:
    """One fault for each kind of part that the server does not apply."""
    found = {part: tensor for module in modules for part, tensor in module.tensors.items()}
    return [
        weights_fault(
            "unsupported_variant",
            f"is of {_VARIANTS[part]}, which this server's engine does not apply",
            found[part][:200],
        )
        for part in sorted(found.keys() - set(base.adapter_parts))
    ]


def _shape_faults(
    module: AdaptedModule, shape: ModuleShape, tensors: Mapping[str, TensorData], base: BaseModelSpec
) -> list[Fault]:
    """Compare the sizes of a module's tensors with its own; faults of their dimensions are found already."""
    is_embedding = shape.kind == "embedding"
    has_embedding = any(".lora_embedding_" in tensor for tensor in module.tensors.values())
    if has_embedding is not is_embedding:
        what, part = ("an embedding", "lora_embedding_") if is_embedding else ("a linear layer", "lora_")
        tensor = module.tensors[min(module.tensors)]
        if is_embedding and "gain" in module.tensors:
            return [weights_fault("unsupported_variant", f"is an IA3 of an embedding, {module.name}", tensor)]
        message = f"is not of this kind of module: {module.name} is {what}, and needs {part}A and {part}B"
        return [weights_fault("missing_tensor", message, tensor)]
    on_input = module.gain_on_input
    needed = {
        "A": (1, shape.in_features, "[rank, {}]"),
        "B": (0, shape.out_features, "[{}, rank]"),
        "bias": (0, shape.out_features, "[{}]"),
        "magnitude": (0, shape.out_features, "[{}]"),
        "gain": (1, shape.in_features, "[1, {}]") if on_input else (0, shape.out_features, "[{}, 1]"),
    }
    faults = []
    for part, tensor in module.tensors.items():
        dimension, size, text = needed[part]
        found = tensors[tensor].shape
        if len(found) > dimension and 0 not in found and found[dimension] != size:
            message = f"has shape {list(found)}; {text.format(size)} is needed for {module.name} of {base.name!r}"
            faults.append(weights_fault("shape_mismatch", message, tensor))
    return faults


def _limit_faults(
    modules: tuple[AdaptedModule, ...],
    tensors: Mapping[str, TensorData],
    base: BaseModelSpec,
    limits: AdapterLimits,
) -> list[Fault]:
    faults = []
    for module in modules:
        tensor = module.tensors[min(module.tensors)]
        if module.rank > limits.max_rank:
            message = f"has rank {module.rank}; the limit of this server is {limits.max_rank} (--max-adapter-rank)"
            faults.append(weights_fault("rank_too_large", message, tensor[:200]))
        if not math.isfinite(module.scale) or abs(module.scale) > _LARGEST[base.dtype]:
            message = f"has the scale {module.scale:g}, beyond the range of the serving dtype {base.dtype}"
            faults.append(weights_fault("dtype_overflow", message, tensor[:200]))
    num_bytes = num_parameters(modules, tensors) * _BYTES[base.dtype]
    if limits.max_bytes is not None and num_bytes > limits.max_bytes:
        message = (
            f"{WEIGHTS_FILE}: the adapter takes {num_bytes} bytes in {base.dtype}, and could never be loaded: "
            f"adapters have {limits.max_bytes} bytes of memory (--adapter-host-memory, --adapter-device-memory)"
        )
        faults.append(Fault("adapter_too_large", message, WEIGHTS_FILE))
    return faults


def _head_faults(
    config: AdapterConfig, layout: Layout, tensors: Mapping[str, TensorData], base: BaseModelSpec
) -> list[Fault]:
    heads = {name: tensors[name] for name in layout.heads}
    if config.task_type is TaskType.SEQ_CLS:
        return head_faults(heads, base, PREFIX)
    message = (
        f"is a classification head, which requires the task type {TaskType.SEQ_CLS}; if the file names no task, "
        f"upload with task_type={TaskType.SEQ_CLS} (prelude push --task-type {TaskType.SEQ_CLS})"
    )
    return [weights_fault("unexpected_tensor", message, name) for name in sorted(heads)]
