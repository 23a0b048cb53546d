"""``adapter_config.json``, parsed once.

Only the fields that serving needs are read. Fields that control training or loading in PEFT
(``prompt_tuning_init_state_dict_path``, ``auto_mapping``, ``tokenizer_name_or_path``, ``revision``, ...) are stored
and never acted on: no path is opened, no module imported, no URL fetched. Unknown fields are accepted, as in PEFT:
other releases write other fields, and none of them changes the meaning of the rows of a saved prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files.peft_types import is_other, why_not_served
from prompt_store.files.strict_json import check_depth, finite_float, refuse_constant, shown
from prompt_store.files.tensor_faults import config_fault
from prompt_store.types import PeftType, PromptKind, TaskType

MAX_CONFIG_BYTES = 1024 * 1024
MAX_CONFIG_DEPTH = 32
MAX_BASE_NAME_CHARS = 1024

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

_TRAINED_WITHOUT_TASK = "PEFT's own generate() ignores a prompt without a task type"
_STATE_THE_TASK = (
    "If it was trained for generation, upload with task_type=CAUSAL_LM (prelude push --task-type CAUSAL_LM)"
)
_TRAINED_FOR_OTHER_TASK = "prompts for other tasks come with a head or an encoder that this server does not have"
_TASK_OF_SUFFIX = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""The task by the class of the base in transformers. ForConditionalGeneration may be any task, so it is not here."""

_HEAD_MODULES = ("score", "classifier")

