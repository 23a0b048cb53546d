"""A numeric probe: which of a model's modules compute what the fused modules compute.

Names and source code prove little: a subclass may scale, clamp or rotate differently. So the model runs once over a
few tokens, at positions from first to last. Each module is then called again on its own input, unscaled and times
1,000, and compared with the formula of the fused module.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from server.engine.attention.backend import AttentionCall, set_attention
from server.engine.layers.forms import (
    TOLERANCE,
    Activation,
    NormForm,
    activation_of,
    are_plain,
    is_hooked,
    norm_form,
    shared_parameters,
)

logger = logging.getLogger(__name__)

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
"""Names of the layers that project queries, keys and values, in the forms of attention modules (Llama, Phi-3)."""

GATES = ((("gate_proj", "up_proj"), "act_fn"), (("gate_up_proj",), "activation_fn"))
"""Names of the layers for gates and ups, and of the activation, in the forms of MLPs."""

HEAD_NORMS = frozenset({"q_norm", "k_norm"})
LAYER_PARTS = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})

_SCALES = {torch.float32: (1.0, 1000.0), torch.bfloat16: (1.0, 1000.0), torch.float16: (1.0, 30.0)}
"""Factors of a module's input; a module that clamps its values shows only with a large one. float16 ends at 65504."""

_NUM_TOKENS = 4


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """An attention module: it projects, applies the head norms if any, rotates, attends, and projects by ``o_proj``.

    Attributes:
        projections: Names of the layers whose outputs, concatenated, are queries, keys and values.
        call: The module's scale, window, cap and sinks.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Width of a head; even.
        norms: The norms of query heads and of key heads; they differ in ``factors`` only.
    """

    projections: tuple[str, ...]
    call: AttentionCall
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norms: tuple[NormForm, NormForm] | None


@dataclass(frozen=True, slots=True)
class GatedForm:
    """An MLP that computes ``down_proj(activation(gate) * up)``.

    Attributes:
        projections: Names of the layers whose outputs, concatenated, are gates and ups.
        activation: The activation of the gates.
    """

    projections: tuple[str, ...]
    activation: Activation


@dataclass(frozen=True, slots=True)
class Fusible:
    """The modules of a model that have a known form, by weak references.

    Attributes:
        attention: Attention modules and their forms.
        mlps: MLPs and their forms.
        layers: Decoder layers that add attention and MLP to their input, each after a norm.
    """

    attention: MutableMapping[nn.Module, AttentionForm] = field(default_factory=WeakKeyDictionary)
    mlps: MutableMapping[nn.Module, GatedForm] = field(default_factory=WeakKeyDictionary)
    layers: WeakSet[nn.Module] = field(default_factory=WeakSet)


def probe(model: PreTrainedModel) -> Fusible:
    """Find the modules of a model that have a known form.

    Args:
        model: In a dtype of ``TOLERANCE``, with the attention ``ATTENTION`` and no module replaced. Modules that
            are hooked, offloaded or quantised, or that share weights with others, are not found.
    """
    fusible = Fusible()
    shared, scales = shared_parameters(model), _SCALES[model.dtype]
    with torch.inference_mode(), _Recording(model).recording() as recording:
        try:
            recording.run()
        except Exception:  # a model that cannot run on these inputs is served without fused layers
            logger.debug("layers are not fused", exc_info=True)
            return fusible
        for module in [*recording.inputs]:
            try:
                _classify(module, recording, fusible, shared, scales)
            except Exception:
                logger.debug("%s is not fused", type(module).__name__, exc_info=True)
    return fusible


def _classify(
    module: Any, recording: _Recording, fusible: Fusible, shared: Collection[int], scales: Collection[float]
) -> None:
    parts = _parts(module)
    if (projections := _projections(parts)) is not None:
        attention = _attention_form(module, projections, recording, shared)
        if attention is not None and all(_is_attention(module, attention, recording, scale) for scale in scales):
            fusible.attention[module] = attention
    elif (gates := _gates(parts)) is not None:
        names, activation_name = gates
        if not are_plain([getattr(module, name) for name in (*names, "down_proj")], shared):
            return
        function = getattr(module, activation_name)
        activation = activation_of(function)
        if activation is not None and all(_is_gated(module, names, function, recording, scale) for scale in scales):
            fusible.mlps[module] = GatedForm(names, activation)
    elif parts == LAYER_PARTS and all(_is_layer(module, recording, scale) for scale in scales):
        fusible.layers.add(module)


def _parts(module: nn.Module) -> set[str]:
    """The names of a module's children that do something in inference."""
    return {name for name, child in module.named_children() if not isinstance(child, nn.Dropout)}


def _projections(parts: set[str]) -> tuple[str, ...] | None:
    """The projections of an attention module, by the names of its children; None for another module."""
    for names in PROJECTIONS:
        if parts - {*names, "o_proj"} in (set(), HEAD_NORMS) and parts >= {*names, "o_proj"}:
            return names
    return None


def _gates(parts: set[str]) -> tuple[tuple[str, ...], str] | None:
    """The projections and the activation of an MLP, by the names of its children; None for another module."""
    for names, activation in GATES:
        if parts == {*names, activation, "down_proj"}:
            return names, activation
    return None


