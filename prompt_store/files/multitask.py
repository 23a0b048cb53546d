"""Check that the tensors of a multitask prompt fit each other (https://huggingface.co/papers/2303.02861).

All tasks share the rows; task t multiplies them by ``prefix_task_cols[t] @ prefix_task_rows[t]``, element by element
(``peft.tuners.multitask_prompt_tuning``).
"""

from __future__ import annotations

from collections.abc import Mapping

from prompt_store.errors import Fault
from prompt_store.files.adapter_config import AdapterConfig
from prompt_store.files.numerics import find_task_overflow
from prompt_store.files.tensor_faults import shown_number, weights_fault
from prompt_store.types import (
    CONFIG_FILE,
    ROWS_TENSOR,
    TASK_COLS_TENSOR,
    TASK_ROWS_TENSOR,
    BaseModelSpec,
    TensorData,
)

_DIMENSIONS = {
    TASK_COLS_TENSOR: "[num_tasks, num_virtual_tokens, num_ranks]",
    TASK_ROWS_TENSOR: "[num_tasks, num_ranks, width]",
}


def factor_faults(config: AdapterConfig, tensors: Mapping[str, TensorData]) -> list[Fault]:
    """Faults of the names and shapes of the factors, compared with each other, the rows and the configuration."""
    faults = []
    for name, dimensions in _DIMENSIONS.items():
        if name not in tensors:
            faults.append(weights_fault("missing_tensor", "is missing; a multitask prompt has one", name))
        elif len(tensors[name].shape) != 3 or 0 in tensors[name].shape:
            message = f"has shape {list(tensors[name].shape)}; {dimensions} is needed, each at least 1"
            faults.append(weights_fault("shape_mismatch", message, name))
    if faults:
        return faults
    num_tasks, _, num_ranks = tensors[TASK_COLS_TENSOR].shape
    rows = tensors.get(ROWS_TENSOR)
    if rows is not None and len(rows.shape) == 2:
        faults += _shape_fault(TASK_COLS_TENSOR, tensors, (num_tasks, rows.shape[0], num_ranks))
        faults += _shape_fault(TASK_ROWS_TENSOR, tensors, (num_tasks, num_ranks, rows.shape[1]))
    elif tensors[TASK_ROWS_TENSOR].shape[:2] != (num_tasks, num_ranks):
        faults += _shape_fault(TASK_ROWS_TENSOR, tensors, (num_tasks, num_ranks, tensors[TASK_ROWS_TENSOR].shape[2]))
    faults += _stated_fault("num_tasks_mismatch", "tasks", config.num_tasks, num_tasks)
    faults += _stated_fault("num_ranks_mismatch", "ranks", config.num_ranks, num_ranks)
    return faults


def product_faults(tensors: Mapping[str, TensorData], base: BaseModelSpec) -> list[Fault]:
    """The fault that the rows of a task are not finite in the serving dtype; the tensors must have no other fault."""
    found = find_task_overflow(tensors[ROWS_TENSOR], tensors[TASK_COLS_TENSOR], tensors[TASK_ROWS_TENSOR], base.dtype)
    if found is None:
        return []
    task, row, column = found
    message = (
        f"times {TASK_COLS_TENSOR} and {TASK_ROWS_TENSOR} is beyond the range of the serving dtype {base.dtype}, "
        f"first for task {task} at row {row}, column {column}"
    )
    return [weights_fault("dtype_overflow", message)]


def _shape_fault(name: str, tensors: Mapping[str, TensorData], wanted: tuple[int, int, int]) -> list[Fault]:
    if tensors[name].shape == wanted:
        return []
    others = ", ".join(
        f"{other} has {list(tensors[other].shape)}"
        for other in (ROWS_TENSOR, *_DIMENSIONS)
        if other != name and other in tensors
    )
    message = f"has shape {list(tensors[name].shape)}; {_DIMENSIONS[name]} is {list(wanted)}, for {others}"
    return [weights_fault("shape_mismatch", message, name)]


def _stated_fault(code: str, what: str, stated: int | None, found: int) -> list[Fault]:
    if stated in (None, found):
        return []
    message = f"has {found} {what}; {CONFIG_FILE} says num_{what} {shown_number(stated)}"
    return [weights_fault(code, message, TASK_COLS_TENSOR)]
