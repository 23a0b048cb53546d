"""Data types of the prompt store: frozen, and independent of HTTP, torch and the engine."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Literal

from prompt_store.formats import PromptFormat
from prompt_store.rollouts import Rollout

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
"""The pattern of names of soft prompts, aliases and tags (matched whole)."""

DEFAULT_ALIAS = "latest"
"""The alias of a bare name, and the default alias of an upload."""

MAX_LINEAGE_CHARS = 1024
MAX_SCORES = 64
MAX_SCORE = sys.float_info.max

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_PARTS = ("A", "B", "bias", "gain", "magnitude")  # of AdaptedModule.tensors

ROWS_TENSOR = "prompt_embeddings"
"""The trained rows, in the weights file of every soft prompt."""

TASK_COLS_TENSOR = "prefix_task_cols"
TASK_ROWS_TENSOR = "prefix_task_rows"
"""The factors of a multitask prompt: task t multiplies the rows by ``cols[t] @ rows[t]``."""

HEAD_TENSOR_PATTERN = re.compile(r"base_model\.(score|classifier)\.(weight|bias)")
"""The tensors of a classification head, matched whole; PEFT saves the modules with these names of transformers."""


class PromptKind(StrEnum):
    """The two kinds of things in the registry. A name may have versions of both."""

    SOFT_PROMPT = "soft_prompt"
    ADAPTER = "adapter"


class PeftType(StrEnum):
    """The methods that are served: all prompt-learning methods, LoRA and IA3. The values are those of PEFT."""

    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    CPT = "CPT"
    CARTRIDGE = "CARTRIDGE"
    LORA = "LORA"
    IA3 = "IA3"

    @property
    def kind(self) -> PromptKind:
        """Whether it trains rows before the text, or changes of the base's products."""
        return PromptKind.ADAPTER if self in (PeftType.LORA, PeftType.IA3) else PromptKind.SOFT_PROMPT

    @property
    def is_key_values(self) -> bool:
        """Whether the trained rows are keys and values for every layer, rather than input embeddings."""
        return self in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


