"""A numeric probe: which of a model's modules compute what the fused modules compute.

Names and source code prove little: a subclass may scale, clamp or rotate differently. So the model runs once over a
few tokens, at positions from first to last. Each module is then called again on its own input, unscaled and times
1,000, and compared with the formula of the fused module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from server.engine.attention.backend import AttentionCall, set_attention

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Largest difference from a formula, as a fraction of the largest value, for each dtype that is fused."""

PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
HEAD_NORMS = frozenset({"q_norm", "k_norm"})
MLP_PARTS = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
LAYER_PARTS = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})

_SCALES = (1.0, 1000.0)
"""Factors of a module's input; a module that clamps its values shows only with a large one."""

_NUM_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Fusible:
    """The modules of a model that have a known form, by weak references.

    Attributes:
        attention: Attention modules of Llama's form, with or without head norms, and their attention calls.
        mlps: Modules that compute ``down(act(gate(x)) * up(x))``.
        layers: Decoder layers that add attention and MLP to their input, each after a norm.
    """

    attention: MutableMapping[nn.Module, AttentionCall] = field(default_factory=WeakKeyDictionary)
    mlps: WeakSet[nn.Module] = field(default_factory=WeakSet)
    layers: WeakSet[nn.Module] = field(default_factory=WeakSet)


def probe(model: PreTrainedModel) -> Fusible:
    """Find the modules of a model that have a known form.

    Args:
        model: On the CPU, in a dtype of ``TOLERANCE``, with the attention ``ATTENTION`` and no module replaced.
    """
    fusible = Fusible()
    with torch.inference_mode(), _Recording(model).recording() as recording:
        try:
            recording.run()
        except Exception:  # a model that cannot run on these inputs is served without fused layers
            logger.debug("layers are not fused", exc_info=True)
            return fusible
        for module in [*recording.inputs]:
            try:
                _classify(module, recording, fusible)
            except Exception:
                logger.debug("%s is not fused", type(module).__name__, exc_info=True)
    return fusible


def _classify(module: nn.Module, recording: _Recording, fusible: Fusible) -> None:
    parts = {name for name, _ in module.named_children()}
    if parts >= PROJECTIONS and parts - PROJECTIONS in (set(), HEAD_NORMS):
        if all(_is_attention(module, recording, scale) for scale in _SCALES):
            fusible.attention[module] = recording.calls[module].call
    elif parts == MLP_PARTS:
        if all(_is_gated(module, recording, scale) for scale in _SCALES):
            fusible.mlps.add(module)
    elif parts == LAYER_PARTS and all(_is_layer(module, recording, scale) for scale in _SCALES):
        fusible.layers.add(module)


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
                parts = {child for child, _ in module.named_children()}
                if parts >= PROJECTIONS or parts in (MLP_PARTS, LAYER_PARTS):
                    stack.callback(module.register_forward_pre_hook(self._record_input, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(self._record_output).remove)
            yield self

    def run(self) -> None:
        """Run the model at its first and last positions."""
        config = self._model.config.get_text_config(decoder=True)
        last = int(getattr(config, "max_position_embeddings", None) or 2048) - 1
        positions = torch.tensor([[0, min(1, last), last // 2, last]])
        ids = torch.arange(_NUM_TOKENS)[None] % config.vocab_size
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


def _is_attention(module: Any, recording: _Recording, scale: float) -> bool:
    """Whether a module projects queries, keys and values, applies head norms if any, rotates, and projects."""
    hidden = recording.again(module, scale)
    call, (cos, sin) = recording.calls[module], recording.positions(module)
    query, key, value = (
        projection(hidden).unflatten(-1, (-1, module.head_dim))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
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


def _is_gated(module: Any, recording: _Recording, scale: float) -> bool:
    hidden = recording.again(module, scale)
    gated = module.act_fn(module.gate_proj(hidden)) * module.up_proj(hidden)
    return _is_close(recording.outputs[module], module.down_proj(gated))


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
