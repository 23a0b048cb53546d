"""What a LoRA or IA3 adapts, from its configuration and the names and shapes of its tensors, by PEFT's rules.

The tensors say which modules are adapted; the configuration gives their ranks and scales. Nothing here knows the
base: ``adapter_validation`` compares the result with its modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files.lora.lora_config import LoraConfig, read_lora_config
from prompt_store.files.lora.patterns import Pattern, Text
from prompt_store.files.strict_json import shown
from prompt_store.files.tensor_faults import config_fault, limited, weights_fault
from prompt_store.types import WEIGHTS_FILE, AdaptedModule, PeftType

PREFIX = "base_model.model."
"""PEFT's prefix of the names of modules."""

ADAPTER_HEAD_PATTERN = re.compile(r"base_model\.model\.(score|classifier)\.(weight|bias)")
"""The tensors of a classification head, matched whole. Those of soft prompts have one ``model.`` less."""

MAX_MATCHING_STEPS = 2_000_000
"""Steps of all patterns over all modules: about a second."""

_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".ia3_l": "gain",
}
_COPY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.(?P<part>weight|bias)")
_UNGATHERED = "; a 1-D or empty tensor means that DeepSpeed ZeRO-3 or FSDP did not gather it before saving"

_Value = TypeVar("_Value", int, float)
_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of an adapter by their purpose.

    Attributes:
        modules: What is adapted, by the modules' names.
        heads: Tensors of a classification head.
        copies: Tensors that PEFT would load over the base, with the module and parameter of each.
    """

    modules: tuple[AdaptedModule, ...] = ()
    heads: tuple[str, ...] = ()
    copies: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def adapter_layout(fields: Mapping[str, object], shapes: _Shapes) -> tuple[AdaptedModule, ...]:
    """What an adapter's files adapt.

    Args:
        fields: The parsed ``adapter_config.json``.
        shapes: The shapes of the tensors in the weights file, by name.

    Returns:
        The adapted modules, sorted by name; at least one.

    Raises:
        InvalidPromptError: With all faults of the configuration, and of the names and shapes of the tensors.
    """
    layout, faults = read_layout(fields, shapes)
    if faults:
        raise InvalidPromptError(limited(faults))
    return layout.modules


def read_layout(fields: Mapping[str, object], shapes: _Shapes) -> tuple[Layout, list[Fault]]:
    """Like ``adapter_layout``, with everything else that is in the file, and the faults instead of an error."""
    if fields.get("peft_type") not in (PeftType.LORA, PeftType.IA3):
        message = f"peft_type must be LORA or IA3 for an adapter, not {shown(fields.get('peft_type'))}"
        return Layout(), [config_fault("unsupported_peft_type", message, "peft_type")]
    config, faults = read_lora_config(fields)
    parts, heads, copies = _sort_tensors(shapes, faults)
    modules = _Modules(config, shapes, faults)
    if config.is_ia3:
        found = [modules.ia3(name, tensors) for name, tensors in sorted(parts.items())]
    else:
        found = [modules.lora(name, tensors) for name, tensors in sorted(parts.items())]
    if not parts and not faults:
        message = f"{WEIGHTS_FILE}: adapts no module: it has no tensor of a LoRA or IA3"
        faults.append(Fault("missing_tensor", message, WEIGHTS_FILE))
    return Layout(tuple(found), tuple(sorted(heads)), copies), faults


def _sort_tensors(
    shapes: _Shapes, faults: list[Fault]
) -> tuple[dict[str, dict[str, str]], list[str], dict[str, tuple[str, str]]]:
    """Tensors by module and part, those of a head, and copies of the base's. All others are faults."""
    parts: dict[str, dict[str, str]] = {}
    heads: list[str] = []
    copies: dict[str, tuple[str, str]] = {}
    for name in shapes:
        suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
        if suffix is not None and name.startswith(PREFIX) and len(name) > len(PREFIX) + len(suffix):
            tensors = parts.setdefault(name[len(PREFIX) : -len(suffix)], {})
            if _PARTS[suffix] in tensors:
                message = f"is there beside {tensors[_PARTS[suffix]][:200]!a}: a module is linear or an embedding"
                faults.append(weights_fault("unexpected_tensor", message, _shown_name(name)))
            tensors.setdefault(_PARTS[suffix], name)
        elif suffix is not None:
            message = f"does not begin with {PREFIX!r}, as PEFT writes the names of all tensors of an adapter"
            faults.append(weights_fault("unknown_module", message, _shown_name(name)))
        elif ADAPTER_HEAD_PATTERN.fullmatch(name):
            heads.append(name)
        elif (copy := _COPY.fullmatch(name)) is not None and ".lora_" not in name:
            copies[name] = copy["module"], copy["part"]
        else:
            faults.append(_foreign(name))
    return parts, heads, copies