class TaskType(StrEnum):
    """The tasks of soft prompts that are served; the values are those of PEFT."""

    CAUSAL_LM = "CAUSAL_LM"
    """Generation."""
    SEQ_CLS = "SEQ_CLS"
    """Classification of a text by a head in the file of the soft prompt."""


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A module of the base that holds a weight. The input of an embedding is as wide as the vocabulary.

    ``unsupported`` says why no adapter can change it, such as an expert of a mixture; it is None if one can.
    """

    kind: Literal["linear", "conv1d", "embedding"]
    in_features: int
    out_features: int
    unsupported: str | None = None


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """What an adapter's files do to one module of the base.

    The module's output y for its input x becomes ``gain * y + scale * (x A^T) B^T + scale * bias``. For a DoRA, the
    gain is the magnitude divided by the norm of each row of ``W + scale * B A``; it multiplies the other terms too.
    For an IA3, the gain is the vector itself, or multiplies the input if ``gain_on_input``.

    Attributes:
        name: The module's name in the base, such as ``model.layers.0.self_attn.q_proj``.
        rank: Rows of A; 0 for an IA3.
        scale: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA, with the patterns of the configuration.
        tensors: Names of its tensors in the file, by part: ``A`` [rank, in], ``B`` [out, rank], ``bias`` [out],
            ``magnitude`` [out], ``gain`` [out, 1] or [1, in] (IA3). For an embedding A is [rank, vocabulary].
        gain_on_input: Whether an IA3's vector multiplies the input (``feedforward_modules``).
    """

    name: str
    rank: int
    scale: float
    tensors: Mapping[str, str]
    gain_on_input: bool = False


@dataclass(frozen=True, slots=True)
class BaseModelSpec:
    """The properties of the served model that a soft prompt must match.

    Attributes:
        name: The name under which the base is served.
        embedding_width: Width of a row of input embeddings (the hidden size, except where a model projects).
        num_layers: Decoder layers that hold keys and values.
        num_kv_heads: Key/value heads of each layer.
        head_dim: Width of one head.
        max_model_len: Maximum length of a sequence, including virtual tokens.
        dtype: The serving dtype: ``float32``, ``bfloat16`` or ``float16``.
        hidden_size: Width of the last hidden states, which a classification head reads; None if it is that of the
            embeddings.
        other_names: Other names of the base, such as its hub id if it is served under another name.
        modules: Its products and embeddings by name: what adapters may change. Empty if no adapters are served.
        adapters_off: Why no adapters are served; None if they are.
        adapter_parts: What the server applies of an adapted module, among ``ADAPTER_PARTS``.
        digests: Hex sha256 of its embeddings' and head's tensors by name, in the serving dtype, row by row.
    """

    name: str
    embedding_width: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    dtype: str
    hidden_size: int | None = None
    other_names: tuple[str, ...] = ()
    modules: Mapping[str, ModuleShape] = field(default_factory=dict)
    adapters_off: str | None = None
    adapter_parts: tuple[str, ...] = ADAPTER_PARTS
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def head_width(self) -> int:
        """Width of the hidden states that a classification head reads."""
        return self.embedding_width if self.hidden_size is None else self.hidden_size

    @property
    def key_values_width(self) -> int:
        """Width of one row of a key/value prefix: K and V of every layer and head, side by side."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class TensorData:
    """One tensor as a safetensors file holds it.

    Attributes:
        dtype: The element type as safetensors names it, such as ``F32`` or ``BF16``.
        shape: The sizes of the dimensions.
        data: Little-endian elements in row-major order.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """A parsed and validated soft prompt.

    Attributes:
        peft_type: The method that trained it.
        task_type: PEFT's task type, one of TaskType's values; ``CAUSAL_LM`` for everything that generates.
        num_virtual_tokens: Number of positions before the text.
        base_model_name_or_path: The base that its configuration names; informational.
        tensors: The tensors of the weights file, by name.
        overrides: Overrides of the uploader or operator; see ``PromptVersion``.
    """

    peft_type: PeftType
    task_type: str
    num_virtual_tokens: int
    base_model_name_or_path: str | None
    tensors: Mapping[str, TensorData]
    overrides: Mapping[str, object] = field(default_factory=dict)

    @property
    def prompt_embeddings(self) -> TensorData:
        """The trained rows: [num_virtual_tokens, embedding width] or [num_virtual_tokens, key/value width]."""
        return self.tensors[ROWS_TENSOR]

    @property
    def num_tasks(self) -> int | None:
        """Number of tasks of a multitask prompt; None for all others. A request names one task."""
        if self.peft_type is not PeftType.MULTITASK_PROMPT_TUNING:
            return None
        return self.tensors[TASK_COLS_TENSOR].shape[0]

    @property
    def num_labels(self) -> int | None:
        """Number of labels of the classification head; None if there is no head."""
        weights = [
            tensor
            for name, tensor in self.tensors.items()
            if HEAD_TENSOR_PATTERN.fullmatch(name) and name.endswith(".weight")
        ]
        return weights[0].shape[0] if weights else None


@dataclass(frozen=True, slots=True)
class PromptRef:
    """A soft prompt as a request names it: ``NAME``, ``NAME@3`` (a version) or ``NAME@canary`` (an alias).

    Attributes:
        name: The soft prompt's name.
        version: The requested version, or None; exactly one of version and alias is set.
        alias: The requested alias, or None.
    """

    name: str
    version: int | None = None
    alias: str | None = DEFAULT_ALIAS

    @classmethod
    def parse(cls, text: str) -> PromptRef:
        """Read ``NAME[@SELECTOR]``.

        Raises:
            ValueError: If the name, the version or the alias is not well formed.
        """
        name, at, selector = text.partition("@")
        check_name(name, "name")
        if not at:
            return cls(name)
        if selector.isascii() and selector.isdigit():
            if selector[0] == "0" or len(selector) > 18:
                raise ValueError(f"{selector[:32]!r} is not a version number")
            return cls(name, version=int(selector), alias=None)
        check_name(selector, "alias")
        return cls(name, alias=selector)

    def __str__(self) -> str:
        return f"{self.name}@{self.version if self.alias is None else self.alias}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A stored file of a version.

    Attributes:
        filename: ``adapter_config.json`` or ``adapter_model.safetensors``.
        sha256: Hex digest of its bytes, which is also the name of its blob; ``size`` is in bytes.
    """

    filename: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Lineage:
    """Origin of a version, as given by its trainer.

    Attributes:
        training_run: Name or address of the run in an experiment tracker.
        parent: ``NAME@VERSION`` from which the training started; it need not be in this store.
        dataset_digest: Identity of the training data.
        scores: Measurements by name.
    """

    training_run: str | None = None
    parent: str | None = None
    dataset_digest: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: object) -> Lineage:
        """Check a JSON value.

        Raises:
            ValueError: If it is not an object, or a field is unknown or has the wrong type.
        """
        if not isinstance(value, Mapping):
            raise ValueError("lineage must be a JSON object")
        unknown = sorted(map(str, value.keys() - {"training_run", "parent", "dataset_digest", "scores"}))
        if unknown:
            raise ValueError(
                f"lineage has no field {unknown[0][:64]!r}; it has training_run, parent, dataset_digest and scores"
            )
        texts: dict[str, str | None] = {}
        for key in ("training_run", "parent", "dataset_digest"):
            text = value.get(key)
            if text is not None and not (isinstance(text, str) and 0 < len(text) <= MAX_LINEAGE_CHARS):
                raise ValueError(f"lineage.{key} must be a string of 1 to {MAX_LINEAGE_CHARS} characters")
            texts[key] = text
        if texts["parent"] is not None and PromptRef.parse(texts["parent"]).version is None:
            raise ValueError("lineage.parent must name a version: NAME@VERSION")
        scores = value.get("scores") or {}
        if not isinstance(scores, Mapping) or len(scores) > MAX_SCORES:
            raise ValueError(f"lineage.scores must be an object of at most {MAX_SCORES} numbers")
        for key, score in scores.items():
            is_number = isinstance(score, int | float) and not isinstance(score, bool) and abs(score) <= MAX_SCORE
            if not is_number or not 0 < len(key) <= MAX_LINEAGE_CHARS:
                raise ValueError(f"lineage.scores: {key[:64]!r} is not a name with a finite number")
        return cls(**texts, scores={key: float(score) for key, score in scores.items()})

    def to_json(self) -> dict[str, object]:
        """The fields that are set."""
        fields: dict[str, object] = {
            "training_run": self.training_run,
            "parent": self.parent,
            "dataset_digest": self.dataset_digest,
            "scores": dict(self.scores),
        }
        return {key: value for key, value in fields.items() if value}


