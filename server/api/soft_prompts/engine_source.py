"""Convert a leased version to a SoftPromptSource, and validate task_id."""

from __future__ import annotations

from prompt_store.types import LeasedPrompt, PromptVersion
from server.engine.types import SoftPromptSource
from server.errors import InvalidRequestError


def soft_prompt_source(leased: LeasedPrompt, task_id: int | None) -> SoftPromptSource:
    """Convert a leased version to a SoftPromptSource, whose file exists until the lease is released."""
    return SoftPromptSource(
        digest=leased.version.digest,
        num_virtual_tokens=leased.version.num_virtual_tokens,
        is_key_values=leased.version.peft_type.is_key_values,
        path=str(leased.weights_path),
        task_id=task_id,
        num_labels=leased.version.num_labels,
    )


def check_task(version: PromptVersion | None, task_id: int | None) -> None:
    """Check that a multitask prompt is used with a valid task id, and others without one.

    Args:
        version: The soft prompt's version; None for the bare base.
        task_id: The task id in the request.

    Raises:
        InvalidRequestError: If a task id is missing, names no task, or is given for a soft prompt without tasks.
    """
    num_tasks = version.num_tasks if version else None
    if version is None or num_tasks is None:
        if task_id is None:
            return
        named = "the base model" if version is None else f"the soft prompt {version.name}@{version.version}"
        raise InvalidRequestError(
            f"task_id: only allowed for multitask soft prompts; {named} is not one", param="task_id"
        )
    if task_id is None or task_id >= num_tasks:
        problem = "a task is required" if task_id is None else f"task {task_id} does not exist"
        raise InvalidRequestError(
            f"task_id: {problem}: the multitask soft prompt {version.name}@{version.version} has the tasks "
            f"0 to {num_tasks - 1}",
            param="task_id",
        )
