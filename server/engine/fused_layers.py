"""Parts of a decoder's layers, done in fewer passes over memory on the CPU.

The model stays transformers' own: single modules of it are replaced by ones that compute the same. Queries, keys and
values come from one product, gates and ups from one, and what is between products is one kernel each. What may be
replaced is decided by what a module does, not by its model's name: attention and MLPs whose code is that of Llama's
in the installed transformers, norms that give what the formula gives. Everything else stays as it is.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import logging
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from server.engine import row_kernels
from server.engine.attention import AttentionBackend, AttentionCall, no_mask, unregister
from server.engine.compiled import Elements, elements
from server.engine.packed_linear import PackedLinear, replace_modules, stacked

logger = logging.getLogger(__name__)

_PROBE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}

_ACTIVATIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    row_kernels.SILU: nn.functional.silu,
    row_kernels.GELU_TANH: lambda x: nn.functional.gelu(x, approximate="tanh"),
}


class FusedRMSNorm(nn.Module):
    """A norm over the last dimension.

    Args:
        weight: [width], as it is multiplied by.
        eps: Added to the mean square.
        rounds_first: As in ``row_kernels.rms_norm``.
    """

    def __init__(self, weight: torch.Tensor, eps: float, *, rounds_first: bool) -> None:
        super().__init__()
        self.factors = weight.detach().float().numpy()
        self.eps = eps
        self.rounds_first = rounds_first

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same."""
        rows = rows.contiguous()
        out = torch.empty_like(rows)
        row_kernels.rms_norm(_flat(rows), self.factors, self.eps, self.rounds_first, _flat(out))
        return out

    def add_and_norm(self, rows: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Add rows to ``total``, in place, and return its norm; all are [..., width], contiguous."""
        out = torch.empty_like(total)
        row_kernels.add_and_norm(_flat(rows), _flat(total), self.factors, self.eps, self.rounds_first, _flat(out))
        return out


class FusedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``.

    Args:
        mlp: What it stands for.
        activation: As in ``row_kernels.gate``.
    """

    def __init__(self, mlp: Any, activation: int) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(stacked([mlp.gate_proj, mlp.up_proj]))
        self.down_proj = PackedLinear(mlp.down_proj)
        self._activation = activation

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same."""
        projected = self.gate_up_proj(rows)
        width = projected.shape[-1]
        out = projected.new_empty(*projected.shape[:-1], width // 2)
        row_kernels.gate(_flat(projected), self._activation, _flat(out))
        down: torch.Tensor = self.down_proj(out)
        return down


class FusedAttention(nn.Module):
    """Attention of Llama's form, over paged keys and values.

    Args:
        attention: What it stands for; the norms of its heads, where it has them, are fused already.
        call: What it hands to the attention interface besides queries, keys and values.

    Attributes:
        backend: Where the keys and values are; has to be set before the first pass.
    """

    backend: AttentionBackend

    def __init__(self, attention: Any, call: AttentionCall) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        self._call = call
        self._head_dim: int = attention.head_dim
        self._num_heads: int = attention.q_proj.out_features // attention.head_dim
        self.qkv_proj = PackedLinear(stacked([attention.q_proj, attention.k_proj, attention.v_proj]))
        self.o_proj = PackedLinear(attention.o_proj)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._query_factors, self._key_factors = (
            row_kernels.NO_WEIGHT if norm is None else norm.factors for norm in norms
        )
        self._eps = norms[0].eps if norms[0] is not None else 0.0
        self._rounds_first = norms[0].rounds_first if norms[0] is not None else False

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_others: object
    ) -> tuple[torch.Tensor, None]:
        """[1, rows, hidden] to the same; positions are rotated by cosines and sines of [1, rows, head_dim] each."""
        metadata = self.backend.metadata(self.layer_idx)
        projected = self.qkv_proj(hidden_states)[0]
        query = projected.new_empty(len(projected), self._num_heads, self._head_dim)
        keys, values = self.backend.cache.layer(self.layer_idx)
        cos, sin = (part[0].contiguous() for part in position_embeddings)
        if cos.shape != (len(projected), self._head_dim) or cos.dtype != projected.dtype:
            raise NotImplementedError(f"rotary positions of shape {tuple(cos.shape)}, {cos.dtype}")
        row_kernels.rotate_and_store(
            elements(projected),
            elements(cos),
            elements(sin),
            metadata.slot_mapping.numpy(),
            self._query_factors,
            self._key_factors,
            self._eps,
            self._rounds_first,
            elements(query),
            elements(keys),
            elements(values),
        )
        attended = self.backend.attend(query.transpose(0, 1), self.layer_idx, metadata, self._call)
        out: torch.Tensor = self.o_proj(attended.reshape(1, len(projected), -1))
        return out, None


def _forward_layer(self: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
    """Llama's decoder layer, [1, rows, hidden] to the same, with sums written over what was made to be added."""
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)
    normed = self.post_attention_layernorm.add_and_norm(hidden_states, attended)
    out: torch.Tensor = self.mlp(normed)
    row_kernels.add(_flat(attended), _flat(out))
    return out