SHARED = ""
"""The owner of shared soft prompts."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller may see and change: their soft prompts, and shared ones if permitted.

    Attributes:
        tenant: The tenant; ``SHARED`` for none.
        may_change_shared: Whether they may publish, promote and delete shared soft prompts.
        all_tenants: Whether they may see and change the soft prompts of every tenant.
    """

    tenant: str
    may_change_shared: bool = False
    all_tenants: bool = False

    @property
    def owners(self) -> tuple[str, ...] | None:
        """The owners of the soft prompts that they see; None for every owner."""
        return None if self.all_tenants else tuple({SHARED, self.tenant})

    def sees(self, owner: str) -> bool:
        """Whether they see the soft prompts of an owner."""
        return self.all_tenants or owner in (SHARED, self.tenant)

    def changes(self, owner: str) -> bool:
        """Whether they may change the soft prompts of an owner."""
        if self.all_tenants:
            return True
        return self.may_change_shared if owner == SHARED else owner == self.tenant


@dataclass(frozen=True, slots=True)
class PromptVersion:
    """One immutable version of a named soft prompt, as the catalog records it.

    Attributes:
        name: The soft prompt's name.
        version: Its number, counted from 1 for each name.
        digest: Hex sha256 over the files of the version; the identity of its keys and values everywhere.
        peft_type: The method that trained it.
        task_type: PEFT's task type.
        num_virtual_tokens: Number of positions before the text.
        dtype: Element type of the trained rows, as safetensors names it.
        base_model_name_or_path: The base that its configuration names, if any.
        files: The stored files.
        created_at: Time of publication, UTC.
        description: Free text.
        tags: Words to list by.
        metadata: A JSON object of the uploader.
        lineage: Origin of the version.
        format: How it wants to be asked; None if that is not known.
        overrides: Statements of the uploader or operator that replace those of the files: ``allow_other_base`` (true)
            if they name another base, ``task_type`` if they name none.
        created_by: The publisher, if known.
        owner: The tenant that alone sees it; ``SHARED`` for all.
        num_tasks: Tasks of a multitask prompt, else None.
        num_labels: Labels of a prompt that was trained with a classification head, else None.
        kind: A soft prompt or an adapter. Of a soft prompt, the next three are None.
        rank: An adapter's largest rank; 0 for an IA3.
        num_modules: Modules that an adapter changes.
        num_parameters: Elements of an adapter's tensors that change products.
        targets: Last parts of the names of the modules that an adapter changes, such as ``q_proj``.
        over: ``NAME@VERSION`` of the adapter that a soft prompt was trained over, if any.
    """

    name: str
    version: int
    digest: str
    peft_type: PeftType
    task_type: str
    num_virtual_tokens: int
    dtype: str
    base_model_name_or_path: str | None
    files: tuple[StoredFile, ...]
    created_at: datetime
    description: str = ""
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=Lineage)
    format: PromptFormat | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    created_by: str | None = None
    owner: str = SHARED
    num_tasks: int | None = None
    num_labels: int | None = None
    kind: PromptKind = PromptKind.SOFT_PROMPT
    rank: int | None = None
    num_modules: int | None = None
    num_parameters: int | None = None
    targets: tuple[str, ...] = ()
    over: str | None = None

    @property
    def size(self) -> int:
        """Size of all files in bytes."""
        return sum(file.size for file in self.files)

    def file(self, filename: str) -> StoredFile | None:
        """The stored file of that name, or None."""
        return next((file for file in self.files if file.filename == filename), None)