_CPT_WITH_HEAD = "PEFT trains and loads CPT for that task alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The fields of ``adapter_config.json`` that serving reads. A field is None if it is missing, null or not valid.

    Attributes:
        peft_type: The method that trained the soft prompt.
        is_other_method: Whether the file names a method of PEFT that is not served, such as LOHA.
        task_type: The task that it was trained for; the uploader's word if the file names none.
        num_virtual_tokens: Number of rows.
        num_layers: Layers of a key/value prefix.
        token_dim: Width of the rows of embeddings.
        num_tasks: Tasks of a multitask prompt.
        num_ranks: Rank of the factors of a multitask prompt.
        base_model_name_or_path: The base model, in any form.
        fields: All fields of the file as uploaded, unknown ones included.
    """

    peft_type: PeftType | None = None
    is_other_method: bool = False
    task_type: TaskType | None = None
    num_virtual_tokens: int | None = None
    num_layers: int | None = None
    token_dim: int | None = None
    num_tasks: int | None = None
    num_ranks: int | None = None
    base_model_name_or_path: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)


def parse_adapter_config(data: bytes, task_type: TaskType | None = None) -> tuple[AdapterConfig, list[Fault]]:
    """Parse ``adapter_config.json`` without regard to a base model.

    Args:
        data: The file.
        task_type: The task that the uploader states, if any.

    Returns:
        The configuration, and everything that is wrong with it. Without faults, method and task are not None, and the
        number of virtual tokens of a soft prompt is not. The fields of an adapter are read by ``lora_config``.
    """
    try:
        fields = read_config(data)
    except InvalidPromptError as error:
        return AdapterConfig(), list(error.faults)
    reader = _Reader(fields)
    peft_type = reader.peft_type()
    named = fields.get("peft_type")
    if isinstance(named, str) and is_other(named):  # it has the fields of another kind of adapter
        return AdapterConfig(is_other_method=True, fields=fields), reader.faults
    is_multitask = peft_type is PeftType.MULTITASK_PROMPT_TUNING
    task_type = reader.task_type(peft_type, task_type)
    if peft_type is not None and peft_type.kind is PromptKind.ADAPTER:  # lora_config reads the rest
        name = reader.base_name()
        config = AdapterConfig(peft_type=peft_type, task_type=task_type, base_model_name_or_path=name, fields=fields)
        return config, reader.faults
    if fields.get("num_virtual_tokens") is None:
        reader.fault("missing_field", "num_virtual_tokens is missing", "num_virtual_tokens")
    num_virtual_tokens = reader.integer("num_virtual_tokens")
    num_layers = reader.integer("num_layers")
    token_dim = reader.integer("token_dim")
    reader.integer("num_attention_heads")
    # Files of other methods may hold these two with any value: PEFT drops them.
    num_tasks = reader.integer("num_tasks") if is_multitask else None
    num_ranks = reader.integer("num_ranks") if is_multitask else None
    reader.check_submodules()
    config = AdapterConfig(
        peft_type=peft_type,
        task_type=task_type,
        num_virtual_tokens=num_virtual_tokens,
        num_layers=num_layers,
        token_dim=token_dim,
        num_tasks=num_tasks,
        num_ranks=num_ranks,
        base_model_name_or_path=reader.base_name(),
        fields=fields,
    )
    return config, reader.faults


def read_config(data: bytes) -> dict[str, object]:
    """Decode ``adapter_config.json`` as strict JSON: one object, unique keys, finite numbers, bounded size and depth.

    Raises:
        InvalidPromptError: With the fault ``config_too_large`` or ``invalid_json``.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise _invalid("config_too_large", f"{len(data)} bytes; the limit is {MAX_CONFIG_BYTES}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = ": it is UTF-16, as PowerShell writes; save it as UTF-8" if data.startswith(_UTF16_MARKS) else ""
        raise _invalid("invalid_json", f"not UTF-8 at byte {error.start}{hint}") from error
    if text.startswith("\ufeff"):
        raise _invalid(
            "invalid_json", "not valid JSON: it begins with a byte order mark; save it as UTF-8 without one"
        )
    try:
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=refuse_constant, parse_float=finite_float
        )
    except RecursionError as error:
        raise _invalid("invalid_json", f"nested deeper than {MAX_CONFIG_DEPTH} levels") from error
    except ValueError as error:
        raise _invalid("invalid_json", f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise _invalid("invalid_json", "not a JSON object")
    try:
        check_depth(value, MAX_CONFIG_DEPTH)
    except ValueError as error:
        raise _invalid("invalid_json", str(error)) from error
    return value


class _Reader:
    """Reads fields one by one, and collects what is wrong with them."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        self.faults: list[Fault] = []
        self._fields = fields

    def fault(self, code: str, message: str, field: str) -> None:
        self.faults.append(config_fault(code, message, field))

    def peft_type(self) -> PeftType | None:
        key = "peft_type"
        supported = f"supported are {', '.join(PeftType)}"
        value = self._fields.get(key)
        if value is None:
            reason = "peft_type is missing"
            if "architectures" in self._fields or "model_type" in self._fields:
                reason += ": this is the configuration of a whole model, not of an adapter"
            self.fault("missing_field", f"{reason}; {supported}", key)
        elif not isinstance(value, str):
            self.fault("invalid_field", f"peft_type must be a string, not {shown(value)}", key)
        elif value not in PeftType.__members__:
            message = f"peft_type {shown(value)} {why_not_served(value)}; {supported}"
            self.fault("unsupported_peft_type", message, key)
        else:
            return PeftType(value)
        return None

    def task_type(self, peft_type: PeftType | None, stated: TaskType | None) -> TaskType | None:
        """The task of the file, or the one that the uploader states if the file names none."""
        value = self._fields.get("task_type")
        if stated is not None and value is None:
            self._check_stated_task(peft_type, stated)
            return stated
        if value is None and peft_type is not None and peft_type.kind is PromptKind.ADAPTER:
            return TaskType.CAUSAL_LM  # PEFT applies a LoRA without a task, and soft prompts not
        if stated is not None and value != stated:
            message = f"task_type is {shown(value)}, but the upload says {stated}"
            self.fault("task_type_conflict", message, "task_type")
        elif value is not None and not isinstance(value, str):
            self.fault("invalid_field", f"task_type must be a string, not {shown(value)}", "task_type")
        else:
            self._check_task_is_served(peft_type, value)
        return TaskType(value) if isinstance(value, str) and value in TaskType.__members__ else None

    def _check_task_is_served(self, peft_type: PeftType | None, value: str | None) -> None:
        served = [TaskType.CAUSAL_LM] if peft_type is PeftType.CPT else list(TaskType)
        if value in served:
            return
        if value is None:
            found, reason = "missing or null", f"{_TRAINED_WITHOUT_TASK}. {_STATE_THE_TASK}"
        else:
            found, reason = value, _CPT_WITH_HEAD if value == TaskType.SEQ_CLS else _TRAINED_FOR_OTHER_TASK
        message = f"task_type must be {' or '.join(served)}, not {shown(found)}: {reason}"
        self.fault("unsupported_task_type", message, "task_type")

    def _check_stated_task(self, peft_type: PeftType | None, stated: TaskType) -> None:
        """Find contradictions between a file without a task and the task that the uploader states.

        Without a task type PEFT records the class of the base (``auto_mapping``). A head in ``modules_to_save``
        belongs to classification. The tensors are compared with the task elsewhere.
        """
        if stated is TaskType.SEQ_CLS and peft_type is PeftType.CPT:
            self._check_task_is_served(peft_type, stated)
        mapping = self._fields.get("auto_mapping")
        trained = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        task = _task_of_class(trained)
        if task is not None and task != stated:
            message = f"auto_mapping says that it was trained on a {shown(trained)}, but the upload says {stated}"
            self.fault("task_type_conflict", message, "auto_mapping")
        saved = self._fields.get("modules_to_save")
        heads = [name for name in _HEAD_MODULES if isinstance(saved, list) and name in saved]
        if heads and stated is TaskType.CAUSAL_LM:
            message = f"modules_to_save names a classification head ({heads[0]}), but the upload says {stated}"
            self.fault("task_type_conflict", message, "modules_to_save")

    def integer(self, key: str) -> int | None:
        """An integer of at least 1, or None. JSON's ``true`` is not an integer."""
        value = self._fields.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        if value is not None:
            self.fault("invalid_field", f"{key} must be an integer of at least 1, not {shown(value)}", key)
        return None

    def check_submodules(self) -> None:
        key = "num_transformer_submodules"
        value = self._fields.get(key)
        if value is None or (type(value) is int and value == 1):
            return
        message = f"{key} has to be 1 or null for a model without an encoder, not {shown(value)}"
        self.fault("unsupported_submodules", message, key)

    def base_name(self) -> str | None:
        """The name as it stands in the file; one that is too long is a fault, and is returned too."""
        key = "base_model_name_or_path"
        value = self._fields.get(key)
        is_text = isinstance(value, str) and len(value) <= MAX_BASE_NAME_CHARS and value.isprintable()
        if value is not None and not is_text:
            message = f"{key} must be null or at most {MAX_BASE_NAME_CHARS} printable characters"
            self.fault("invalid_field", message, key)
        return value if isinstance(value, str) else None


def _task_of_class(name: object) -> str | None:
    """The task type of a class of transformers, or None if its name does not show it."""
    if not isinstance(name, str):
        return None
    return next((task for suffix, task in _TASK_OF_SUFFIX.items() if name.endswith(suffix)), None)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    items = dict(pairs)
    if len(items) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} appears twice")
    return items


def _invalid(code: str, message: str) -> InvalidPromptError:
    return InvalidPromptError([config_fault(code, message)])
