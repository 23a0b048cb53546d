"""A model with a classification head, and the head's logits at the end of each text.

transformers reads the head at the last position of a batch if the input is embeddings, as it is behind a soft prompt.
For rows padded on the right that is padding, and padding on the left would move the text. So the head's logits are
read at every position here, and those of each text's last token are selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification

from server.training.encoding import Encoded
from server.training.errors import TrainingError

HEAD_PREFIX = "head."
"""Prefix of the head's tensors in a checkpoint of a soft prompt."""


def load_classifier(
    path: str, revision: str | None, *, labels: Sequence[str], dtype: torch.dtype, pad_id: int
) -> Any:
    """Load a model with a new head for these labels; set the seed before.

    Args:
        path: Hub id or directory.
        revision: Hub revision.
        labels: Names of the labels, in the order of the head's outputs.
        dtype: Dtype of the model; the head is in float32.
        pad_id: Token id for padding; transformers needs one for batches.

    Raises:
        TrainingError: If the model cannot be loaded, or transformers has no classifier of its family.
    """
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            path, revision=revision, dtype=dtype, num_labels=len(labels), trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise TrainingError(f"the model {path!r} cannot be loaded with a classification head: {error}") from error
    model.config.get_text_config().pad_token_id = pad_id
    head = _base_head(model)
    head.float()
    head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(), *inputs[1:]))
    return model


def head_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the trained head on the CPU; empty if the model has none."""
    head = _trained_head(model)
    if head is None:
        return {}
    return {
        f"{HEAD_PREFIX}{name}": weight.detach().to("cpu", copy=True).contiguous()
        for name, weight in head.state_dict().items()
    }


def restore_head(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Load a state of ``head_state``; other tensors are ignored."""
    found = {key.removeprefix(HEAD_PREFIX): value for key, value in state.items() if key.startswith(HEAD_PREFIX)}
    if found:
        head: Any = _trained_head(model)
        head.load_state_dict(found)


def without_trained_head(base: Any) -> Any:
    """Put the head of before PEFT back into a model; returns the model, unchanged if it has no trained head."""
    for name, module in list(base.named_children()):
        if isinstance(module, ModulesToSaveWrapper):
            setattr(base, name, module.original_module)
    return base


def class_logits(model: PeftModel, inputs: dict[str, Any]) -> torch.Tensor:
    """The head's logits after each text.

    Args:
        model: A PEFT model with a head.
        inputs: ``input_ids`` and ``attention_mask`` [batch, longest], padded on the right; ``task_ids`` if there are
            tasks.

    Returns:
        [batch, labels], in float32.
    """
    found: list[torch.Tensor] = []
    hook = _wrapped_head(model).register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        model(**inputs)
    finally:
        hook.remove()
    # Rows of virtual tokens may come before those of the text.
    mask = inputs["attention_mask"]
    logits = found[-1][:, -mask.shape[1] :].float()
    return logits[torch.arange(len(mask), device=logits.device), mask.sum(1) - 1]


@torch.no_grad()
def text_class_logits(model: Any, example: Encoded) -> list[float]:
    """The logits of one text as plain PEFT computes them, at batch size 1."""
    was_training = model.training
    model.eval()
    ids = torch.tensor([example.token_ids], device=model.device)
    tasks = {} if example.task_id is None else {"task_ids": torch.tensor([example.task_id], device=model.device)}
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **tasks).logits
    finally:
        model.train(was_training)
    return [float(value) for value in logits[0].float()]


def _base_head(model: Any) -> Any:
    """The linear layer of a classifier without PEFT, by either of transformers' names."""
    head = getattr(model, "score", None)
    return head if head is not None else model.classifier


def _wrapped_head(model: PeftModel) -> Any:
    """PEFT's wrapper of the head: the frozen layer and the trained one."""
    (wrapper,) = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return wrapper


def _trained_head(model: PeftModel) -> Any:
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return wrappers[0].modules_to_save["default"] if wrappers else None