@dataclass(frozen=True, slots=True)
class PromptSummary:
    """A soft prompt in a list.

    Attributes:
        name: The soft prompt's name, and ``aliases`` its version numbers by alias.
        latest: The version of the bare name (alias ``latest``), or else the highest one.
        num_versions: Versions that are not deleted.
        rollouts: The rollouts of the aliases that have one.
    """

    name: str
    aliases: Mapping[str, int]
    latest: PromptVersion
    num_versions: int
    rollouts: Mapping[str, Rollout] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoreTotals:
    """Sizes of a catalog.

    Attributes:
        num_prompts: Names with a version, and ``num_versions``, those that are not deleted.
        num_adapters: Names with a version that is an adapter and not deleted.
        num_blobs: Blobs, including those that wait to be collected, and ``blob_bytes`` their size.
    """

    num_prompts: int = 0
    num_versions: int = 0
    num_blobs: int = 0
    blob_bytes: int = 0
    num_adapters: int = 0


@dataclass(frozen=True, slots=True)
class LeasedPrompt:
    """A version that cannot be collected until its lease is released.

    Attributes:
        version: The resolved version; ``lease_id`` distinguishes its leases.
        weights_path: The local weights file; readable until the lease is released.
        config_path: The local configuration of an adapter; None for a soft prompt.
        shadow: The version that gets a copy of the request, if any.
    """

    version: PromptVersion
    weights_path: Path
    lease_id: int = 0
    config_path: Path | None = None
    shadow: PromptRef | None = None


def check_name(text: str, what: str) -> str:
    """Return a well-formed name, alias or tag unchanged.

    Raises:
        ValueError: If it does not match ``[a-z0-9][a-z0-9._-]{0,127}``, or is an alias of digits only.
    """
    if NAME_PATTERN.fullmatch(text) is None:
        raise ValueError(
            f"{what} {text[:64]!r} is not valid: 1 to 128 of a-z, 0-9, '.', '_', '-', starting with a letter or digit"
        )
    if what == "alias" and text.isdigit():
        raise ValueError(f"alias {text!r} is not valid: an alias of digits only would be read as a version")
    return text
