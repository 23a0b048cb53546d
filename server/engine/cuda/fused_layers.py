"""Fused decoder layers for GPUs, with fewer launches and fewer passes over memory.

The model is transformers' own; single modules are replaced by modules that compute the same. One product gives
queries, keys and values, one gives gates and ups, and one kernel does what is between two products. Whether a module
may be replaced is decided by its outputs (``layer_probe``), not by its name.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from server.engine.attention.backend import AttentionBackend
from server.engine.cuda.triton_launcher import use_prebuilt
from server.engine.layers.forms import TOLERANCE, NormForm, norm_form
from server.engine.layers.layer_probe import AttentionForm, Fusible, GatedForm, probe
from server.engine.layers.replacement import Original, replace_modules, stacked, unstacked
from server.engine.layers.stacks import Stack
from server.errors import EngineStartError

Positions = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, [1, rows, head_dim] each, as the model computes them once per pass."""

GATE_BLOCK = 1024
"""Gates per program."""

MAX_WIDTH = 1 << 15
"""Width of the widest norm. A program holds a whole row in registers; with more, it would spill them."""

TILE_ELEMENTS = 1024
"""Elements of the heads that one program rotates."""


def load_kernels() -> ModuleType:
    """Import the kernels' module; late, because it imports Triton.

    Raises:
        ImportError: If Triton is not installed.
    """
    use_prebuilt()
    return importlib.import_module("server.engine.cuda.layer_kernels")


