"""Tensors in a weights file that do not belong to a soft prompt: what they are, and how to remove them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from prompt_store.errors import Fault
from prompt_store.types import WEIGHTS_FILE, TaskType, TensorData

_EMBEDDINGS = re.compile(
    r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|embed_out|tok_embeddings|embeddings|embedding|shared|lm_head)"
    r"\.(base_layer\.)?weight"
)
"""The input and output embeddings of transformers' decoders, matched whole."""

_HEAD = re.compile(
    r"(base_model\.)*(model\.)?(?P<module>score|classifier)\."
    r"((?P<untrained>original_module)\.|modules_to_save\.[^.]+\.)?(?P<part>weight|bias)"
)
"""The names of a classification head in training states, older releases and other tools, matched whole."""

_MAX_NAMED = 8


def foreign_faults(foreign: Collection[str], tensors: Mapping[str, TensorData]) -> list[Fault]:
    """One fault for all copies of embeddings, and one for each other tensor up to a maximum number.

    Args:
        foreign: Names of the tensors that do not belong to the file.
        tensors: All tensors of the file, by name.
    """
    copies = [name for name in sorted(foreign) if _is_embedding(name, tensors[name])]
    others = sorted(set(foreign) - set(copies))
    faults = [_embeddings_fault(copies, tensors)] if copies else []
    faults += [
        Fault(
            "unexpected_tensor",
            f"{WEIGHTS_FILE}: tensor {name[:100]!a} is not part of a soft prompt: {_why(name)}",
            WEIGHTS_FILE,
            name[:100],
        )
        for name in others[:_MAX_NAMED]
    ]
    if len(others) > _MAX_NAMED:
        message = f"{WEIGHTS_FILE}: {len(others) - _MAX_NAMED} more tensors are not part of a soft prompt"
        faults.append(Fault("unexpected_tensor", message, WEIGHTS_FILE))
    return faults


def guess_content(names: Collection[str]) -> str | None:
    """A guess at the content of a file without rows of a soft prompt, as a clause; None if there is none."""
    if any(".lora_" in name for name in names):
        return "the file contains LoRA tensors, not a soft prompt"
    if any(name.startswith(("prompt_encoder.", "base_model.prompt_encoder.")) for name in names):
        return "the file contains a training state; upload the files that PEFT's save_pretrained() writes"
    if any(re.search(r"(^|\.)(layers|h|blocks)\.0\.", name) for name in names):
        return "the file contains the weights of a whole model"
    return None


def _why(name: str) -> str:
    head = _HEAD.fullmatch(name)
    if head is None:
        return "it would replace weights of the shared base model"
    if head["untrained"]:
        return "it is the untrained head; leave it out"
    right = f"base_model.{head['module']}.{head['part']}"
    if name == right:
        return f"a classification head requires the task type {TaskType.SEQ_CLS}"
    return f"PEFT does not load a head of this name; it saves the trained head as {right}"


def _is_embedding(name: str, tensor: TensorData) -> bool:
    return len(tensor.shape) == 2 and not name.startswith("prompt_encoder.") and bool(_EMBEDDINGS.fullmatch(name))


def _embeddings_fault(copies: list[str], tensors: Mapping[str, TensorData]) -> Fault:
    named = " and ".join(ascii(name[:100]) for name in copies[:_MAX_NAMED])
    rows = " and ".join(str(count) for count in sorted({tensors[name].shape[0] for name in copies})[:_MAX_NAMED])
    message = (
        f"{WEIGHTS_FILE}: {named} would replace the embeddings of the shared base model. PEFT saves copies (here "
        f"of {rows} rows) if tokens were added or the embeddings resized before training. Save the soft prompt "
        "without them: model.save_pretrained(DIRECTORY, save_embedding_layers=False); added tokens are then unknown"
    )
    return Fault("unexpected_tensor", message, WEIGHTS_FILE, copies[0][:100])
