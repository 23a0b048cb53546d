"""The fields of ``adapter_config.json`` that say how the tensors of a LoRA or IA3 change the base.

``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``layers_pattern`` are stored and never
evaluated: the tensors say what is adapted. Fields that only training reads, such as dropout, are ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from prompt_store.errors import Fault
from prompt_store.files.lora.patterns import Pattern, UnsafePatternError
from prompt_store.files.strict_json import shown
from prompt_store.files.tensor_faults import config_fault
from prompt_store.types import PeftType

MAX_STATED_RANK = 1 << 20
MAX_PATTERNS = 4096
MAX_TABLE_STEPS = 16_384
"""Steps of all patterns of a table. The full names of the 882 linear layers of a 405B model take 9,702."""
HEAD_MODULES = ("score", "classifier")

_Value = TypeVar("_Value", int, float)

_CHANGES_BASE = re.compile(r"pissa(_niter_.*)?|olora|corda|loftq", re.DOTALL)
"""Initialisations for which PEFT changes the base when it loads the file, unless it was converted."""

_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

_VARIANTS = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA) changes only the tokens after its invocation",
    "arrow_config": "Arrow routes each token to one of several adapters",
    "kasa_config": "KaSA truncates the weights of the base",
    "layer_replication": "it repeats layers of the base",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "it changes parameters outside of linear layers, such as the experts of a mixture",
    "trainable_token_indices": "it replaces rows of the embeddings that all requests share",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "use_qalora": "QA-LoRA pools the inputs of its layers",
    "velora_config": "VeLoRA is not served",
}
"""Fields that select another computation than ``y + scale * B A x``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """What the configuration says of ranks, scales and parts. A field with a fault has its default.

    Attributes:
        is_ia3: Whether it is an IA3; all fields but ``feedforward`` are those of a LoRA.
        rank: The rank of modules without a pattern; None if it is not stated.
        alpha: Their ``lora_alpha``; None if it is not stated.
        use_rslora: Whether the scale is alpha / sqrt(rank).
        use_dora: Whether all modules have magnitudes.
        has_bias: Whether all modules have a bias (``lora_bias``).
        ties_weights: Whether the head's tensors are those of the embeddings (``ensure_weight_tying``).
        rank_pattern: Ranks by pattern; the first that matches is used.
        alpha_pattern: Alphas by pattern.
        feedforward: Endings of the names, or one pattern, of the modules whose input an IA3 changes; None if the
            configuration leaves it to PEFT.
    """

    is_ia3: bool = False
    rank: int | None = None
    alpha: float | None = None
    use_rslora: bool = False
    use_dora: bool = False
    has_bias: bool = False
    ties_weights: bool = False
    rank_pattern: tuple[tuple[Pattern, int], ...] = ()
    alpha_pattern: tuple[tuple[Pattern, float], ...] = ()
    feedforward: tuple[str, ...] | Pattern | None = None


def read_lora_config(fields: Mapping[str, object]) -> tuple[LoraConfig, list[Fault]]:
    """Read the fields of a LoRA or IA3.

    Args:
        fields: The configuration; its ``peft_type`` is one of them.

    Returns:
        What they say, and everything that is wrong with them.
    """
    reader = _Reader(fields)
    reader.check_modules_to_save()
    if fields.get("peft_type") == PeftType.IA3:
        return LoraConfig(is_ia3=True, feedforward=reader.feedforward()), reader.faults
    reader.check_variants()
    reader.check_initialisation()
    reader.check_bias()
    config = LoraConfig(
        rank=reader.needed("r", _rank),
        alpha=reader.needed("lora_alpha", _alpha),
        use_rslora=reader.flag("use_rslora"),
        use_dora=reader.flag("use_dora"),
        has_bias=reader.flag("lora_bias"),
        ties_weights=reader.flag("ensure_weight_tying"),
        rank_pattern=reader.table("rank_pattern", _rank),
        alpha_pattern=reader.table("alpha_pattern", _alpha),
    )
    return config, reader.faults


