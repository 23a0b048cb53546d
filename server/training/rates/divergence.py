"""When a training diverges, by the size of what it trains."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from server.training.peft_methods import mean_norm
from server.training.settings import Method

DIVERGENCE_FACTOR = 30.0
"""Factor over the initial mean norm, and the vocabulary's, above which a training diverges."""

MAX_CHANGE = 3.0
"""Mean size of an adapter's changes, as shares of the weights' norms, above which a training diverges."""


class SizeLimit:
    """The largest ``mean_norm`` of a training; created before the first step.

    Args:
        model: The initialised PEFT model.
        method: The training method.
    """

    def __init__(self, model: PeftModel, method: Method) -> None:
        self._is_soft_prompt = method.is_soft_prompt
        self._initial = mean_norm(model)
        self._limit = MAX_CHANGE
        if method.is_key_values:
            self._limit = DIVERGENCE_FACTOR * self._initial
        elif method.is_soft_prompt:
            base: Any = model.get_base_model()
            rows = base.get_input_embeddings().weight.detach().float()
            self._limit = DIVERGENCE_FACTOR * max(self._initial, float(rows.norm(dim=-1).mean()))

    def fault(self, norm: float) -> str | None:
        """Why a mean norm is too large, or not a number; None if it is neither."""
        if norm <= self._limit:
            return None
        if self._is_soft_prompt:
            return f"the soft prompt's mean norm is {norm:.3g}, up from {self._initial:.3g}"
        return f"the adapter's changes are {norm:.3g} times as large as the weights"
