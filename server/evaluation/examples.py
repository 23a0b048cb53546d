"""Labelled examples as requests: what is asked, and what the right answer is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from server.datasets import Conversation, Example, LabelledText, PromptCompletion

DEFAULT_MAX_TOKENS = 64
"""New tokens of an answer that is generated."""

DEFAULT_SEPARATOR = "\n"
"""Text between a text and a label, if nothing is known of the training."""

Form = Literal["prompt", "text", "messages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """A soft prompt, a version, an ensemble or the base model, with the text prompt if any.

    Attributes:
        name: Name in reports.
        model: The field ``model`` of its requests; several names for an ensemble.
        ensemble: How the members of an ensemble are combined.
        has_head: Whether it has a classification head.
        text_prompt: Instruction before each text, or around ``{}``; None for none.
        has_tasks: Whether to send the ``task_id`` of rows.
        separator: Text between a text and a label that is scored, as in training.
    """

    name: str
    model: str | tuple[str, ...]
    ensemble: str | None = None
    has_head: bool = False
    text_prompt: str | None = None
    has_tasks: bool = False
    separator: str = "\n"

    def prompted(self, text: str) -> str:
        """Add the text prompt to a text."""
        if self.text_prompt is None:
            return text
        return self.text_prompt.replace("{}", text) if "{}" in self.text_prompt else self.text_prompt + text


def content_of(example: Example, evaluated: EvaluatedModel) -> tuple[Form, Any]:
    """The field of a request that holds the question, and its value: a text, or a list of messages."""
    match example:
        case LabelledText():
            return "text", evaluated.prompted(example.text)
        case PromptCompletion():
            return "prompt", evaluated.prompted(example.prompt)
        case Conversation():
            turns = [{"role": turn.role, "content": turn.content} for turn in example.messages[:-1]]
            if evaluated.text_prompt is not None:
                turns.insert(0, {"role": "system", "content": evaluated.text_prompt})
            return "messages", turns


def expected_of(example: Example) -> str:
    """The right answer: the label, the completion, or the last message."""
    match example:
        case Conversation():
            return example.messages[-1].content
        case PromptCompletion():
            return example.completion
        case LabelledText():
            return example.label


def metric_of(example: Example) -> str:
    """The measure of such examples: ``accuracy`` of labels, or ``exact_match`` of texts."""
    return "accuracy" if isinstance(example, LabelledText) else "exact_match"


def trained_separator(prompt_format: Mapping[str, Any] | None, metadata: object) -> str | None:
    """The separator of a version's format, or the one that ``prelude train`` recorded; None if there is none.

    Args:
        prompt_format: The format as JSON; None if it is not known.
        metadata: The version's metadata.
    """
    known = (prompt_format or {}).get("separator")
    if known:
        return str(known)
    value: Any = metadata
    for key in ("training", "settings", "separator"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None
