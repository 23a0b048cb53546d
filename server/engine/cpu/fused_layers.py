"""Fused decoder layers for CPUs, with fewer passes over memory.

The model is transformers' own; single modules are replaced by modules that compute the same. One product gives
queries, keys and values, one gives gate and up, and one kernel does what is between two products. Whether a module
may be replaced is decided by its outputs (``layer_probe``), not by its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from server.engine.attention.backend import AttentionBackend, AttentionCall
from server.engine.cpu import row_kernels
from server.engine.cpu.cpu_attention import CPUBackend, HeadNorms, Positions
from server.engine.cpu.layer_probe import HEAD_NORMS, PROJECTIONS, TOLERANCE, Fusible, probe
from server.engine.cpu.packed_linear import PackedLinear, replace_modules, stacked
from server.errors import EngineStartError

_ACTIVATIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    row_kernels.SILU: nn.functional.silu,
    row_kernels.GELU_TANH: lambda x: nn.functional.gelu(x, approximate="tanh"),
}


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


class _Original:
    """A replaced module without the weights of its linear layers; not a submodule of the model.

    Args:
        module: The module. Its linear layers named in ``packed`` are released.
        packed: For each packed product of the fused module, the names of the layers in it.
    """

    def __init__(self, module: Any, packed: dict[str, list[str]]) -> None:
        self._module = module
        self._packed = packed
        self._sizes = {name: [getattr(module, part).out_features for part in parts] for name, parts in packed.items()}
        for name in itertools.chain(*packed.values()):
            setattr(module, name, nn.Identity())

    def restored_from(self, fused: Any) -> nn.Module:
        """The module with its linear layers, unpacked from the products of the fused module."""
        for name, parts in self._packed.items():
            for part, linear in zip(parts, getattr(fused, name).unpacked(self._sizes[name]), strict=True):
                setattr(self._module, part, linear)
        module: nn.Module = self._module
        return module


class FusedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``.

    Args:
        mlp: The module to replace; it is left without weights.
        activation: Number of the activation function (see ``row_kernels.gate``).
        workspace: Shared with other modules.
    """

    def __init__(self, mlp: Any, activation: int, workspace: Workspace) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(stacked([mlp.gate_proj, mlp.up_proj]))
        self.down_proj = PackedLinear(mlp.down_proj)
        self._original = _Original(mlp, {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]})
        self._activation = activation
        self._workspace = workspace
        # Calling a module costs more than the kernels between the products of a few rows.
        self._gate_up, self._down = self.gate_up_proj.forward, self.down_proj.forward

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[1, rows, hidden] to [1, rows, hidden]."""
        projected = self._gate_up(rows)
        out = self._workspace.rows(projected.shape[1], self.down_proj.in_features)
        row_kernels.gate(projected, self._activation, out)
        return self._down(out)

    def restored(self) -> nn.Module:
        """The replaced module, with its weights."""
        return self._original.restored_from(self)


class FusedAttention(nn.Module):
    """Attention of Llama's form over paged keys and values.

    Args:
        attention: The module to replace; it is left without weights. Its head norms, if any, are fused already.
        call: The module's scale, window, cap and sinks.
        workspace: Shared with other modules.
    """

    _backend: CPUBackend

    def __init__(self, attention: Any, call: AttentionCall, workspace: Workspace) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        self._call = call
        self._num_heads: int = attention.q_proj.out_features // attention.head_dim
        self.qkv_proj = PackedLinear(stacked([attention.q_proj, attention.k_proj, attention.v_proj]))
        self.o_proj = PackedLinear(attention.o_proj)
        self._original = _Original(attention, {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "o_proj": ["o_proj"]})
        query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self._norms = HeadNorms()
        if query_norm is not None and key_norm is not None:
            self._norms = HeadNorms(query_norm.factors, key_norm.factors, query_norm.eps, query_norm.rounds_first)
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

    def restored(self) -> nn.Module:
        """The replaced module, with its weights; its head norms stay fused."""
        return self._original.restored_from(self)


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


def _fused_norm(module: Any) -> nn.Module | None:
    """A fused norm, if one of the known formulas gives the module's outputs."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or eps is None or [*module.state_dict()] != ["weight"]:
        return None
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.dtype not in TOLERANCE:
        return None
    generator = torch.Generator().manual_seed(0)
    # Includes rows so small that eps matters.
    rows = torch.randn(4, len(weight), generator=generator) * torch.tensor([[1e-4], [1e-2], [1.0], [30.0]])
    rows = rows.to(weight.dtype)
    with torch.inference_mode():
        expected = module(rows).float()
        candidates = [
            FusedRMSNorm(weight, eps, rounds_first=True),
            FusedRMSNorm(weight, eps, rounds_first=False),
            FusedRMSNorm(1.0 + weight.float(), eps, rounds_first=False),  # Gemma
        ]
        errors = [(candidate(rows).float() - expected).abs().max().item() for candidate in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    allowed = TOLERANCE[weight.dtype] * expected.abs().max().item()
    if errors[best] > allowed:
        return None
    candidates[best].original.append(module)
    return candidates[best]


def _fused_mlp(module: Any, fusible: Fusible, workspace: Workspace) -> nn.Module | None:
    if module not in fusible.mlps or not _are_plain(module, "gate_proj", "up_proj", "down_proj"):
        return None
    grid = torch.linspace(-12.0, 12.0, 997)
    for activation, function in _ACTIVATIONS.items():
        if torch.allclose(module.act_fn(grid), function(grid), rtol=1e-5, atol=1e-6):
            return FusedMLP(module, activation, workspace)
    return None


def _fused_attention(module: Any, fusible: Fusible, workspace: Workspace) -> nn.Module | None:
    if (
        module not in fusible.attention
        or not _are_plain(module, *PROJECTIONS)
        or any(True for _ in module.parameters(recurse=False))
    ):
        return None
    norms = [getattr(module, name) for name in HEAD_NORMS if hasattr(module, name)]
    if not all(isinstance(norm, FusedRMSNorm) and len(norm.factors) == module.head_dim for norm in norms):
        return None
    return FusedAttention(module, fusible.attention[module], workspace)


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


def _are_plain(module: nn.Module, *names: str) -> bool:
    """Whether these are instances of ``nn.Linear`` itself, in dtypes that can be packed."""
    linears = [getattr(module, name) for name in names]
    return all(type(linear) is nn.Linear and linear.weight.dtype in TOLERANCE for linear in linears)
