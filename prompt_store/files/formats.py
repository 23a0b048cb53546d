"""PEFT directory files -> SoftPrompt.

Only what serving needs is read from ``adapter_config.json``. Keys that steer training or loading in PEFT
(``prompt_tuning_init_state_dict_path``, ``auto_mapping``, ``tokenizer_name_or_path``, ``revision``, ...) are kept as
data and never acted on: no path is opened, no module imported, no URL fetched. Unknown keys are taken as PEFT takes
them: other releases write other keys, and none of them changes what a saved prompt's rows mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files.peft_types import is_other, why_not_served
from prompt_store.files.strict_json import check_depth, finite_float, refuse_constant
from prompt_store.files.tensors import read_tensors
from prompt_store.types import CONFIG_FILE, PeftType, SoftPrompt, TaskType, TensorData

MAX_CONFIG_BYTES = 1024 * 1024
MAX_CONFIG_DEPTH = 32
MAX_BASE_NAME_CHARS = 1024

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

_TRAINED_WITHOUT_TASK = "PEFT's own generate() ignores a prompt without a task type"
_SAY_THE_TASK = (
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
"""Where transformers' class of the base alone says what was trained. ForConditionalGeneration may be either kind."""

_HEAD_MODULES = ("score", "classifier")

_CPT_WITH_HEAD = "PEFT trains and loads CPT for that task alone"


def parse_soft_prompt(config_bytes: bytes, weights: bytes | Path) -> SoftPrompt:
    """Read a PEFT directory's two files. Whether they fit a base model is for ``validation`` to say.

    Args:
        config_bytes: ``adapter_config.json``.
        weights: ``adapter_model.safetensors``: its bytes or its path.

    Raises:
        InvalidPromptError: With every fault of the two files that can be seen without a base model.
        OSError: If the path cannot be read.
    """
    config: dict[str, object] = {}
    faults: list[Fault] = []
    try:
        config = read_config(config_bytes)
        faults += config_faults(config)
    except InvalidPromptError as error:
        faults += error.faults
    try:
        tensors = read_tensors(weights)
    except InvalidPromptError as error:
        faults += error.faults
    if faults:
        raise InvalidPromptError(faults)
    return to_soft_prompt(config, tensors)


def to_soft_prompt(
    config: Mapping[str, object], tensors: Mapping[str, TensorData], *, overrides: Mapping[str, object] | None = None
) -> SoftPrompt:
    """Put a configuration in which ``config_faults`` found none, and the tensors, together.

    Args:
        config: The whole configuration.
        tensors: By name.
        overrides: What was accepted on somebody's word; its ``task_type`` stands in for one that is not there.
    """
    overrides = overrides or {}
    num_virtual_tokens, base_name = config["num_virtual_tokens"], config.get("base_model_name_or_path")
    if not isinstance(num_virtual_tokens, int) or not isinstance(base_name, str | None):
        raise AssertionError("config_faults let a wrong type pass")
    return SoftPrompt(
        peft_type=PeftType(str(config["peft_type"])),
        task_type=str(overrides.get("task_type", config.get("task_type"))),
        num_virtual_tokens=num_virtual_tokens,
        base_model_name_or_path=base_name,
        tensors=tensors,
        config=config,
        overrides=overrides,
    )


def read_config(data: bytes) -> dict[str, object]:
    """Parse ``adapter_config.json`` as strict JSON: one object, no key twice, finite numbers, bounded size and depth.

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


def config_faults(config: Mapping[str, object], task_type: TaskType | None = None) -> list[Fault]:
    """Everything wrong with the fields that serving reads, without regard to a base model.

    Args:
        config: The whole configuration.
        task_type: What the uploader says that it was trained for, if anything.
    """
    if is_other_method(config):  # what such an adapter lacks of a soft prompt is no fault of its own
        return _peft_type_faults(config)
    return [
        *_peft_type_faults(config),
        *(_task_type_faults(config) if task_type is None else _said_task_faults(config, task_type)),
        *_integer_faults(config),
        *_multitask_faults(config),
        *_submodule_faults(config),
        *_base_name_faults(config),
    ]


def positive_integer(config: Mapping[str, object], key: str) -> int | None:
    """The value of ``key`` if it is an integer of at least 1, else None. JSON's ``true`` is not an integer."""
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def is_other_method(config: Mapping[str, object]) -> bool:
    """Whether the configuration is of a method of PEFT's that does not train soft prompts, such as LORA."""
    value = config.get("peft_type")
    return isinstance(value, str) and is_other(value)


def known_peft_type(config: Mapping[str, object]) -> PeftType | None:
    """The method that trained the prompt, or None where the configuration names none that is served."""
    value = config.get("peft_type")
    return PeftType(value) if isinstance(value, str) and value in PeftType.__members__ else None


def _peft_type_faults(config: Mapping[str, object]) -> list[Fault]:
    supported = f"supported are {', '.join(PeftType)}"
    value = config.get("peft_type")
    if value is None:
        reason = "peft_type is missing"
        if "architectures" in config or "model_type" in config:
            reason += ": this is the configuration of a whole model, not of an adapter"
        return [_fault("missing_field", f"{reason}; {supported}", "peft_type")]
    if not isinstance(value, str):
        return [_fault("invalid_field", f"peft_type must be a string, not {_shown(value)}", "peft_type")]
    if value in PeftType.__members__:
        return []
    message = f"peft_type {_shown(value)} {why_not_served(value)}; {supported}"
    return [_fault("unsupported_peft_type", message, "peft_type")]


