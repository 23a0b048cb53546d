"""Fused decoder layers for CPUs, with fewer passes over memory.

The model is transformers' own; single modules are replaced by modules that compute the same. One product gives
queries, keys and values, one gives gate and up, and one kernel does what is between two products. Whether a module
may be replaced is decided by its outputs (``layer_probe``), not by its name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from server.engine.attention.backend import AttentionBackend
from server.engine.cpu import row_kernels
from server.engine.cpu.cpu_attention import CPUBackend, HeadNorms, Positions
from server.engine.cpu.packed_linear import PackedLinear
from server.engine.layers.forms import Activation, norm_form
from server.engine.layers.layer_probe import AttentionForm, Fusible, GatedForm, probe
from server.engine.layers.replacement import Original, replace_modules, stacked
from server.engine.layers.stacks import Stack
from server.errors import EngineStartError

_ACTIVATIONS: dict[Activation, int] = {"silu": row_kernels.SILU, "gelu_tanh": row_kernels.GELU_TANH}


class Workspace:
    """Buffers for the rows between products. All layers share them, so their content is valid within one layer only.

    Args:
        dtype: Of the rows.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._whole: dict[int, torch.Tensor] = {}
        self._parts: dict[int, tuple[int, torch.Tensor]] = {}

    def rows(self, num_rows: int, width: int) -> torch.Tensor:
        """An uninitialised buffer [1, num_rows, width]; the same memory for the same width."""
        part = self._parts.get(width)
        if part is None or part[0] != num_rows:
            whole = self._whole.get(width)
            if whole is None or whole.shape[1] < num_rows:
                whole = self._whole[width] = torch.zeros(1, num_rows, width, dtype=self._dtype)
            part = self._parts[width] = num_rows, whole[:, :num_rows]
        return part[1]


class FusedRMSNorm(nn.Module):
    """An RMS norm over the last dimension; see ``row_kernels.rms_norm``.

    Args:
        weight: [width], the factors.
        eps: Added to the mean square.
        rounds_first: Whether the norm rounds before it multiplies by the weight.

    Attributes:
        original: The replaced norm, in a list so that torch does not register it as a submodule.
    """

    def __init__(self, weight: torch.Tensor, eps: float, *, rounds_first: bool) -> None:
        super().__init__()
        self.factors = weight.detach().float().numpy()
        self.eps = eps
        self.rounds_first = rounds_first
        self.original: list[nn.Module] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., width] to [..., width]."""
        rows = rows.contiguous()
        out = torch.empty_like(rows)
        row_kernels.rms_norm(rows, self.factors, self.eps, self.rounds_first, out)
        return out


class FusedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``.

    Args:
        mlp: The module to replace; it is left without weights.
        form: The module's form.
        workspace: Shared with other modules.
    """

    def __init__(self, mlp: Any, form: GatedForm, workspace: Workspace) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(stacked([getattr(mlp, name) for name in form.projections]))
        self.down_proj = PackedLinear(mlp.down_proj)
        self._original = Original(mlp, {"gate_up_proj": form.projections, "down_proj": ["down_proj"]})
        self._activation = _ACTIVATIONS[form.activation]
        self._workspace = workspace
        # Calling a module costs more than the kernels between the products of a few rows.
        self._gate_up, self._down = self.gate_up_proj.forward, self.down_proj.forward

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[1, rows, hidden] to [1, rows, hidden]."""
        projected = self._gate_up(rows)
        out = self._workspace.rows(projected.shape[1], self.down_proj.in_features)
        row_kernels.gate(projected, self._activation, out)
        return self._down(out)

    def stacks(self) -> list[Stack]:
        """The products."""
        return [
            self._original.stack("gate_up_proj", "_gate_up", self.gate_up_proj),
            self._original.stack("down_proj", "_down", self.down_proj),
        ]

    def restored(self) -> nn.Module:
        """The replaced module, with its weights."""
        return self._original.restored(lambda name, sizes: getattr(self, name).unpacked(sizes))


class FusedAttention(nn.Module):
    """Attention of Llama's form over paged keys and values.

    Args:
        attention: The module to replace; it is left without weights.
        form: The module's form.
        workspace: Shared with other modules.
    """

    _backend: CPUBackend

    def __init__(self, attention: Any, form: AttentionForm, workspace: Workspace) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        self._call, self._num_heads = form.call, form.num_heads
        self.qkv_proj = PackedLinear(stacked([getattr(attention, name) for name in form.projections]))
        self.o_proj = PackedLinear(attention.o_proj)
        self._original = Original(attention, {"qkv_proj": form.projections, "o_proj": ["o_proj"]})
        self._norms = HeadNorms()
        if form.norms is not None:
            query_norm, key_norm = form.norms
            factors = query_norm.factors.numpy(), key_norm.factors.numpy()
            self._norms = HeadNorms(*factors, query_norm.eps, query_norm.rounds_first)
        self._workspace = workspace
        self._qkv, self._o = self.qkv_proj.forward, self.o_proj.forward

    def bind(self, backend: CPUBackend) -> None:
        """Set the backend with the keys and values, before the first pass."""
        self._backend = backend
        self._layer = backend.layer(self.layer_idx, self._call, self._num_heads, self._norms)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Positions, **_others: object
    ) -> tuple[torch.Tensor, None]:
        """[1, rows, hidden] to a new tensor [1, rows, hidden] and None, as transformers' attention modules return."""
        projected = self._qkv(hidden_states)
        out = self._workspace.rows(projected.shape[1], self.o_proj.in_features)
        self._backend.rotate_and_attend(projected, position_embeddings, self._layer, out)
        return self._o(out), None

    def stacks(self) -> list[Stack]:
        """The products."""
        return [
            self._original.stack("qkv_proj", "_qkv", self.qkv_proj),
            self._original.stack("o_proj", "_o", self.o_proj),
        ]

    def restored(self) -> nn.Module:
        """The replaced module, with its weights; its head norms stay fused."""
        return self._original.restored(lambda name, sizes: getattr(self, name).unpacked(sizes))


