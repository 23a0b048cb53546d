"""Whole tensors of the base in an adapter's file: PEFT would load them over the base that all requests share.

PEFT adds copies of the embeddings and of the head where they are adapted, or where the vocabulary was resized. A copy
that is the base's own, byte for byte in the serving dtype, changes nothing and is not used; all others are faults.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from prompt_store.errors import Fault
from prompt_store.files.numerics import serving_chunks
from prompt_store.files.tensor_faults import SERVED_DTYPES, weights_fault
from prompt_store.types import BaseModelSpec, TensorData

_WITHOUT = "save_pretrained(DIRECTORY, save_embedding_layers=False), or prelude push --drop-base-layers"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embed_out", "lm_head")


def tensor_digest(tensor: TensorData, dtype: str) -> str:
    """Hex sha256 of a tensor's values in a dtype, little-endian and row by row.

    Args:
        tensor: F32, F16 or BF16 values.
        dtype: ``float32``, ``bfloat16`` or ``float16``; values are rounded to the nearest, ties to even.
    """
    digest = hashlib.sha256()
    for chunk in serving_chunks(tensor, dtype):
        digest.update(chunk)
    return digest.hexdigest()


def copy_faults(
    copies: Mapping[str, tuple[str, str]], tensors: Mapping[str, TensorData], base: BaseModelSpec
) -> list[Fault]:
    """Faults of whole tensors that are not the base's own.

    Args:
        copies: Module and parameter by the name of the tensor.
        tensors: All tensors of the file.
        base: The served model, with the digests of its embeddings.
    """
    faults = []
    for name, (module, part) in sorted(copies.items()):
        tensor = tensors[name]
        digest = base.digests.get(f"{module}.{part}")
        if digest is None:
            is_embedding = ".base_layer." in name or module.rpartition(".")[2] in _EMBEDDINGS
            hint = f"; save without it: {_WITHOUT}" if is_embedding else ""
            message = f"would replace a tensor of the base model, which all requests share{hint}"
            faults.append(weights_fault("replaces_base", message, name[:200]))
        elif tensor.dtype not in SERVED_DTYPES or tensor_digest(tensor, base.dtype) != digest:
            message = (
                f"is not the {part} of {module} of {base.name!r}, and would replace it for all requests. If it was "
                f"not trained, save without it: {_WITHOUT}"
            )
            faults.append(weights_fault("replaces_base", message, name[:200]))
    return faults
