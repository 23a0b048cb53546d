"""The formats of soft prompts that can be converted, and what each becomes in PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prompt_store.errors import InvalidPromptError
from prompt_store.files.tensors import read_tensors
from prompt_store.types import CONFIG_FILE, ROWS_TENSOR, TensorData
from server.client.importers.base_config import BaseShape
from server.client.importers.kinds import Format, ImportFileError
from server.client.importers.kobold import is_kobold, read_kobold
from server.client.importers.torch_files import Array, read_torch_file, widened

_MAX_CONFIG_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A soft prompt in PEFT's terms.

    Attributes:
        format: The format that it was read from.
        config: The content of ``adapter_config.json``.
        tensors: The tensors of ``adapter_model.safetensors``, float32.
        notes: What the user should know: what the source says about itself, and what was changed.
    """

    format: Format
    config: Mapping[str, object]
    tensors: Mapping[str, Array]
    notes: list[str] = field(default_factory=list)


def read_foreign(source: Path, *, wanted: Format | None = None, base: BaseShape | None = None) -> Imported:
    """Read a soft prompt of another program.

    Args:
        source: A file, or the directory in which the other program keeps it.
        wanted: The format; None recognises it.
        base: The base model; ChatGLM's files need it.

    Raises:
        ImportFileError: If the format is not known or not the wanted one, or the file is damaged or refused.
        OSError: If a file cannot be read.
    """
    path = _file_of(source)
    if path.name == "adapter_model.bin":
        imported = _peft_pickle(source if source.is_dir() else source.parent, path)
    elif is_kobold(path):
        rows, notes = read_kobold(path)
        imported = _embeddings(Format.KOBOLDAI, rows, notes, path)
    else:
        content = _safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
        imported = _by_content(path, content, base)
    if wanted not in (None, imported.format):
        raise ImportFileError(f"{path.name}: this is a file of the format {imported.format}, not {wanted}")
    for name, tensor in imported.tensors.items():
        if not np.isfinite(tensor).all():
            raise ImportFileError(f"{path.name}: {name} holds NaN or infinity")
    return imported


def _file_of(source: Path) -> Path:
    """The file to read: the source, or the one in it that a known program writes."""
    if not source.is_dir():
        return source
    if (source / "encoder.pt").exists():
        raise ImportFileError(f"{source}: it has encoder.pt: prompts of encoder-decoder models are not served")
    for name in ("adapter_model.bin", "decoder.pt", "pytorch_model.bin"):
        if (source / name).is_file():
            return source / name
    files = sorted(path for pattern in ("*.pt", "*.safetensors", "*.zip") for path in source.glob(pattern))
    if len(files) != 1:
        raise ImportFileError(
            f"{source}: no file of a known format (decoder.pt, pytorch_model.bin, adapter_model.bin, one .pt, "
            ".safetensors or .zip); name the file itself"
        )
    return files[0]


def _by_content(path: Path, content: object, base: BaseShape | None) -> Imported:
    if isinstance(content, np.ndarray):
        return _embeddings(Format.TGIS, content, [], path)
    if not isinstance(content, dict):
        raise ImportFileError(f"{path.name}: it holds neither a tensor nor a dictionary of tensors")
    if "trainable_keys" in content:
        return _cartridge(path, content)
    if any("prefix_encoder." in str(name) or str(name) == "embedding.weight" for name in content):
        return _chatglm(path, content, base)
    named = ", ".join(sorted(map(str, content))[:5])
    raise ImportFileError(f"{path.name}: its content is of no known format (it has {named[:200]})")


def _embeddings(kind: Format, rows: Array, notes: list[str], path: Path) -> Imported:
    if rows.ndim != 2 or 0 in rows.shape:
        raise ImportFileError(
            f"{path.name}: the tensor has shape {list(rows.shape)}; [virtual tokens, width] is needed"
        )
    config = _config("PROMPT_TUNING", rows.shape[0], token_dim=rows.shape[1], prompt_tuning_init="RANDOM")
    return Imported(format=kind, config=config, tensors={ROWS_TENSOR: rows}, notes=notes)


