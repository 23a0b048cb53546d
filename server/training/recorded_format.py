"""The prompt format of a trained soft prompt, from the form of its training data."""

from __future__ import annotations

from collections.abc import Sequence

from prompt_store.formats import (
    MAX_SEPARATOR_CHARS,
    MAX_SYSTEM_CHARS,
    FormatType,
    PromptFormat,
    SamplingDefaults,
)
from server.datasets import Conversation, Example, LabelledText
from server.training.encoding import Encoded


def recorded_format(examples: Sequence[Example], encoded: Sequence[Encoded], separator: str) -> PromptFormat:
    """How the version wants to be asked: as its rows were encoded.

    Args:
        examples: The training rows, all of the same form.
        encoded: Their tokens.
        separator: Text between a text and its label.
    """
    first = examples[0]
    if isinstance(first, Conversation):
        systems = {_system_of(example) for example in examples if isinstance(example, Conversation)}
        system = systems.pop() if len(systems) == 1 else None
        return PromptFormat(FormatType.CHAT, system=system if system and len(system) <= MAX_SYSTEM_CHARS else None)
    if not isinstance(first, LabelledText) or encoded[0].class_id is not None:
        return PromptFormat(FormatType.RAW)
    # A label is one of few texts: the likeliest one is meant, and none is longer than the longest.
    longest = max(len(example.completion_ids) for example in encoded)
    return PromptFormat(
        FormatType.RAW,
        separator=separator if len(separator) <= MAX_SEPARATOR_CHARS else "",
        sampling=SamplingDefaults(max_tokens=longest, temperature=0.0),
    )


def _system_of(conversation: Conversation) -> str | None:
    """The system message that begins a conversation; None if there is none."""
    first = conversation.messages[0]
    return first.content if first.role == "system" else None