def _attention_form(
    module: Any, projections: tuple[str, ...], recording: _Recording, shared: Collection[int]
) -> AttentionForm | None:
    """The form that an attention module may have; None if it cannot be fused."""
    query, key = recording.calls[module].query, recording.calls[module].key
    head_dim: int = query.shape[-1]
    if not are_plain([getattr(module, name) for name in (*projections, "o_proj")], shared):
        return None
    if head_dim % 2 or any(True for _ in module.parameters(recurse=False)):
        return None
    norms: tuple[NormForm, NormForm] | None = None
    if hasattr(module, "q_norm"):
        query_norm, key_norm = norm_form(module.q_norm), norm_form(module.k_norm)
        if query_norm is None or key_norm is None:
            return None
        if (query_norm.eps, query_norm.rounds_first) != (key_norm.eps, key_norm.rounds_first):
            return None
        if not len(query_norm.factors) == len(key_norm.factors) == head_dim:
            return None
        norms = query_norm, key_norm
    return AttentionForm(projections, recording.calls[module].call, query.shape[1], key.shape[1], head_dim, norms)


@dataclass(frozen=True, slots=True)
class _RecordedCall:
    """An attention module's call of the attention interface; tensors are [1, heads, rows, head_dim]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    call: AttentionCall


class _Recording:
    """Records the inputs and outputs of a model's modules, with attention that returns its queries.

    Args:
        model: The model; its hooks are removed afterwards.

    Attributes:
        inputs: Positional and named arguments of each candidate module's first call.
        arguments: The hidden states of each candidate module's last call.
        outputs: The output of each candidate module's last call.
        calls: The last call of each attention module.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.inputs: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.arguments: dict[Any, torch.Tensor] = {}
        self.outputs: dict[Any, Any] = {}
        self.calls: dict[Any, _RecordedCall] = {}

    @contextmanager
    def recording(self) -> Iterator[_Recording]:
        """Record until the block ends."""
        with ExitStack() as stack:
            set_attention(self._attend)
            stack.callback(set_attention, None)
            for module in self._model.modules():
                parts = _parts(module)
                if is_hooked(module):
                    continue
                if _projections(parts) or _gates(parts) or parts == LAYER_PARTS:
                    stack.callback(module.register_forward_pre_hook(self._record_input, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(self._record_output).remove)
            yield self

    def run(self) -> None:
        """Run the model at its first and last positions."""
        config = self._model.config.get_text_config(decoder=True)
        last = int(getattr(config, "max_position_embeddings", None) or 2048) - 1
        device = self._model.device
        positions = torch.tensor([[0, min(1, last), last // 2, last]], device=device)
        ids = torch.arange(_NUM_TOKENS, device=device)[None] % config.vocab_size
        self._model(input_ids=ids, position_ids=positions, use_cache=False)

    def again(self, module: nn.Module, scale: float) -> torch.Tensor:
        """Call a module on its first input times a factor; returns the scaled input [1, rows, width]."""
        arguments, named = self.inputs[module]
        hidden: torch.Tensor = (arguments[0] if arguments else named["hidden_states"]) * scale
        if arguments:
            module(hidden, *arguments[1:], **named)
        else:
            module(**{**named, "hidden_states": hidden})
        return hidden

    def positions(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosines and sines in an attention module's first call."""
        arguments, named = self.inputs[module]
        cos, sin = named["position_embeddings"] if "position_embeddings" in named else arguments[1]
        return cos, sin

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: object,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        self.calls[module] = _RecordedCall(query, key, value, AttentionCall.of(query, **options))
        return query.transpose(1, 2), None

    def _record_input(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.inputs.setdefault(module, (arguments, named))
        self.arguments[module] = arguments[0] if arguments else named["hidden_states"]

    def _record_output(self, module: nn.Module, _arguments: object, output: Any) -> None:
        self.outputs[module] = output


def _is_attention(module: Any, form: AttentionForm, recording: _Recording, scale: float) -> bool:
    """Whether a module projects queries, keys and values, applies head norms if any, rotates, and projects."""
    hidden = recording.again(module, scale)
    call, (cos, sin) = recording.calls[module], recording.positions(module)
    projected = torch.cat([getattr(module, name)(hidden) for name in form.projections], dim=-1)
    heads = projected.view(*projected.shape[:-1], -1, form.head_dim)
    counts = [form.num_heads, form.num_kv_heads, form.num_kv_heads]
    query, key, value = torch.split(heads, counts, dim=-2)
    if form.norms is not None:
        query, key = module.q_norm(query), module.k_norm(key)
    attended = call.query.transpose(1, 2).flatten(-2)
    output, weights = recording.outputs[module]
    return (
        weights is None
        and _is_close(call.query, _rotated(query, cos, sin).transpose(1, 2))
        and _is_close(call.key, _rotated(key, cos, sin).transpose(1, 2))
        and _is_close(call.value, value.transpose(1, 2))
        and _is_close(output, module.o_proj(attended))
    )


def _is_gated(module: Any, names: tuple[str, ...], activation: Any, recording: _Recording, scale: float) -> bool:
    hidden = recording.again(module, scale)
    gate, up = torch.cat([getattr(module, name)(hidden) for name in names], dim=-1).chunk(2, dim=-1)
    return _is_close(recording.outputs[module], module.down_proj(activation(gate) * up))


def _is_layer(module: Any, recording: _Recording, scale: float) -> bool:
    hidden = recording.again(module, scale)
    attended = recording.outputs[module.self_attn][0]
    return (
        _is_close(recording.arguments[module.self_attn], module.input_layernorm(hidden))
        and _is_close(recording.arguments[module.mlp], module.post_attention_layernorm(hidden + attended))
        and _is_close(recording.outputs[module], hidden + attended + recording.outputs[module.mlp])
    )


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions as in Llama: element i is paired with element i + width / 2."""
    first, second = heads.chunk(2, dim=-1)
    rotated: torch.Tensor = heads * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]
    return rotated


def _is_close(found: object, expected: torch.Tensor) -> bool:
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    allowed = TOLERANCE[expected.dtype] * expected.abs().max().item()
    return (found.float() - expected.float()).abs().max().item() <= allowed