def fuse_layers(model: PreTrainedModel) -> int:
    """Replace what can be replaced; returns the number of modules.

    Args:
        model: On the CPU, in float32 or bfloat16, with plain linear layers.
    """
    try:
        row_kernels.compile_for(np.uint16 if model.dtype == torch.bfloat16 else np.float32)
    except Exception:  # whatever Numba or LLVM lacks here, there is a slower way
        logger.warning("layers cannot be fused for this processor; torch's operations are used", exc_info=True)
        return 0
    replaced = replace_modules(model, _fused_norm) + replace_modules(model, _fused_mlp)
    calls = _recorded_calls(model)
    replaced += replace_modules(model, lambda module: _fused_attention(module, calls))
    return replaced + sum(_fuse_sums(module) for module in model.modules())


def bind(model: nn.Module, backend: AttentionBackend) -> None:
    """Tell fused attention where its keys and values are."""
    for module in model.modules():
        if isinstance(module, FusedAttention):
            module.backend = backend


def _fused_norm(module: Any) -> nn.Module | None:
    """The same norm in one pass, if one of the formulas in use gives what the module gives."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or eps is None or [*module.state_dict()] != ["weight"]:
        return None
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.dtype not in _PROBE_TOLERANCE:
        return None
    generator = torch.Generator().manual_seed(0)
    # Small rows too, for which eps counts.
    rows = torch.randn(4, len(weight), generator=generator) * torch.tensor([[1e-4], [1e-2], [1.0], [30.0]])
    rows = rows.to(weight.dtype)
    with torch.inference_mode():
        wanted = module(rows).float()
        candidates = [
            FusedRMSNorm(weight, eps, rounds_first=True),
            FusedRMSNorm(weight, eps, rounds_first=False),
            FusedRMSNorm(1.0 + weight.float(), eps, rounds_first=False),  # Gemma
        ]
        errors = [(candidate(rows).float() - wanted).abs().max().item() for candidate in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    allowed = _PROBE_TOLERANCE[weight.dtype] * wanted.abs().max().item()
    return candidates[best] if errors[best] <= allowed else None


def _fused_mlp(module: Any) -> nn.Module | None:
    if {name for name, _ in module.named_children()} != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    if not _are_plain(module, "gate_proj", "up_proj", "down_proj") or _code(type(module)) != _code(LlamaMLP):
        return None
    grid = torch.linspace(-12.0, 12.0, 997)
    for activation, function in _ACTIVATIONS.items():
        if torch.allclose(module.act_fn(grid), function(grid), rtol=1e-5, atol=1e-6):
            return FusedMLP(module, activation)
    return None


def _fused_attention(module: Any, calls: dict[int, AttentionCall]) -> nn.Module | None:
    children = dict(module.named_children())
    norms = children.keys() - _PROJECTIONS
    if (
        not children.keys() >= _PROJECTIONS
        or norms not in (set(), _HEAD_NORMS)
        or any(True for _ in module.parameters(recurse=False))
    ):
        return None
    if not _are_plain(module, *_PROJECTIONS) or id(module) not in calls:
        return None
    if not all(isinstance(children[n], FusedRMSNorm) and len(children[n].factors) == module.head_dim for n in norms):
        return None
    own, known = sys.modules[type(module).__module__], sys.modules[LlamaAttention.__module__]
    for name in ("apply_rotary_pos_emb", "rotate_half"):
        if _code(getattr(own, name, None)) != _code(getattr(known, name)):
            return None
    if _code(type(module)) != _code(LlamaAttention):
        return None
    return FusedAttention(module, calls[id(module)])


def _fuse_sums(module: Any) -> bool:
    """Give a decoder layer of Llama's code another forward pass; the rest of it stays."""
    parts = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    if {name for name, _ in module.named_children()} != parts:
        return False
    norms = (module.input_layernorm, module.post_attention_layernorm)
    # What these give is theirs alone, so that sums may be written over it.
    own = (*norms, module.self_attn, module.mlp)
    kinds = (FusedRMSNorm, FusedRMSNorm, FusedAttention, FusedMLP)
    if not all(isinstance(part, kind) for part, kind in zip(own, kinds, strict=True)):
        return False
    if _code(type(module)) != _code(LlamaDecoderLayer):
        return False
    module.forward = MethodType(_forward_layer, module)
    return True