def _cartridge(path: Path, content: Mapping[Any, object]) -> Imported:
    """HazyResearch's file: frozen and trainable keys and values of each layer, [1, heads, tokens, head_dim]."""
    parts = {
        name: _layers(path, name, content.get(name))
        for name in ("fixed_keys", "fixed_values", "trainable_keys", "trainable_values")
    }
    num_layers = len(parts["trainable_keys"])
    num_frozen = parts["fixed_keys"][0].shape[2] if parts["fixed_keys"] else 0
    for name, layers in parts.items():
        other = parts[name.split("_")[0] + "_keys"]
        if len(layers) not in {num_layers, 0 if name.startswith("fixed") else num_layers} or len(layers) != len(
            other
        ):
            raise ImportFileError(f"{path.name}: {name} has {len(layers)} layers, and trainable_keys {num_layers}")
        shape = None if not layers else layers[0].shape
        if any(layer.shape != shape or layer.shape != other[0].shape for layer in layers):
            raise ImportFileError(f"{path.name}: the layers of {name} differ in shape")
    if num_layers == 0:
        raise ImportFileError(f"{path.name}: trainable_keys has no layers")
    stacks = []
    for index in range(num_layers):
        for kind in ("keys", "values"):
            whole = [parts[f"{part}_{kind}"][index] for part in ("fixed", "trainable") if parts[f"{part}_{kind}"]]
            try:
                stacks.append(np.concatenate(whole, axis=2)[0])
            except ValueError as error:
                raise ImportFileError(f"{path.name}: frozen and trainable {kind} do not fit together") from error
    heads, num_tokens, head_dim = stacks[0].shape
    # [layers * 2, heads, tokens, head_dim] to [tokens, layers * 2 * heads * head_dim], as PEFT saves a prefix.
    rows = np.ascontiguousarray(np.stack(stacks).transpose(2, 0, 1, 3)).reshape(num_tokens, -1)
    config = _config(
        "CARTRIDGE",
        num_tokens,
        num_layers=num_layers,
        num_attention_heads=heads,
        token_dim=heads * head_dim,
        num_frozen_tokens=num_frozen,
    )
    return Imported(format=Format.CARTRIDGE, config=config, tensors={ROWS_TENSOR: rows})


def _layers(path: Path, name: str, value: object) -> list[Array]:
    if not isinstance(value, list) or not all(isinstance(item, np.ndarray) for item in value):
        raise ImportFileError(f"{path.name}: {name} is missing, or is not a list of tensors")
    for item in value:
        if item.ndim != 4 or item.shape[0] != 1:
            raise ImportFileError(
                f"{path.name}: {name} has shape {list(item.shape)}; [1, heads, tokens, head_dim] is needed"
            )
    return value


def _chatglm(path: Path, content: Mapping[Any, object], base: BaseShape | None) -> Imported:
    """ChatGLM's prefix encoder: an embedding, with or without two linear layers behind it.

    ChatGLM's own code gives the first token of the text position 0; PEFT gives it the position after the prefix.
    Rotary embeddings depend on distances alone, so keys rotated by the prefix's length give the same answers.
    """
    tensors: dict[str, Array] = {}
    for name, tensor in content.items():
        short = re.sub(r"^(.*\.)?prefix_encoder\.", "", str(name))
        if not isinstance(tensor, np.ndarray) or short not in _CHATGLM_DIMENSIONS:
            raise ImportFileError(
                f"{path.name}: {str(name)[:100]!r} is not part of a prefix encoder. What else the file changes would "
                "be lost, so it is refused"
            )
        if tensor.ndim != _CHATGLM_DIMENSIONS[short]:
            raise ImportFileError(f"{path.name}: {short} has shape {list(tensor.shape)}")
        tensors[short] = tensor
    if "embedding.weight" not in tensors or len(tensors) not in (1, 5):
        raise ImportFileError(f"{path.name}: the prefix encoder is not complete: it has {', '.join(sorted(tensors))}")
    if base is None:
        raise ImportFileError(
            f"{path.name}: a prefix of ChatGLM needs the shape of its base: give the base's config.json by "
            "--base-config"
        )
    rows = tensors["embedding.weight"]
    try:
        if len(tensors) == 5:
            hidden = np.tanh(rows @ tensors["trans.0.weight"].T + tensors["trans.0.bias"])
            rows = (hidden @ tensors["trans.2.weight"].T + tensors["trans.2.bias"]).astype(np.float32)
    except ValueError as error:
        raise ImportFileError(f"{path.name}: the shapes of the prefix encoder do not fit together") from error
    if rows.shape[1] != base.width or not len(rows):
        raise ImportFileError(
            f"{path.name}: the prefix has shape {list(rows.shape)}; the base needs rows of {base.width} "
            f"({base.num_layers} layers x 2 x {base.num_kv_heads} key/value heads x {base.head_dim})"
        )
    whole = rows.reshape(len(rows), base.num_layers, 2, base.num_kv_heads, base.head_dim).copy()
    whole[:, :, 0] = base.moved(whole[:, :, 0], len(rows))
    config = _config(
        "PREFIX_TUNING",
        len(rows),
        num_layers=base.num_layers,
        num_attention_heads=base.num_kv_heads,
        token_dim=base.num_kv_heads * base.head_dim,
        encoder_hidden_size=None,
        prefix_projection=False,
    )
    return Imported(
        format=Format.CHATGLM,
        config=config,
        tensors={ROWS_TENSOR: whole.reshape(len(rows), -1)},
        notes=[f"keys are rotated by {len(rows)} positions: PEFT places the text behind the prefix, ChatGLM at 0"],
    )


