"""Whether a model's layers are what the fused ones compute, found by running them on numbers.

Names and source code prove little: a subclass may scale, clamp or rotate otherwise. So the model runs once over a few
tokens, at positions from first to last, and each module is then called again on its own input, as it is and a
thousand times as large, and compared with the formula that a fused module computes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from server.engine.attention.backend import AttentionCall, no_mask, unregister

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Largest difference from a formula, as a share of the largest value; there is none for other dtypes."""

PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
HEAD_NORMS = frozenset({"q_norm", "k_norm"})
MLP_PARTS = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
LAYER_PARTS = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})

_SCALES = (1.0, 1000.0)
"""Factors of a module's input: what clamps its values does nothing to small ones."""

_NUM_TOKENS = 4

_probe_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which modules of a model have the known forms; by modules that may be let go of.

    Attributes:
        attention: What each attention module of Llama's form, with or without norms of its heads, hands to the
            attention interface.
        mlps: Modules that compute ``down(act(gate(x)) * up(x))``.
        layers: Decoder layers that add attention and MLP to their input, each after a norm.
    """

    attention: MutableMapping[nn.Module, AttentionCall] = field(default_factory=WeakKeyDictionary)
    mlps: WeakSet[nn.Module] = field(default_factory=WeakSet)
    layers: WeakSet[nn.Module] = field(default_factory=WeakSet)


def probe(model: PreTrainedModel) -> Verdict:
    """Find the modules of a model that have the known forms.

    Args:
        model: On the CPU, in a dtype of ``TOLERANCE``, with nothing of it replaced.
    """
    verdict = Verdict()
    with torch.inference_mode(), _Watch(model).watching() as watch:
        try:
            watch.run()
        except Exception:  # whatever a model demands of its inputs, it is served without being fused
            logger.debug("layers are not fused", exc_info=True)
            return verdict
        for module in [*watch.inputs]:
            try:
                _judge(module, watch, verdict)
            except Exception:
                logger.debug("%s is not fused", type(module).__name__, exc_info=True)
    return verdict


def _judge(module: nn.Module, watch: _Watch, verdict: Verdict) -> None:
    parts = {name for name, _ in module.named_children()}
    if parts >= PROJECTIONS and parts - PROJECTIONS in (set(), HEAD_NORMS):
        if all(_is_attention(module, watch, scale) for scale in _SCALES):
            verdict.attention[module] = watch.calls[module].call
    elif parts == MLP_PARTS:
        if all(_is_gated(module, watch, scale) for scale in _SCALES):
            verdict.mlps.add(module)
    elif parts == LAYER_PARTS and all(_is_layer(module, watch, scale) for scale in _SCALES):
        verdict.layers.add(module)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an attention module handed to the attention interface, and got: queries, keys and values by head."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    call: AttentionCall


class _Watch:
    """A model whose attention gives its queries back, and whose modules' inputs and outputs are noted.

    Args:
        model: What is watched; as it was, afterwards.

    Attributes:
        inputs: Of the modules that may be fused, as they were first called: positional and named arguments.
        outputs: Of the same modules, as they were last called.
        calls: Of attention modules, as they were last called.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.inputs: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.arguments: dict[Any, torch.Tensor] = {}
        self.outputs: dict[Any, Any] = {}
        self.calls: dict[Any, _Seen] = {}

    @contextmanager
    def watching(self) -> Iterator[_Watch]:
        """Watch until the block ends."""
        model, name = self._model, f"prelude_probe_{next(_probe_numbers)}"
        implementation = model.config._attn_implementation  # noqa: SLF001 - it has no public name
        with ExitStack() as stack:
            AttentionInterface.register(name, self._record)
            stack.callback(unregister, name)
            AttentionMaskInterface.register(name, no_mask)
            for module in model.modules():
                parts = {child for child, _ in module.named_children()}
                if parts >= PROJECTIONS or parts in (MLP_PARTS, LAYER_PARTS):
                    stack.callback(module.register_forward_pre_hook(self._note_input, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(self._note_output).remove)
            model.set_attn_implementation(name)
            stack.callback(model.set_attn_implementation, implementation)
            yield self

    def run(self) -> None:
        """The model's own pass, at its first and its last positions."""
        config = self._model.config.get_text_config(decoder=True)
        last = int(getattr(config, "max_position_embeddings", None) or 2048) - 1
        positions = torch.tensor([[0, min(1, last), last // 2, last]])
        ids = torch.arange(_NUM_TOKENS)[None] % config.vocab_size
        self._model(input_ids=ids, position_ids=positions, use_cache=False)

    def again(self, module: nn.Module, scale: float) -> torch.Tensor:
        """Call a module on its own input times a factor; returns that input, [1, rows, width]."""
        arguments, named = self.inputs[module]
        hidden: torch.Tensor = (arguments[0] if arguments else named["hidden_states"]) * scale
        if arguments:
            module(hidden, *arguments[1:], **named)
        else:
            module(**{**named, "hidden_states": hidden})
        return hidden

    def positions(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines that an attention module was given."""
        arguments, named = self.inputs[module]
        cos, sin = named["position_embeddings"] if "position_embeddings" in named else arguments[1]
        return cos, sin

    def _record(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: object,
        **given: Any,
    ) -> tuple[torch.Tensor, None]:
        self.calls[module] = _Seen(query, key, value, AttentionCall.of(query, **given))
        return query.transpose(1, 2), None

    def _note_input(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.inputs.setdefault(module, (arguments, named))
        self.arguments[module] = arguments[0] if arguments else named["hidden_states"]

    def _note_output(self, module: nn.Module, _arguments: object, output: Any) -> None:
        self.outputs[module] = output


def _is_attention(module: Any, watch: _Watch, scale: float) -> bool:
    """Queries and keys are projected, normalised by head where there are norms, rotated; results are projected."""
    hidden = watch.again(module, scale)
    seen, (cos, sin) = watch.calls[module], watch.positions(module)
    query, key, value = (
        projection(hidden).unflatten(-1, (-1, module.head_dim))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    attended = seen.query.transpose(1, 2).flatten(-2)
    output, weights = watch.outputs[module]
    return (
        weights is None
        and _is_close(seen.query, _rotated(query, cos, sin).transpose(1, 2))
        and _is_close(seen.key, _rotated(key, cos, sin).transpose(1, 2))
        and _is_close(seen.value, value.transpose(1, 2))
        and _is_close(output, module.o_proj(attended))
    )


def _is_gated(module: Any, watch: _Watch, scale: float) -> bool:
    hidden = watch.again(module, scale)
    gated = module.act_fn(module.gate_proj(hidden)) * module.up_proj(hidden)
    return _is_close(watch.outputs[module], module.down_proj(gated))


def _is_layer(module: Any, watch: _Watch, scale: float) -> bool:
    hidden = watch.again(module, scale)
    attended = watch.outputs[module.self_attn][0]
    return (
        _is_close(watch.arguments[module.self_attn], module.input_layernorm(hidden))
        and _is_close(watch.arguments[module.mlp], module.post_attention_layernorm(hidden + attended))
        and _is_close(watch.outputs[module], hidden + attended + watch.outputs[module.mlp])
    )


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions as Llama applies them: element i is paired with i + half of the width."""
    first, second = heads.chunk(2, dim=-1)
    turned: torch.Tensor = heads * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]
    return turned


def _is_close(found: object, expected: torch.Tensor) -> bool:
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    allowed = TOLERANCE[expected.dtype] * expected.abs().max().item()
    return (found.float() - expected.float()).abs().max().item() <= allowed
