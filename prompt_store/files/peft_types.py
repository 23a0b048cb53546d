"""The other methods of PEFT, so that a rejection can say what they are.

The names are those of PEFT 0.21 (``peft.utils.PeftType``).
"""

from __future__ import annotations

from prompt_store.types import PeftType

_WEIGHT_DELTAS = """
    ADALORA C3A DELORA FOURIERFT FROD GLORA GRALORA HIRA LOHA LOKR MISS OSF POLY PVERA RANDLORA SHIRA TINYLORA
    UNILORA VBLORA VERA WAVEFT XLORA
"""
_ROTATIONS = "BOFT HRA OFT PSOFT"
_INSIDE_LAYERS = "ADAMSS DEFT LILY PEANUT ROAD SHADOW SUPERTUNING"

_WHAT_IT_IS = {
    **dict.fromkeys(_WEIGHT_DELTAS.split(), "an adapter that changes the model's weights"),
    **dict.fromkeys(_ROTATIONS.split(), "an adapter that turns the model's weights"),
    **dict.fromkeys(_INSIDE_LAYERS.split(), "an adapter that changes what the model's layers compute"),
    "BEFT": "an adapter that changes the model's biases",
    "LN_TUNING": "an adapter that replaces the model's norm layers",
    "TRAINABLE_TOKENS": "an adapter that replaces rows of the model's embeddings",
    "ADAPTION_PROMPT": "an adapter with a gated attention of its own inside the model's layers",
}


def is_other(peft_type: str) -> bool:
    """Whether PEFT has a method of this name that is not served."""
    return peft_type in _WHAT_IT_IS


def why_not_served(peft_type: str) -> str:
    """Why a ``peft_type`` outside PeftType is rejected, as the end of a sentence about it."""
    what = _WHAT_IT_IS.get(peft_type)
    if what is not None:
        return f"is {what}; it is not served"
    if peft_type.upper() in PeftType.__members__:
        return f"is not spelled as in PEFT ({peft_type.upper()})"
    return "is not a method that this server supports"
