"""The modules of a base that hold weights, and which of them adapters can change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prompt_store.types import ModuleShape

_BYPASSED = "the model's pass does not call it"
_EXPERT = "it is an expert of a mixture, which reads only some of the rows"


def module_shapes(model: PreTrainedModel) -> dict[str, ModuleShape]:
    """The modules of a model that hold weights, by name, before any of its layers is fused.

    Linear layers are known by their features, so those of quantised models are found whatever their class is.
    """
    embedding = model.get_input_embeddings()
    found: dict[str, ModuleShape] = {}
    for name, module in model.named_modules():
        shape = _shape(module, is_input=module is embedding)
        if shape is not None and shape.unsupported is None and ".experts." in f"{name}.":
            shape = replace(shape, unsupported=_EXPERT)
        if shape is not None:
            found[name] = shape
    return found


def watch_calls(model: PreTrainedModel, modules: dict[str, ModuleShape], num_rows: int, num_kept: int) -> _Watch:
    """Find out in a pass which modules it calls with all of its rows.

    Args:
        model: The model, with no layer fused.
        modules: Its modules; those that are not called so get a reason in ``unsupported``.
        num_rows: Rows of the pass.
        num_kept: Rows whose logits it computes.
    """
    return _Watch(model, modules, num_rows, num_kept)


class _Watch:
    """A context: the pass runs within it."""

    def __init__(self, model: PreTrainedModel, modules: dict[str, ModuleShape], num_rows: int, num_kept: int) -> None:
        self._model, self._modules = model, modules
        self._num_rows, self._num_kept = num_rows, num_kept
        self._calls: dict[str, list[int]] = {}
        self.ratios: dict[str, float] = {}
        """By module, how much larger its output is than its input, by their root mean squares."""
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for name, shape in self._modules.items():
            if shape.unsupported is None:
                module = self._model.get_submodule(name)
                self._handles.append(module.register_forward_hook(self._recorder(name, shape)))
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        prefix = f"{self._model.base_model_prefix}."
        for name, shape in self._modules.items():
            if shape.unsupported is not None:
                continue
            expected = self._num_rows if name.startswith(prefix) else self._num_kept
            calls = self._calls.get(name)
            if not calls:
                self._modules[name] = replace(shape, unsupported=_BYPASSED)
            elif any(rows != expected for rows in calls):
                self._modules[name] = replace(
                    shape, unsupported="the model's pass calls it with only some of the rows"
                )

    def _recorder(self, name: str, shape: ModuleShape) -> Callable[..., None]:
        def record(_module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            given = arguments[0] if arguments else None
            if not isinstance(given, torch.Tensor) or not isinstance(output, torch.Tensor):
                self._calls.setdefault(name, []).append(-1)
                return
            if output.shape[-1] != shape.out_features:
                self._calls.setdefault(name, []).append(-1)
                return
            self._calls.setdefault(name, []).append(output.numel() // shape.out_features)
            size = output.float().square().mean().sqrt().item()
            own = given.float().square().mean().sqrt().item() if shape.kind != "embedding" else 1.0
            self.ratios[name] = size / max(own, 1e-12)

        return record


def _shape(module: nn.Module, *, is_input: bool) -> ModuleShape | None:
    num_in, num_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if is_input and isinstance(module, nn.Embedding):
        return ModuleShape("embedding", module.num_embeddings, module.embedding_dim)
    if isinstance(module, nn.Embedding):
        return ModuleShape(
            "embedding", module.num_embeddings, module.embedding_dim, "it is not the embedding of the input's tokens"
        )
    if isinstance(module, Conv1D):
        return ModuleShape("conv1d", *module.weight.shape)
    if isinstance(num_in, int) and isinstance(num_out, int):
        return ModuleShape("linear", num_in, num_out)
    weights = [weight for weight in module.parameters(recurse=False) if weight.dim()]
    if not weights:
        return None
    largest = max(weights, key=torch.Tensor.numel)
    if largest.dim() >= 3:
        return ModuleShape("linear", largest.shape[-1], largest.shape[-2], _EXPERT)
    if any(True for _ in module.children()):
        return None
    what = type(module).__name__
    if largest.dim() == 1:
        return ModuleShape("linear", len(largest), len(largest), f"it is no linear layer ({what})")
    return ModuleShape("linear", largest.shape[1], largest.shape[0], f"it is no linear layer ({what})")