_CHATGLM_DIMENSIONS = {
    "embedding.weight": 2,
    "trans.0.weight": 2,
    "trans.0.bias": 1,
    "trans.2.weight": 2,
    "trans.2.bias": 1,
}


def _peft_pickle(directory: Path, path: Path) -> Imported:
    """PEFT's own directory with ``safe_serialization=False``: the same content in another file."""
    config_path = directory / CONFIG_FILE
    if not config_path.is_file():
        raise ImportFileError(f"{directory}: adapter_model.bin without {CONFIG_FILE}")
    try:
        config = json.loads(config_path.read_bytes()[:_MAX_CONFIG_BYTES])
    except (ValueError, RecursionError) as error:
        raise ImportFileError(f"{config_path}: not valid JSON ({error})") from error
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(tensor, np.ndarray) for tensor in content.values()):
        raise ImportFileError(f"{path.name}: it is not a dictionary of tensors")
    if not isinstance(config, dict):
        raise ImportFileError(f"{config_path}: not a JSON object")
    tensors = {str(name): tensor for name, tensor in content.items()}
    return Imported(format=Format.PEFT_PICKLE, config=config, tensors=tensors)


def _safetensors(path: Path) -> object:
    """The same content in a safetensors file: lists are numbered (``trainable_keys.0``)."""
    try:
        wide = {name: _array(path, name, tensor) for name, tensor in read_tensors(path).items()}
    except InvalidPromptError as error:
        raise ImportFileError(f"{path.name}: {error.faults[0].message}") from error
    if len(wide) == 1 and not any("." in name for name in wide):
        return next(iter(wide.values()))
    if not any(name.startswith("trainable_keys.") for name in wide):
        return wide
    lists: dict[str, list[Array]] = {"fixed_keys": [], "fixed_values": []}
    numbered = [(name.rpartition("."), tensor) for name, tensor in wide.items()]
    if not all(number.isascii() and number.isdigit() for (_, _, number), _ in numbered):
        raise ImportFileError(f"{path.name}: its tensors are not numbered by layer, as in trainable_keys.0")
    for (name, _, _), tensor in sorted(numbered, key=lambda item: (item[0][0], int(item[0][2]))):
        lists.setdefault(name, []).append(tensor)
    return lists


def _array(path: Path, name: str, tensor: TensorData) -> Array:
    if tensor.dtype == "BF16":
        return widened(np.frombuffer(tensor.data, "<u2").view(np.uint16)).reshape(tensor.shape)
    if tensor.dtype not in _NUMPY_DTYPES:
        raise ImportFileError(f"{path.name}: {name[:100]!r} has elements of type {tensor.dtype}")
    return np.frombuffer(tensor.data, _NUMPY_DTYPES[tensor.dtype]).astype(np.float32).reshape(tensor.shape)


_NUMPY_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def _config(peft_type: str, num_virtual_tokens: int, **fields: object) -> dict[str, object]:
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": num_virtual_tokens,
        "num_transformer_submodules": 1,
        "inference_mode": True,
        "base_model_name_or_path": None,
        **fields,
    }