def _rank(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_STATED_RANK:
        return value
    raise ValueError(f"must be an integer from 1 to {MAX_STATED_RANK}, not {shown(value)}")


def _alpha(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ValueError(f"must be a finite number, not {shown(value)}")


class _Reader:
    """Reads fields one by one, and collects what is wrong with them."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        self.faults: list[Fault] = []
        self._fields = fields

    def needed(self, key: str, read: Callable[[object], _Value]) -> _Value | None:
        value = self._fields.get(key)
        if value is None:
            self._fault("missing_field", f"{key} is missing; the scale of a LoRA follows from r and lora_alpha", key)
            return None
        try:
            return read(value)
        except ValueError as error:
            self._fault("invalid_field", f"{key} {error}", key)
            return None

    def flag(self, key: str) -> bool:
        value = self._fields.get(key)
        if value is not None and not isinstance(value, bool):
            self._fault("invalid_field", f"{key} must be true or false, not {shown(value)}", key)
        return value is True

    def table(self, key: str, read: Callable[[object], _Value]) -> tuple[tuple[Pattern, _Value], ...]:
        value = self._fields.get(key)
        if value is None:
            return ()
        if not isinstance(value, Mapping) or len(value) > MAX_PATTERNS:
            self._fault("invalid_field", f"{key} must be an object of at most {MAX_PATTERNS} patterns", key)
            return ()
        table = []
        cost = 0
        for source, entry in value.items():
            pattern = self._pattern(key, source)
            cost += 1 if pattern is None else pattern.cost
            if cost > MAX_TABLE_STEPS:
                self._fault("unsafe_pattern", f"{key}: more than {MAX_TABLE_STEPS} steps; use fewer patterns", key)
                break
            try:
                number = read(entry)
            except ValueError as error:
                self._fault("invalid_field", f"{key}: {shown(source)} {error}", key)
            else:
                if pattern is not None:
                    table.append((pattern, number))
        return tuple(table)

    def feedforward(self) -> tuple[str, ...] | Pattern | None:
        key = "feedforward_modules"
        value = self._fields.get(key)
        if value is None:
            return None
        if isinstance(value, str):
            return self._pattern(key, value)
        is_list = isinstance(value, list) and len(value) <= MAX_PATTERNS
        if isinstance(value, list) and is_list and all(isinstance(one, str) for one in value):
            return tuple(value)
        self._fault("invalid_field", f"{key} must be a string or a list of at most {MAX_PATTERNS} strings", key)
        return None

    def check_variants(self) -> None:
        for key, why in _VARIANTS.items():
            value = self._fields.get(key)
            if value not in (None, False, [], {}):
                self._fault("unsupported_variant", f"{key} is set: {why}", key)

    def check_initialisation(self) -> None:
        key = "init_lora_weights"
        value = self._fields.get(key)
        if value is None or isinstance(value, bool):
            return
        name = value.lower() if isinstance(value, str) else ""
        if _CHANGES_BASE.fullmatch(name):
            message = (
                f"{key} is {shown(value)}: the base was changed before training, and PEFT changes it again when it "
                "loads the file. Convert it: save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion=...)"
            )
            self._fault("changes_base", message, key)
        elif name not in _INITIALISATIONS:
            known = ", ".join(_INITIALISATIONS)
            self._fault("invalid_field", f"{key} must be true, false or one of {known}, not {shown(value)}", key)

    def check_bias(self) -> None:
        key = "bias"
        value = self._fields.get(key)
        if value in ("all", "lora_only"):
            message = (
                f"{key} is {shown(value)}: the biases of the base were trained, and all requests share them. Train "
                "with bias='none'; lora_bias=True gives the adapter biases of its own"
            )
            self._fault("replaces_base", message, key)
        elif value not in (None, "none"):
            self._fault("invalid_field", f"{key} must be 'none', not {shown(value)}", key)

    def check_modules_to_save(self) -> None:
        key = "modules_to_save"
        value = self._fields.get(key)
        if value is None:
            return
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self._fault("invalid_field", f"{key} must be null or a list of strings, not {shown(value)}", key)
            return
        others = sorted({one for one in value if one not in HEAD_MODULES})
        if others:
            named = ", ".join(shown(one) for one in others[:8])
            message = (
                f"{key} names {named}: whole modules of the base were trained, and all requests share them. Name "
                "them in target_modules instead; only a classification head (score, classifier) may be saved whole"
            )
            self._fault("replaces_base", message, key)

    def _pattern(self, key: str, source: str) -> Pattern | None:
        try:
            return Pattern(source)
        except UnsafePatternError as error:
            self._fault("unsafe_pattern", f"{key}: the pattern {shown(source)} {error}", key)
            return None

    def _fault(self, code: str, message: str, field: str) -> None:
        self.faults.append(config_fault(code, message, field))
