"""The settings of a training, and the defaults of each method."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from prompt_store.types import PromptRef
from server.training.errors import SettingsError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]
Monitor = Literal["loss", "accuracy"]

DEFAULT_ALIAS = "candidate"
"""The alias that a push moves; a new version is promoted to ``latest`` separately."""

ALL_LINEAR = "all-linear"
"""PEFT's word for all linear layers of a model but its head."""

MAX_DESCRIPTION_CHARS = 4096
"""The server's limit, checked before the training."""

CHANGEABLE_ON_RESUME = frozenset(
    {"run_dir", "resume", "push", "url", "alias", "golden_prompts", "golden_tolerance", "report_to"}
)
"""Settings that may differ when a run is resumed: they do not affect the result."""


class ReportTo(StrEnum):
    """Trackers of experiments that transformers' Trainer can report to."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB = "wandb"


class Task(StrEnum):
    """What is learnt: completions, or a classification head (PEFT's task types)."""

    CAUSAL_LM = "causal-lm"
    SEQ_CLS = "seq-cls"


class Method(StrEnum):
    """Training methods; P-tuning v2 is PEFT's prefix tuning with a projection."""

    PROMPT_TUNING = "prompt_tuning"
    P_TUNING = "p_tuning"
    PREFIX_TUNING = "prefix_tuning"
    P_TUNING_V2 = "p_tuning_v2"
    CPT = "cpt"
    MULTITASK = "multitask"
    CARTRIDGE = "cartridge"
    LORA = "lora"

    @property
    def is_soft_prompt(self) -> bool:
        """Whether a soft prompt is trained, rather than an adapter, which takes no positions."""
        return self is not Method.LORA

    @property
    def is_key_values(self) -> bool:
        """Whether keys and values are trained, rather than rows before the text's embeddings."""
        return self in (Method.PREFIX_TUNING, Method.P_TUNING_V2, Method.CARTRIDGE)

    @property
    def can_have_head(self) -> bool:
        """Whether PEFT trains a classification head with this method."""
        return self not in (Method.CPT, Method.CARTRIDGE)

    @property
    def starts_from_text(self) -> bool:
        """Whether a soft prompt is trained that a text can initialise; weights of a network or of a LoRA cannot."""
        return self not in (Method.P_TUNING, Method.P_TUNING_V2, Method.LORA)


@dataclass(frozen=True, slots=True)
class Defaults:
    """Defaults of a method; benchmarks/training.md contains the measurements.

    Attributes:
        learning_rate: Peak learning rate of AdamW.
        source: Reason for the choice.
    """

    learning_rate: float
    source: str


DEFAULTS: dict[Method, Defaults] = {
    Method.PROMPT_TUNING: Defaults(
        3e-2, "PEFT's example for causal models, with AdamW; the 0.3 of Lester et al. 2021 is for Adafactor"
    ),
    Method.P_TUNING: Defaults(
        3e-3, "measured; Liu et al. 2021 train a network's weights, which need lower rates than rows"
    ),
    Method.PREFIX_TUNING: Defaults(
        3e-2, "measured, and PEFT's example for causal models; initialised from activations as in Li & Liang 2021"
    ),
    Method.P_TUNING_V2: Defaults(
        3e-3, "measured; the network of Li & Liang 2021, whose 5e-5 is for thousands of steps"
    ),
    Method.CPT: Defaults(
        3e-2, "measured, as prompt tuning; the projection of Blau et al. 2024 bounds the effect of the rate"
    ),
    Method.MULTITASK: Defaults(5e-2, "measured; rows times matrices as in Wang et al. 2023, both of them trained"),
    Method.CARTRIDGE: Defaults(2e-2, "the examples in the code of Eyuboglu et al. 2025, with Adam"),
    Method.LORA: Defaults(1e-3, "measured; Hu et al. 2022 use 2e-4 for thousands of steps"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The settings of one training; the options of ``prelude train`` describe them all.

    Attributes:
        eval_data: Held-out examples; None holds out ``eval_fraction`` of the data.
        description: Description of the task, stored with the version; the default of ``init_text``.
        init_text: Text to initialise from; None: the description, the labels or the data.
        learning_rate: Peak learning rate; None: the method's default.
        search: Number of learning rates to try before the training; 0: none.
        warmup_ratio: Share of the steps in which the learning rate rises.
        eval_steps: Steps between evaluations; None evaluates twenty times.
        patience: Evaluations without improvement before training stops; 0 never stops early.
        encoder_hidden_size: Width of the network of p_tuning and p_tuning_v2; None: the model's, at most 512.
        cpt_epsilon: Radius within which CPT may move a row, as a share of the embeddings' mean norm.
        dtype: Dtype of the frozen model; the soft prompt is trained in float32.
        rank: Rank of a LoRA's changes.
        lora_alpha: Numerator of a LoRA's scale; None: a scale of 2.
        target_modules: Names of the modules that a LoRA changes, separated by commas, or ``all-linear``.
        use_rslora: Whether a LoRA's scale is divided by the square root of its rank, rather than by its rank.
        over: Adapter on the server that the soft prompt is trained over, such as ``NAME@VERSION``; None: none.
        report_to: Trackers to which transformers' Trainer also reports.
        base_name: Name of the base in the saved configuration; None: the server's name for it, or ``model``.
        golden_tolerance: Largest difference of a token's log-probability in nats; None: from the server's rounding.
    """

    model: str
    data: Path
    name: str
    method: Method = Method.PROMPT_TUNING
    task_type: Task = Task.CAUSAL_LM
    revision: str | None = None
    eval_data: Path | None = None
    eval_fraction: float = 0.1
    num_virtual_tokens: int = 20
    description: str | None = None
    init_text: str | None = None
    separator: str = "\n"
    seed: int = 0
    epochs: float = 20.0
    max_steps: int | None = None
    learning_rate: float | None = None
    search: int = 0
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    weight_decay: float = 0.0
    warmup_ratio: float = 0.1
    eval_steps: int | None = None
    patience: int = 5
    monitor: Monitor = "loss"
    encoder_hidden_size: int | None = None
    num_frozen_tokens: int = 1
    cpt_epsilon: float = 1.0
    num_ranks: int = 1
    rank: int = 16
    lora_alpha: float | None = None
    target_modules: str = ALL_LINEAR
    use_rslora: bool = False
    lora_dropout: float = 0.0
    over: str | None = None
    device: Device = "auto"
    dtype: DType = "auto"
    base_name: str | None = None
    run_dir: Path = Path("runs")
    report_to: tuple[ReportTo, ...] = ()
    resume: bool = False
    push: bool = False
    url: str = "http://127.0.0.1:8000"
    alias: str = DEFAULT_ALIAS
    golden_prompts: int = 4
    golden_tolerance: float | None = None

    @property
    def rate(self) -> float:
        """The peak learning rate: as given, or the method's."""
        return DEFAULTS[self.method].learning_rate if self.learning_rate is None else self.learning_rate

    @property
    def has_head(self) -> bool:
        """Whether a classification head is trained."""
        return self.task_type is Task.SEQ_CLS

    @property
    def num_positions(self) -> int:
        """Positions of the context that the result takes: the virtual tokens of a soft prompt."""
        return self.num_virtual_tokens if self.method.is_soft_prompt else 0

    @property
    def target_names(self) -> list[str]:
        """The names in ``target_modules``."""
        return [name.strip() for name in self.target_modules.split(",") if name.strip()]

    def check(self) -> None:
        """Check the settings without the data or the model.

        Raises:
            SettingsError: If settings conflict.
        """
        if self.num_virtual_tokens < 1:
            raise SettingsError(f"num_virtual_tokens is {self.num_virtual_tokens}; it must be at least 1")
        if self.method is Method.CARTRIDGE and self.num_virtual_tokens <= self.num_frozen_tokens:
            raise SettingsError(
                f"num_virtual_tokens is {self.num_virtual_tokens}: a cartridge with {self.num_frozen_tokens} frozen "
                "tokens needs more, or nothing would be trained"
            )
        if self.gradient_checkpointing and self.method.is_key_values:
            raise SettingsError(
                f"gradient_checkpointing cannot be used with {self.method}: transformers then drops the cache, which "
                "holds the trained keys and values"
            )
        if self.init_text is not None and not self.method.starts_from_text:
            raise SettingsError(f"init_text cannot be used with {self.method}, which trains weights")
        if self.description is not None and len(self.description) > MAX_DESCRIPTION_CHARS:
            raise SettingsError(
                f"description has {len(self.description)} characters; at most {MAX_DESCRIPTION_CHARS}"
            )
        if self.init_text is not None and not self.init_text.strip():
            raise SettingsError("init_text is empty")
        self._check_lora()
        if self.search and not (self.eval_data or self.eval_fraction):
            raise SettingsError("search needs held-out rows: give --eval-data, or an --eval-fraction above 0")
        if self.has_head and not self.method.can_have_head:
            raise SettingsError(f"task_type {self.task_type} cannot be used with {self.method}")
        if self.has_head and self.over is not None:
            raise SettingsError(f"task_type {self.task_type} cannot be used with over")

    def _check_lora(self) -> None:
        if self.rank < 1:
            raise SettingsError(f"rank is {self.rank}; it must be at least 1")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise SettingsError(f"lora_alpha is {self.lora_alpha:g}; it must be a finite number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise SettingsError(f"lora_dropout is {self.lora_dropout:g}; it must be at least 0 and less than 1")
        if not self.target_names:
            raise SettingsError(f"target_modules is empty: name modules, such as q_proj,v_proj, or use {ALL_LINEAR}")
        if ALL_LINEAR in self.target_names and len(self.target_names) > 1:
            raise SettingsError(f"target_modules: {ALL_LINEAR} cannot be used with names of modules")
        if self.over is None:
            return
        if not self.method.is_soft_prompt:
            raise SettingsError(f"over cannot be used with {self.method}: a request has at most one adapter")
        try:
            PromptRef.parse(self.over)
        except ValueError as error:
            raise SettingsError(f"over: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings to store on a server, without paths of this machine and without texts."""
    hidden = {"data", "eval_data", "run_dir", "url", "resume", "push", "init_text", "description"}
    return {key: value for key, value in settings.items() if key not in hidden and value is not None}
