"""A process that only serves: without torch."""

from __future__ import annotations

import logging
import sys

_ADVICE = "PyTorch was not found"


def hide_torch() -> None:
    """Let transformers find no torch in this process.

    Its tokenizers need none, but import it if it is there, which takes seconds and 350 MiB. The model is
    computed in the engine's process. No effect if torch is imported already.
    """
    if "torch" not in sys.modules:
        # This is how Python marks a module as absent.
        sys.modules["torch"] = None  # type: ignore[assignment]
        logging.getLogger("transformers").addFilter(lambda record: _ADVICE not in record.getMessage())
