"""Digests of the embeddings and the head, with which copies in the files of adapters are compared."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

_CHUNK_BYTES = 64 * 1024 * 1024


def base_digests(model: PreTrainedModel) -> dict[str, str]:
    """Hex sha256 of the values of the embeddings and the head by name, as they are served, row by row.

    Tensors of integers (quantised ones) have no digest: a copy in a file cannot be compared with them.
    """
    digests: dict[str, str] = {}
    known: dict[int, str] = {}
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    for name, module in model.named_modules():
        if not any(module is one for one in modules):
            continue
        for part, tensor in module.named_parameters(recurse=False):
            if not tensor.is_floating_point():
                continue
            key = tensor.data_ptr()  # a tied head is the embedding
            if key not in known:
                known[key] = _digest(tensor.detach())
            digests[f"{name}.{part}"] = known[key]
    return digests


def _digest(tensor: torch.Tensor) -> str:
    """In pieces, so that a tensor on a device takes little memory on the host."""
    digest = hashlib.sha256()
    flat = tensor.reshape(-1)
    step = max(1, _CHUNK_BYTES // flat.element_size())
    for start in range(0, flat.numel(), step):
        digest.update(flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