class FusedRMSNorm(nn.Module):
    """An RMS norm over the last dimension.

    Args:
        form: Its form.
        original: The replaced norm; it does not become a submodule.
        kernels: From ``load_kernels``.
    """

    def __init__(self, form: NormForm, original: nn.Module, kernels: ModuleType) -> None:
        super().__init__()
        self.original = [original]  # in a list, so that torch does not register it
        self._factors, self._eps = form.factors, form.eps
        self._kernels = kernels
        width = len(form.factors)
        block = _power_of_two(width)
        self._constants = {
            "WIDTH": width,
            "BLOCK": block,
            "ROUNDS_FIRST": form.rounds_first,
            "num_warps": min(max(block // 512, 1), 16),
        }

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., width] to [..., width]."""
        rows = rows.contiguous()
        out = torch.empty_like(rows)
        grid = (rows.numel() // rows.shape[-1],)
        self._kernels.rms_norm[grid](rows, self._factors, out, self._eps, **self._constants)
        return out

    def after_sum(self, rows: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Add rows to ``total``, and return the norm of the sum; all are [rows, width], contiguous."""
        out = torch.empty_like(rows)
        self._kernels.add_and_norm[(len(rows),)](rows, total, self._factors, out, self._eps, **self._constants)
        return out


class FusedMLP(nn.Module):
    """``down_proj(activation(gate) * up)``.

    Args:
        mlp: The module to replace; it is left without weights.
        form: The module's form.
        kernels: From ``load_kernels``.
    """

    def __init__(self, mlp: Any, form: GatedForm, kernels: ModuleType) -> None:
        super().__init__()
        self.gate_up_proj = stacked([getattr(mlp, name) for name in form.projections])
        self.down_proj = stacked([mlp.down_proj])
        self._original = Original(mlp, {"gate_up_proj": form.projections, "down_proj": ["down_proj"]})
        self._gate_up = partial(_product, linear=self.gate_up_proj)
        self._down = self._own_down = partial(_product, linear=self.down_proj)
        self._kernels = kernels
        width = self.down_proj.in_features
        block = min(_power_of_two(width), GATE_BLOCK)
        self._num_parts = -(-width // block)
        self._constants = {"WIDTH": width, "BLOCK": block, "IS_SILU": form.activation == "silu", "num_warps": 4}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., hidden]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self._down(self._gated(rows)).view(hidden_states.shape)

    def add_to(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the output of rows to ``total``; both are [rows, hidden]."""
        gated = self._gated(rows)
        if self._down is not self._own_down or _bias(self.down_proj) is not None:
            total += self._down(gated)
        else:
            total.addmm_(gated, self.down_proj.weight.t())

    def stacks(self) -> list[Stack]:
        """The products."""
        return [
            self._original.stack("gate_up_proj", "_gate_up", self.gate_up_proj),
            self._original.stack("down_proj", "_down", self.down_proj),
        ]

    def restored(self) -> nn.Module:
        """The replaced module, with its weights."""
        return self._original.restored(lambda name, sizes: unstacked(getattr(self, name), sizes))

    def _gated(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to [rows, width]: activated gates times ups."""
        projected = self._gate_up(rows)
        out = projected.new_empty(len(rows), self.down_proj.in_features)
        self._kernels.gate[(len(rows), self._num_parts)](projected, out, **self._constants)
        return out


class FusedAttention(nn.Module):
    """Attention over paged keys and values.

    Args:
        attention: The module to replace; it is left without weights.
        form: The module's form.
        kernels: From ``load_kernels``.
    """

    _backend: AttentionBackend

    def __init__(self, attention: Any, form: AttentionForm, kernels: ModuleType) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        self._form = form
        self.qkv_proj = stacked([getattr(attention, name) for name in form.projections])
        self.o_proj = stacked([attention.o_proj])
        self._original = Original(attention, {"qkv_proj": form.projections, "o_proj": ["o_proj"]})
        self._qkv, self._o = (partial(_product, linear=linear) for linear in (self.qkv_proj, self.o_proj))
        self._kernels = kernels
        half = _power_of_two(form.head_dim // 2)
        num_heads = form.num_heads + 2 * form.num_kv_heads
        heads_of_part = max(1, min(TILE_ELEMENTS // (2 * half), _power_of_two(num_heads)))
        self._num_parts = -(-num_heads // heads_of_part)
        self._constants = {
            "NUM_HEADS": form.num_heads,
            "NUM_KV_HEADS": form.num_kv_heads,
            "HEAD_DIM": form.head_dim,
            "HEADS": heads_of_part,
            "HALF": half,
            "HAS_NORMS": form.norms is not None,
            "ROUNDS_FIRST": form.norms is not None and form.norms[0].rounds_first,
            "num_warps": 4,
        }

    def bind(self, backend: AttentionBackend) -> None:
        """Set the backend with the keys and values, before the first pass.

        Raises:
            EngineStartError: If the cache has another shape.
        """
        spec, form = backend.cache.spec, self._form
        shape, expected = (spec.num_kv_heads, spec.head_dim), (form.num_kv_heads, form.head_dim)
        if shape != expected or spec.dtype != self.o_proj.weight.dtype:
            raise EngineStartError(
                f"fused attention of layer {self.layer_idx} has keys of {expected} (heads, width) in "
                f"{self.o_proj.weight.dtype}; the cache has {shape} in {spec.dtype}"
            )
        self._backend = backend
        backend.calls[self.layer_idx] = form.call

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Positions, **_others: object
    ) -> tuple[torch.Tensor, None]:
        """[1, rows, hidden] to a new tensor [1, rows, hidden] and None, as transformers' attention modules return."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.attend(rows, position_embeddings).view(hidden_states.shape), None

    def attend(self, rows: torch.Tensor, position_embeddings: Positions) -> torch.Tensor:
        """[rows, hidden] to a new tensor [rows, hidden].

        Raises:
            NotImplementedError: If the positions have another shape or dtype.
            RuntimeError: Outside of a step.
        """
        form, layer, num_rows = self._form, self.layer_idx, len(rows)
        metadata = self._backend.metadata(layer)
        for part in position_embeddings:
            if part.shape != (1, num_rows, form.head_dim) or part.dtype != rows.dtype:
                raise NotImplementedError(f"rotary positions of shape {tuple(part.shape)}, {part.dtype}")
        cos, sin = (part.contiguous() for part in position_embeddings)
        projected = self._qkv(rows)
        # Without norms, the kernel does not read their factors.
        factors = (cos, cos) if form.norms is None else tuple(norm.factors for norm in form.norms)
        self._kernels.rotate_and_store[(num_rows, self._num_parts)](
            projected,
            cos,
            sin,
            *factors,
            metadata.slot_mapping,
            *self._backend.cache.layer(layer),
            form.norms[0].eps if form.norms is not None else 0.0,
            **self._constants,
        )
        query = projected.view(num_rows, -1, form.head_dim)[:, : form.num_heads].transpose(0, 1)
        attended = self._backend.attend(query, layer, metadata, form.call)
        return self._o(attended.reshape(num_rows, -1))

    def stacks(self) -> list[Stack]:
        """The products."""
        return [
            self._original.stack("qkv_proj", "_qkv", self.qkv_proj),
            self._original.stack("o_proj", "_o", self.o_proj),
        ]

    def restored(self) -> nn.Module:
        """The replaced module, with its weights."""
        return self._original.restored(lambda name, sizes: unstacked(getattr(self, name), sizes))


class FusedLayer:
    """The forward pass of a decoder layer of Llama's form whose modules are all fused.

    Args:
        layer: The decoder layer.
    """

    def __init__(self, layer: Any) -> None:
        self._attention: FusedAttention = layer.self_attn
        self._mlp: FusedMLP = layer.mlp
        self._input_norm: FusedRMSNorm = layer.input_layernorm
        self._mlp_norm: FusedRMSNorm = layer.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Positions, **_others: object) -> torch.Tensor:
        """[1, rows, hidden], which is not changed, to [1, rows, hidden]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        # The output of the attention is reused for the sums.
        total = self._attention.attend(self._input_norm(rows), position_embeddings)
        self._mlp.add_to(total, self._mlp_norm.after_sum(rows, total))
        return total.view(hidden_states.shape)


def fuse_layers(model: PreTrainedModel) -> int:
    """Replace all modules that can be fused; returns their number.

    Each module is released when it is replaced, so a model is never in memory twice.

    Args:
        model: With the attention ``ATTENTION``. Models that are quantised, or in another dtype than ``TOLERANCE``
            has, and all models if Triton is not installed, are not changed.
    """
    if model.dtype not in TOLERANCE or getattr(model.config, "quantization_config", None) is not None:
        return 0
    try:
        kernels = load_kernels()
    except ImportError:  # the attention backend warns of it
        return 0
    fusible = probe(model)
    replaced = replace_modules(model, lambda module: _fused_norm(module, kernels))
    replaced += replace_modules(model, lambda module: _fused_mlp(module, fusible, kernels))
    replaced += replace_modules(model, lambda module: _fused_attention(module, fusible, kernels))
    return replaced + sum(_fuse_layer(module, fusible) for module in model.modules())


def unfuse_layers(model: PreTrainedModel) -> None:
    """Undo ``fuse_layers``: restore the model's own modules, whose weights are parts of the stacked ones."""
    for module in model.modules():
        if isinstance(getattr(vars(module).get("forward"), "__self__", None), FusedLayer):
            del module.forward
    replace_modules(
        model, lambda module: module.restored() if isinstance(module, FusedAttention | FusedMLP) else None
    )
    replace_modules(model, lambda module: module.original[0] if isinstance(module, FusedRMSNorm) else None)


def bind(model: nn.Module, backend: AttentionBackend) -> None:
    """Set the backend of all fused attention modules.

    Raises:
        EngineStartError: If the model has some and the cache has another shape.
    """
    for module in model.modules():
        if isinstance(module, FusedAttention):
            module.bind(backend)


def _fused_norm(module: nn.Module, kernels: ModuleType) -> nn.Module | None:
    form = norm_form(module)
    if form is None or len(form.factors) > MAX_WIDTH:
        return None
    return FusedRMSNorm(form, module, kernels)


def _fused_mlp(module: nn.Module, fusible: Fusible, kernels: ModuleType) -> nn.Module | None:
    return FusedMLP(module, fusible.mlps[module], kernels) if module in fusible.mlps else None


def _fused_attention(module: nn.Module, fusible: Fusible, kernels: ModuleType) -> nn.Module | None:
    return FusedAttention(module, fusible.attention[module], kernels) if module in fusible.attention else None


def _fuse_layer(module: Any, fusible: Fusible) -> bool:
    """Replace the forward pass of a decoder layer whose modules are all fused."""
    kinds = {
        "input_layernorm": FusedRMSNorm,
        "post_attention_layernorm": FusedRMSNorm,
        "self_attn": FusedAttention,
        "mlp": FusedMLP,
    }
    if module not in fusible.layers:
        return False
    if not all(isinstance(getattr(module, name), kind) for name, kind in kinds.items()):
        return False
    module.forward = FusedLayer(module).forward
    return True


def _product(rows: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """[rows, in_features] to [rows, out_features], in one launch."""
    weight, bias = linear.weight.t(), _bias(linear)
    return torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)


def _bias(linear: nn.Linear) -> torch.Tensor | None:
    """The bias; torch's annotation says that there always is one."""
    return linear.bias


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least a number."""
    return 1 << (number - 1).bit_length()
