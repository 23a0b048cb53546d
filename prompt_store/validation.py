"""Whether an uploaded soft prompt can be served by the resident base. Every fault is reported, not the first alone.

The codes are stable; programs may switch on them.

==============================  ====================================================================================
code                            what is wrong
==============================  ====================================================================================
``config_too_large``            the configuration is over 1 MiB
``invalid_json``                the configuration is not strict JSON: encoding, syntax, a key twice, NaN, depth
``missing_field``               a field that serving needs is absent or null
``invalid_field``               a field has the wrong type or is out of range
``unsupported_peft_type``       another method than PROMPT_TUNING, P_TUNING or PREFIX_TUNING
``unsupported_task_type``       another task than CAUSAL_LM
``unsupported_submodules``      ``num_transformer_submodules`` is not 1 (an encoder-decoder prompt)
``inconsistent_token_dim``      ``token_dim`` is not the width of the rows that it describes
``base_model_mismatch``         trained on another base, where the server insists on its own
``pickle_file``                 the weights are a torch.save file
``invalid_safetensors``         the weights are not a well-formed safetensors file, or are cut short
``header_too_large``            the safetensors header is over 1 MiB
``missing_tensor``              there is no ``prompt_embeddings``
``unexpected_tensor``           there is another tensor, which PEFT would load over the frozen base
``unsupported_dtype``           the rows are not F32, F16 or BF16
``shape_mismatch``              the rows are not a matrix of the width that the base takes
``layer_count_mismatch``        a key/value prefix for another number of layers
``num_virtual_tokens_mismatch`` the file has another number of rows than the configuration says
``context_exceeded``            no room is left for one token of text and one new token
``non_finite_values``           NaN or infinity
``dtype_overflow``              values that become infinite in the serving dtype
==============================  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from prompt_store import formats
from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.numerics import count_non_finite, count_overflows
from prompt_store.tensors import read_tensors
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, BaseModelSpec, PeftType, SoftPrompt, TensorData

TENSOR = "prompt_embeddings"
SERVED_DTYPES = ("F32", "F16", "BF16")

_MAX_NAMED_TENSORS = 8


def validate(
    config_bytes: bytes, weights: bytes | Path, base: BaseModelSpec, *, require_same_base: bool
) -> SoftPrompt:
    """Read a soft prompt's two files and check that the base can serve it.

    Args:
        config_bytes: ``adapter_config.json``.
        weights: ``adapter_model.safetensors``: its bytes or its path.
        base: The resident model.
        require_same_base: Refuse a prompt whose configuration names another base.

    Raises:
        InvalidPromptError: With all faults of both files.
        OSError: If the path cannot be read.
    """
    faults: list[Fault] = []
    config: Mapping[str, object] = {}
    tensors: Mapping[str, TensorData] = {}
    try:
        config = formats.read_config(config_bytes)
        faults += formats.config_faults(config)
        if require_same_base:
            faults += _base_faults(config, base)
    except InvalidPromptError as error:
        faults += error.faults
    try:
        tensors = read_tensors(weights)
        faults += _tensor_faults(config, tensors, base)
    except InvalidPromptError as error:
        faults += error.faults
    if faults:
        raise InvalidPromptError(faults)
    return formats.to_soft_prompt(config, tensors)


def _base_faults(config: Mapping[str, object], base: BaseModelSpec) -> list[Fault]:
    """Names match by their last component: the same checkpoint may be a hub id here and a directory there.

    A configuration that names no base cannot be held against it.
    """
    key = "base_model_name_or_path"
    name = config.get(key)
    ours = {PurePosixPath(known).name.lower() for known in (base.name, *base.other_names)}
    if not isinstance(name, str) or not name or PurePosixPath(name).name.lower() in ours:
        return []
    message = (
        f"{CONFIG_FILE}: the soft prompt was trained on {name[:200]!a}; this server runs {base.name!r} and takes no "
        "other's (unless it is started with --allow-other-base)"
    )
    return [Fault("base_model_mismatch", message, CONFIG_FILE, key)]


def _tensor_faults(
    config: Mapping[str, object], tensors: Mapping[str, TensorData], base: BaseModelSpec
) -> list[Fault]:
    faults = _name_faults(tensors)
    rows = tensors.get(TENSOR)
    if rows is None:
        return faults
    if rows.dtype in SERVED_DTYPES:
        faults += _value_faults(rows, base)
    else:
        faults.append(_dtype_fault(rows.dtype))
    if len(rows.shape) != 2:
        faults.append(
            _fault("shape_mismatch", f"has shape {list(rows.shape)}; [num_virtual_tokens, width] is needed")
        )
        return faults
    num_rows, width = rows.shape
    peft_type = config.get("peft_type")
    if peft_type in PeftType.__members__:
        find = _key_value_faults if PeftType(str(peft_type)).is_key_values else _embedding_faults
        faults += find(config, width, base)
    return faults + _length_faults(config, num_rows, base)


def _name_faults(tensors: Mapping[str, TensorData]) -> list[Fault]:
    extra = sorted(tensors.keys() - {TENSOR})
    faults = [
        Fault(
            "unexpected_tensor",
            f"{WEIGHTS_FILE}: tensor {name[:100]!a} does not belong in a soft prompt; only {TENSOR} is taken, "
            "because any other would overwrite weights of the shared base",
            WEIGHTS_FILE,
            name[:100],
        )
        for name in extra[:_MAX_NAMED_TENSORS]
    ]
    if len(extra) > _MAX_NAMED_TENSORS:
        message = f"{WEIGHTS_FILE}: {len(extra) - _MAX_NAMED_TENSORS} more tensors do not belong in a soft prompt"
        faults.append(Fault("unexpected_tensor", message, WEIGHTS_FILE))
    if TENSOR not in tensors:
        faults.append(_fault("missing_tensor", "is missing"))
    return faults


def _dtype_fault(dtype: str) -> Fault:
    served = f"{', '.join(SERVED_DTYPES)} are taken"
    if dtype == "F64":
        return _fault(
            "unsupported_dtype", f"has dtype F64, which no model is served in: re-save as float32; {served}"
        )
    return _fault("unsupported_dtype", f"has dtype {dtype}; {served}")


def _value_faults(rows: TensorData, base: BaseModelSpec) -> list[Fault]:
    faults = []
    count, first = count_non_finite(rows)
    if count:
        faults.append(_fault("non_finite_values", f"has {count} NaN or infinite values, {_place(rows, first)}"))
    count, first = count_overflows(rows, base.dtype)
    if count:
        message = f"has {count} values beyond the range of the serving dtype {base.dtype}, {_place(rows, first)}"
        faults.append(_fault("dtype_overflow", message))
    return faults


def _place(rows: TensorData, index: int) -> str:
    width = rows.shape[-1] if rows.shape else 1
    return f"the first at row {index // width}, column {index % width}"


def _embedding_faults(config: Mapping[str, object], width: int, base: BaseModelSpec) -> list[Fault]:
    faults = []
    if width != base.embedding_width:
        message = f"rows have width {width}; the embeddings of {base.name!r} have width {base.embedding_width}"
        faults.append(_fault("shape_mismatch", message))
    token_dim = formats.positive_integer(config, "token_dim")
    if token_dim not in (None, width):
        message = f"{CONFIG_FILE}: token_dim is {_number(token_dim)}; the rows in {WEIGHTS_FILE} have width {width}"
        faults.append(Fault("inconsistent_token_dim", message, CONFIG_FILE, "token_dim"))
    return faults


def _key_value_faults(config: Mapping[str, object], width: int, base: BaseModelSpec) -> list[Fault]:
    """Tell a prefix for another number of layers from one for other heads; the width alone may hide either.

    A row holds ``num_layers * 2 * num_kv_heads * head_dim`` values, so that 4 layers of width 8 and 2 of width 16
    look alike: where the configuration states its layers, they decide. ``token_dim`` and ``num_attention_heads`` are
    not checked, because PEFT replaces them by the base's own.
    """
    layer_width = 2 * base.num_kv_heads * base.head_dim
    stated = formats.positive_integer(config, "num_layers")
    num_layers = stated
    if num_layers is None:
        num_layers = width // layer_width if width % layer_width == 0 and width else base.num_layers
    layout = (
        f"{base.name!r} takes {base.key_values_width} "
        f"({base.num_layers} layers x 2 x {base.num_kv_heads} key/value heads x head_dim {base.head_dim})"
    )
    faults = []
    if num_layers != base.num_layers:
        message = (
            f"is a prefix for {_number(num_layers)} layers and {base.name!r} has {base.num_layers}: "
            f"rows have width {width}; {layout}"
        )
        faults.append(_fault("layer_count_mismatch", message))
    if width != num_layers * layer_width:
        per_layer = ""
        if num_layers <= width:
            per_layer = (
                f", {width / (2 * num_layers):g} for the keys of each layer where {layer_width // 2} are needed"
            )
        message = f"rows have width {width}{per_layer}: trained for other key/value heads or hidden size; {layout}"
        faults.append(_fault("shape_mismatch", message))
    return faults


def _length_faults(config: Mapping[str, object], num_rows: int, base: BaseModelSpec) -> list[Fault]:
    faults = []
    stated = formats.positive_integer(config, "num_virtual_tokens")
    if num_rows == 0:
        faults.append(_fault("shape_mismatch", "has no rows; a soft prompt has at least 1 virtual token"))
    if stated not in (None, num_rows):
        message = f"has {num_rows} rows; {CONFIG_FILE} says num_virtual_tokens {_number(stated)}"
        faults.append(_fault("num_virtual_tokens_mismatch", message))
    if num_rows + 2 > base.max_model_len:
        message = (
            f"takes {num_rows} positions of the {base.max_model_len} that {base.name!r} has (max_model_len); "
            "at least 2 have to be left, for text and for a new token"
        )
        faults.append(_fault("context_exceeded", message))
    return faults


def _number(value: int | None) -> str:
    """A number as a message quotes it; Python refuses to print integers beyond 4,300 digits."""
    return str(value) if value is not None and value < 10**18 else "a huge number"


def _fault(code: str, message: str) -> Fault:
    return Fault(code, f"{WEIGHTS_FILE}: {TENSOR} {message}", WEIGHTS_FILE, TENSOR)