def _foreign(name: str) -> Fault:
    code, why = "unexpected_tensor", "it is no part of a LoRA or IA3"
    if "trainable_tokens" in name:
        code, why = "unsupported_variant", "trained rows of the embeddings would be shared by all requests"
    elif re.search(r"\.(lora_(embedding_)?[AB]|lora_magnitude_vector|ia3_l)\.", name):
        why = "it is of a training state; upload the files that PEFT's save_pretrained() writes"
    elif name.startswith("prompt_embeddings"):
        why = "it is of a soft prompt; publish a soft prompt and an adapter as two versions"
    return weights_fault(code, f"is not served: {why}", _shown_name(name))


class _Modules:
    """Checks the tensors of each module with each other and with the configuration."""

    def __init__(self, config: LoraConfig, shapes: _Shapes, faults: list[Fault]) -> None:
        self._config = config
        self._shapes = shapes
        self._faults = faults
        self._num_steps = 0

    def lora(self, name: str, tensors: dict[str, str]) -> AdaptedModule:
        """A module with tensors of a LoRA; its rank is that of the tensors."""
        config = self._config
        text = Text(name)
        is_embedding = any(tensor.endswith((".lora_embedding_A", ".lora_embedding_B")) for tensor in tensors.values())
        self._check_parts(name, tensors, is_embedding=is_embedding)
        stated, alpha = config.rank, config.alpha
        if self._num_steps <= MAX_MATCHING_STEPS:
            stated = _look_up(config.rank_pattern, text, stated)
            alpha = _look_up(config.alpha_pattern, text, alpha)
            self._count(text.num_steps)
        rank = self._check_shapes(tensors, is_embedding=is_embedding)
        if rank is not None and stated is not None and rank != stated:
            message = f"has rank {rank}; the configuration says {stated} for {name[:200]!a} (r, rank_pattern)"
            self._fault("rank_mismatch", message, tensors["A"])
        rank = rank or stated or 1
        scale = (alpha or 0.0) / (math.sqrt(rank) if config.use_rslora else rank)
        return AdaptedModule(name, rank, scale, tensors)

    def ia3(self, name: str, tensors: dict[str, str]) -> AdaptedModule:
        """A module with the vector of an IA3."""
        others = sorted(tensors.keys() - {"gain"})
        if others:
            message = f"is of a LoRA; the configuration says IA3, so {name[:200]!a} has ia3_l alone"
            self._fault("missing_tensor", message, tensors[others[0]])
            return AdaptedModule(name, 0, 1.0, tensors)
        shape = self._shapes[tensors["gain"]]
        is_matrix = len(shape) == 2 and 1 in shape and 0 not in shape
        on_input = self._is_feedforward(name, shape)
        if not is_matrix or shape[0 if on_input else 1] != 1:
            needed = "[1, in], because feedforward_modules names it" if on_input else "[out, 1]"
            message = f"has shape {list(shape)}; {needed} is needed{_hint(shape)}"
            self._fault("shape_mismatch", message, tensors["gain"])
        return AdaptedModule(name, 0, 1.0, tensors, gain_on_input=on_input)

    def _is_feedforward(self, name: str, shape: tuple[int, ...]) -> bool:
        feedforward = self._config.feedforward
        if feedforward is None:  # PEFT has a table by model type; the shape says the same
            return len(shape) == 2 and shape[0] == 1 and shape[1] > 1
        if isinstance(feedforward, Pattern):
            return feedforward.matches_whole(Text(name))
        return name.endswith(feedforward)

    def _check_parts(self, name: str, tensors: Mapping[str, str], *, is_embedding: bool) -> None:
        config = self._config
        where = _shown_name(name)
        if "gain" in tensors:
            message = f"is of an IA3; the configuration says LORA, so {where} has lora_A and lora_B"
            self._fault("missing_tensor", message, tensors["gain"])
        kind = "lora_embedding_" if is_embedding else "lora_"
        missing = [f"{kind}{part}" for part in "AB" if part not in tensors]
        has = ", ".join(tensor[len(PREFIX) + len(name) + 1 :] for tensor in tensors.values())
        if missing:
            message = f"{where} has {has}, but no {' and no '.join(missing)}"
            self._missing(name, message)
        if is_embedding and "magnitude" in tensors:
            self._fault("unsupported_variant", "is a DoRA of an embedding", tensors["magnitude"])
        elif is_embedding and config.use_dora:
            self._fault("unsupported_variant", "is an embedding's, with use_dora", tensors[min(tensors)])
        else:
            self._check_option(name, tensors, "magnitude", "lora_magnitude_vector", "use_dora", config.use_dora)
        if is_embedding and config.has_bias:
            self._fault("unsupported_variant", "is an embedding's, with lora_bias", tensors[min(tensors)])
        else:
            self._check_option(name, tensors, "bias", "lora_B.bias", "lora_bias", config.has_bias)
        if is_embedding and config.ties_weights:
            message = "is an embedding's, with ensure_weight_tying: the head's tensors are not in the file"
            self._fault("unsupported_variant", message, tensors[min(tensors)])

    def _check_option(
        self, name: str, tensors: Mapping[str, str], part: str, tensor: str, option: str, is_set: bool
    ) -> None:
        """Check that a part is there exactly if an option of the configuration says so."""
        if is_set and part not in tensors:
            message = f"{_shown_name(name)} has no {tensor}, and the configuration says {option}"
            self._missing(name, message)
        elif not is_set and part in tensors:
            self._fault(
                "unexpected_tensor", f"is a {part}, and the configuration does not say {option}", tensors[part]
            )

    def _check_shapes(self, tensors: Mapping[str, str], *, is_embedding: bool) -> int | None:
        """The rank of the tensors; None if they do not show it."""
        dimensions = {
            "A": "[rank, vocabulary]" if is_embedding else "[rank, in]",
            "B": "[out, rank]",
            "bias": "[out]",
            "magnitude": "[out]",
        }
        good = {}
        for part, needed in dimensions.items():
            if part not in tensors:
                continue
            shape = self._shapes[tensors[part]]
            if len(shape) == needed.count(",") + 1 and 0 not in shape:
                good[part] = shape
            else:
                message = f"has shape {list(shape)}; {needed} is needed{_hint(shape)}"
                self._fault("shape_mismatch", message, tensors[part])
        if "A" in good and "B" in good and good["B"][1] != good["A"][0]:
            message = f"has shape {list(good['B'])}; [out, {good['A'][0]}] is needed for the rank of A"
            self._fault("shape_mismatch", message, tensors["B"])
        for part in ("bias", "magnitude"):
            if part in good and "B" in good and good[part][0] != good["B"][0]:
                message = f"has shape {list(good[part])}; {[good['B'][0]]} is needed for the outputs of B"
                self._fault("shape_mismatch", message, tensors[part])
        return good["A"][0] if "A" in good else None

    def _count(self, num_steps: int) -> None:
        """Stop to look up ranks and alphas after a bounded time."""
        self._num_steps += num_steps
        if self._num_steps > MAX_MATCHING_STEPS:
            message = (
                f"rank_pattern and alpha_pattern take more than {MAX_MATCHING_STEPS} steps for the modules in the "
                "file; use fewer or shorter patterns"
            )
            self._faults.append(config_fault("unsafe_pattern", message, "rank_pattern"))

    def _missing(self, module: str, message: str) -> None:
        self._faults.append(Fault("missing_tensor", f"{WEIGHTS_FILE}: {message}", WEIGHTS_FILE, _shown_name(module)))

    def _fault(self, code: str, message: str, tensor: str) -> None:
        self._faults.append(weights_fault(code, message, _shown_name(tensor)))


def _look_up(table: Sequence[tuple[Pattern, _Value]], text: Text, default: _Value | None) -> _Value | None:
    return next((value for pattern, value in table if pattern.matches_end(text)), default)


def _hint(shape: Sequence[int]) -> str:
    return _UNGATHERED if len(shape) < 2 or 0 in shape else ""


def _shown_name(name: str) -> str:
    return name if len(name) <= 200 and name.isascii() and name.isprintable() else ascii(name[:200])
