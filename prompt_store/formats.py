"""How a version wants to be asked: its prompt format, as the catalog records it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MAX_SEPARATOR_CHARS = 64
MAX_SYSTEM_CHARS = 8192
MAX_TEMPLATE_CHARS = 8192
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024

FORMAT_FILE = "prompt_format.json"
"""Name of the file beside an adapter in which a trainer states its format; it is read by clients, never uploaded."""


class FormatType(StrEnum):
    """How a text becomes the tokens that a soft prompt was trained on."""

    RAW = "raw"
    """The text as it is."""
    CHAT = "chat"
    """The text is a user's message in the chat template of the model."""
    TEMPLATE = "template"
    """The text is the variable ``text`` of the version's own template."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values of request fields that a request does not set; None leaves the server's value.

    Attributes:
        max_tokens: Maximum number of new tokens.
        temperature: Sampling temperature.
        stop: Strings that end the text.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    stop: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, object]:
        """The fields that are set."""
        fields: dict[str, object] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        fields["stop"] = None if self.stop is None else list(self.stop)
        return {key: value for key, value in fields.items() if value is not None}

    @classmethod
    def parse(cls, value: object) -> SamplingDefaults:
        """Check a JSON value; raises ValueError if it is not such an object."""
        fields = _fields(value, "format.sampling", {"max_tokens", "temperature", "stop"})
        limit, temperature, stop = fields.get("max_tokens"), fields.get("temperature"), fields.get("stop")
        if limit is not None and not (type(limit) is int and 0 < limit < 2**31):
            raise ValueError("format.sampling.max_tokens must be a positive integer")
        if temperature is not None:
            if isinstance(temperature, bool) or not isinstance(temperature, int | float):
                raise ValueError("format.sampling.temperature must be a number from 0 to 2")
            if not (math.isfinite(temperature) and 0 <= temperature <= 2):
                raise ValueError("format.sampling.temperature must be a number from 0 to 2")
        return cls(
            max_tokens=limit if isinstance(limit, int) else None,
            temperature=float(temperature) if isinstance(temperature, int | float) else None,
            stop=None if stop is None else _stop_strings(stop),
        )


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The format of a version.

    Attributes:
        type: How the text becomes the prompt.
        separator: Text between a text and its label; classification puts it before each label.
        system: For ``chat``: the system message of a conversation that has none.
        template: For ``template``: a Jinja template of one variable, ``text``.
        sampling: Default sampling parameters.
    """

    type: FormatType
    separator: str = ""
    system: str | None = None
    template: str | None = None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)

    @classmethod
    def parse(cls, value: object) -> PromptFormat:
        """Check a JSON value: ``"raw"``, ``"chat"``, or an object with a ``type``.

        The syntax of a template is checked where templates are rendered.

        Raises:
            ValueError: If it is neither, or a field is unknown, missing, too long or has the wrong type.
        """
        if isinstance(value, str):
            value = {"type": value}
        fields = _fields(value, "format", {"type", "separator", "system", "template", "sampling"})
        name = fields.get("type")
        if not isinstance(name, str) or name not in list(FormatType):
            raise ValueError("format.type must be raw, chat or template")
        kind = FormatType(name)
        for key, owner in (("system", FormatType.CHAT), ("template", FormatType.TEMPLATE)):
            if fields.get(key) is not None and kind is not owner:
                raise ValueError(f"format.{key} is only allowed with the type {owner}, not {kind}")
        template = _text(fields.get("template"), "format.template", MAX_TEMPLATE_CHARS)
        if kind is FormatType.TEMPLATE and not template:
            raise ValueError("format.template is missing: the type template needs one")
        return cls(
            type=kind,
            separator=_text(fields.get("separator"), "format.separator", MAX_SEPARATOR_CHARS) or "",
            system=_text(fields.get("system"), "format.system", MAX_SYSTEM_CHARS) or None,
            template=template,
            sampling=SamplingDefaults.parse(fields.get("sampling") or {}),
        )

    def to_json(self) -> dict[str, object]:
        """The type, and the other fields that are set."""
        others: dict[str, object] = {"separator": self.separator, "system": self.system, "template": self.template}
        others["sampling"] = self.sampling.to_json()
        return {"type": self.type.value} | {key: value for key, value in others.items() if value}


def _fields(value: object, what: str, known: set[str]) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a JSON object")
    if unknown := sorted(map(str, value.keys() - known)):
        raise ValueError(f"{what} has no field {unknown[0][:64]!r}; it has {', '.join(sorted(known))}")
    return value


def _text(value: object, what: str, limit: int) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > limit:
        raise ValueError(f"{what} must be a string of at most {limit} characters")
    if "\0" in value or not _is_unicode(value):
        raise ValueError(f"{what} must be Unicode text without NUL characters")
    return value


def _stop_strings(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or len(texts) > MAX_STOP_STRINGS:
        raise ValueError(f"format.sampling.stop must be a string or a list of at most {MAX_STOP_STRINGS} strings")
    found = tuple(_text(text, "format.sampling.stop", MAX_STOP_CHARS) for text in texts)
    if not all(found):
        raise ValueError("format.sampling.stop must not contain empty strings")
    return tuple(text for text in found if text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
