"""Check that the classification head of a SEQ_CLS prompt fits the base.

PEFT saves the module that transformers calls ``score`` (most decoders) or ``classifier``: one linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from prompt_store.errors import Fault
from prompt_store.files.tensor_faults import weights_fault
from prompt_store.types import WEIGHTS_FILE, BaseModelSpec, TensorData


def head_faults(heads: Mapping[str, TensorData], base: BaseModelSpec, prefix: str = "base_model.") -> list[Fault]:
    """Faults of a head's names and shapes.

    Args:
        heads: Its tensors by name: weight [labels, hidden size], bias [labels].
        base: The served model.
        prefix: The prefix of their names; that of adapters is longer.
    """
    modules = sorted({name.rpartition(".")[0] for name in heads})
    if len(modules) > 1:
        message = f"{WEIGHTS_FILE}: {' and '.join(modules)} are both there; a file has one head"
        return [Fault("several_heads", message, WEIGHTS_FILE, modules[0])]
    name = f"{modules[0] if modules else f'{prefix}score'}.weight"
    weight = heads.get(name)
    if weight is None:
        message = f"is missing: a SEQ_CLS file comes with its head ({prefix}score or {prefix}classifier)"
        return [weights_fault("missing_tensor", message, name)]
    if len(weight.shape) != 2 or weight.shape[0] < 1 or weight.shape[1] != base.head_width:
        message = (
            f"has shape {list(weight.shape)}; [labels, {base.head_width}] is needed, with at least 1 label, "
            f"for the hidden states of {base.name!r}"
        )
        return [weights_fault("shape_mismatch", message, name)]
    bias_name = f"{modules[0]}.bias"
    bias = heads.get(bias_name)
    if bias is not None and bias.shape != weight.shape[:1]:
        message = f"has shape {list(bias.shape)}; {list(weight.shape[:1])} is needed, as {name} has"
        return [weights_fault("shape_mismatch", message, bias_name)]
    return []