class FusedLayer:
    """The forward pass of a decoder layer of Llama's form whose modules are all fused.

    Args:
        layer: The decoder layer.
        workspace: Shared with other modules.
    """

    def __init__(self, layer: Any, workspace: Workspace) -> None:
        self._attend, self._mlp = layer.self_attn.forward, layer.mlp.forward
        self._norms = [
            (norm.factors, norm.eps, norm.rounds_first)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._width = len(layer.input_layernorm.factors)
        self._workspace = workspace

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Positions, **_others: object) -> torch.Tensor:
        """[1, rows, hidden], which is not changed, to [1, rows, hidden]."""
        hidden_states = hidden_states.contiguous()
        normed = self._workspace.rows(hidden_states.shape[1], self._width)
        row_kernels.rms_norm(hidden_states, *self._norms[0], normed)
        total, _ = self._attend(normed, position_embeddings)
        # The products' outputs are reused for the sums.
        row_kernels.add_and_norm(hidden_states, total, *self._norms[1], normed)
        out: torch.Tensor = self._mlp(normed)
        row_kernels.add(total, out)
        return out


def fuse_layers(model: PreTrainedModel) -> int:
    """Replace all modules that can be fused; returns their number.

    Args:
        model: On the CPU, in float32 or bfloat16, with plain linear layers and the attention ``ATTENTION``.
    """
    if not row_kernels.can_compile(model.dtype):
        return 0
    workspace = Workspace(model.dtype)
    fusible = probe(model)
    replaced = replace_modules(model, _fused_norm)
    replaced += replace_modules(model, lambda module: _fused_mlp(module, fusible, workspace))
    replaced += replace_modules(model, lambda module: _fused_attention(module, fusible, workspace))
    return replaced + sum(_fuse_layer(module, fusible, workspace) for module in model.modules())


def unfuse_layers(model: PreTrainedModel) -> None:
    """Undo ``fuse_layers``: restore the model's own modules with bit-equal, unpacked weights.

    Modules are unpacked and released one after another, so the model is never in memory twice.
    """
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
        EngineStartError: If the model has some and the backend is not a ``CPUBackend``.
    """
    for module in model.modules():
        if isinstance(module, FusedAttention):
            if not isinstance(backend, CPUBackend):
                raise EngineStartError(f"fused attention does not work over {type(backend).__name__}")
            module.bind(backend)


def _fused_norm(module: nn.Module) -> nn.Module | None:
    form = norm_form(module)
    if form is None:
        return None
    fused = FusedRMSNorm(form.factors, form.eps, rounds_first=form.rounds_first)
    fused.original.append(module)
    return fused


def _fused_mlp(module: nn.Module, fusible: Fusible, workspace: Workspace) -> nn.Module | None:
    return FusedMLP(module, fusible.mlps[module], workspace) if module in fusible.mlps else None


def _fused_attention(module: nn.Module, fusible: Fusible, workspace: Workspace) -> nn.Module | None:
    return FusedAttention(module, fusible.attention[module], workspace) if module in fusible.attention else None


def _fuse_layer(module: Any, fusible: Fusible, workspace: Workspace) -> bool:
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
    module.forward = FusedLayer(module, workspace).forward
    return True