def _flat(rows: torch.Tensor) -> Elements:
    """[..., width] as [rows, width]."""
    flat: Elements = elements(rows).reshape(-1, rows.shape[-1])
    return flat


def _are_plain(module: nn.Module, *names: str) -> bool:
    """Whether these are linear layers as torch has them, of the dtypes that can be packed."""
    linears = [getattr(module, name) for name in names]
    return all(type(linear) is nn.Linear and linear.weight.dtype in _PROBE_TOLERANCE for linear in linears)


def _recorded_calls(model: PreTrainedModel) -> dict[int, AttentionCall]:
    """What each attention module hands to the attention interface, by the module's id; empty if it uses none."""
    calls: dict[int, AttentionCall] = {}
    name = f"prelude_recorder_{next(_recorder_numbers)}"
    implementation = model.config._attn_implementation  # noqa: SLF001 - it has no public name

    def record(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **given: Any
    ) -> tuple[torch.Tensor, None]:
        calls[id(module)] = AttentionCall.of(query, **given)
        return query.transpose(1, 2), None

    AttentionInterface.register(name, record)
    AttentionMaskInterface.register(name, no_mask)
    try:
        model.set_attn_implementation(name)
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    except Exception:
        logger.debug("attention was not fused", exc_info=True)
        calls.clear()
    finally:
        model.set_attn_implementation(implementation)
        unregister(name)
    return calls


_recorder_numbers = itertools.count()


class _Simplified(ast.NodeTransformer):
    """Code without what ``AttentionCall`` records and ``FusedAttention`` knows: how it is called, norms of heads."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called in {"self.q_norm", "self.k_norm"}:
            return node.args[0]
        if called == "attention_interface":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg is None]
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        self.generic_visit(node)
        return None if ast.unparse(node.targets[0]) == ast.unparse(node.value) else node


def _code(thing: Any) -> str | None:
    """What a function, or a class's ``forward``, says, without annotations, defaults and comments."""
    function: Any = getattr(thing, "forward", None) if inspect.isclass(thing) else thing
    return _code_of(function)


@cache
def _code_of(function: Any) -> str | None:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(definition, ast.FunctionDef):
        return None
    arguments = [argument.arg for argument in definition.args.args]
    body = [_Simplified().visit(statement) for statement in definition.body]
    told = [ast.unparse(statement) for statement in body if statement is not None and not _is_text(statement)]
    return "\n".join([repr(arguments), *told])


def _is_text(statement: ast.AST) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