def _task_type_faults(config: Mapping[str, object]) -> list[Fault]:
    value = config.get("task_type")
    if value is not None and not isinstance(value, str):
        return [_fault("invalid_field", f"task_type must be a string, not {_shown(value)}", "task_type")]
    served = list(TaskType)
    if config.get("peft_type") == PeftType.CPT:
        served = [TaskType.CAUSAL_LM]
    if value in served:
        return []
    if value is None:
        found, reason = "missing or null", f"{_TRAINED_WITHOUT_TASK}. {_SAY_THE_TASK}"
    else:
        found, reason = value, _CPT_WITH_HEAD if value == TaskType.SEQ_CLS else _TRAINED_FOR_OTHER_TASK
    message = f"task_type must be {' or '.join(served)}, not {_shown(found)}: {reason}"
    return [_fault("unsupported_task_type", message, "task_type")]


def _said_task_faults(config: Mapping[str, object], said: TaskType) -> list[Fault]:
    """Contradictions between a configuration and the task type given at upload.

    A task that the configuration names itself has to be the same one. Without it PEFT records the class of the base
    (``auto_mapping``); a head that was to be saved (``modules_to_save``) belongs to classification. The tensors are
    held against the task elsewhere.
    """
    value = config.get("task_type")
    if value is not None:
        if value == said:
            return _task_type_faults(config)
        message = f"task_type is {_shown(value)}, but the upload says {said}"
        return [_fault("task_type_conflict", message, "task_type")]
    faults = []
    if said is TaskType.SEQ_CLS and config.get("peft_type") == PeftType.CPT:
        faults += _task_type_faults({**config, "task_type": said})
    mapping = config.get("auto_mapping")
    trained = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    task = _task_of_class(trained)
    if task is not None and task != said:
        message = f"auto_mapping says that it was trained on a {_shown(trained)}, but the upload says {said}"
        faults.append(_fault("task_type_conflict", message, "auto_mapping"))
    saved = config.get("modules_to_save")
    heads = [name for name in _HEAD_MODULES if isinstance(saved, list) and name in saved]
    if heads and said is TaskType.CAUSAL_LM:
        message = f"modules_to_save names a classification head ({heads[0]}), but the upload says {said}"
        faults.append(_fault("task_type_conflict", message, "modules_to_save"))
    return faults


def _task_of_class(name: object) -> str | None:
    """PEFT's task type of a transformers class, or None where its name does not say."""
    if not isinstance(name, str):
        return None
    return next((task for suffix, task in _TASK_OF_SUFFIX.items() if name.endswith(suffix)), None)


def _integer_faults(config: Mapping[str, object]) -> list[Fault]:
    faults = []
    if config.get("num_virtual_tokens") is None:
        faults.append(_fault("missing_field", "num_virtual_tokens is missing", "num_virtual_tokens"))
    for key in ("num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads"):
        faults += _integer_fault(config, key)
    return faults


def _multitask_faults(config: Mapping[str, object]) -> list[Fault]:
    """Other methods' files may hold these keys with any value: PEFT drops them."""
    if config.get("peft_type") != PeftType.MULTITASK_PROMPT_TUNING:
        return []
    return [*_integer_fault(config, "num_tasks"), *_integer_fault(config, "num_ranks")]


def _integer_fault(config: Mapping[str, object], key: str) -> list[Fault]:
    value = config.get(key)
    if value is None or positive_integer(config, key) is not None:
        return []
    return [_fault("invalid_field", f"{key} must be an integer of at least 1, not {_shown(value)}", key)]


def _submodule_faults(config: Mapping[str, object]) -> list[Fault]:
    key = "num_transformer_submodules"
    value = config.get(key)
    if value is None or positive_integer(config, key) == 1:
        return []
    message = f"{key} has to be 1 or null for a model without an encoder, not {_shown(value)}"
    return [_fault("unsupported_submodules", message, key)]


def _base_name_faults(config: Mapping[str, object]) -> list[Fault]:
    key = "base_model_name_or_path"
    value = config.get(key)
    if value is None or (isinstance(value, str) and len(value) <= MAX_BASE_NAME_CHARS and value.isprintable()):
        return []
    return [_fault("invalid_field", f"{key} must be null or at most {MAX_BASE_NAME_CHARS} printable characters", key)]


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    items = dict(pairs)
    if len(items) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {_shown(twice)} appears twice")
    return items


def _shown(value: object) -> str:
    """A value as a message quotes it: short and in ASCII, whatever was uploaded."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "a huge integer"  # Python refuses to print beyond 4,300 digits
    if isinstance(value, dict | list):
        return f"a JSON {'object' if isinstance(value, dict) else 'array'}"
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fault(code: str, message: str, field: str | None = None) -> Fault:
    return Fault(code, f"{CONFIG_FILE}: {message}", CONFIG_FILE, field)


def _invalid(code: str, message: str) -> InvalidPromptError:
    return InvalidPromptError([_fault(code, message)])
