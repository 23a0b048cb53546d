"""The prompt format of an upload: as given, as the trainer states it beside the adapter, or a guess."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_store.formats import FORMAT_FILE, FormatType, PromptFormat
from server.client.http import ClientError

UNKNOWN = "unknown"
"""The value of ``--format`` that states none."""

_MAX_FILE_BYTES = 1024 * 1024
_TOKENIZER_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class ChosenFormat:
    """A format, and where it is from.

    Attributes:
        value: The format; None if it is not known.
        source: Why it was chosen, for the user; None if the user gave it.
        is_guess: Whether it is only a guess.
    """

    value: PromptFormat | None
    source: str | None = None
    is_guess: bool = False

    @property
    def name(self) -> str:
        """``raw``, ``chat``, ``template`` or ``unknown``."""
        return UNKNOWN if self.value is None else self.value.type.value

    @property
    def text(self) -> str | None:
        """The form field of an upload."""
        return None if self.value is None else json.dumps(self.value.to_json())


def given_format(text: str) -> ChosenFormat:
    """Read the value of ``--format``: a name, a JSON object, a JSON file, or a file with a Jinja template.

    Raises:
        ClientError: If it is none of these.
    """
    if text == UNKNOWN:
        return ChosenFormat(None)
    if text in (FormatType.RAW, FormatType.CHAT):
        return ChosenFormat(PromptFormat(FormatType(text)))
    path = Path(text)
    if not text.lstrip().startswith("{"):
        if not path.is_file():
            raise ClientError(
                f"--format {text[:200]!r} is neither raw, chat nor unknown, nor a JSON object, nor a file with "
                "one or with a Jinja template",
                code="usage",
            )
        text = _read(path)
        if path.suffix != ".json":
            return ChosenFormat(PromptFormat(FormatType.TEMPLATE, template=text))
    return ChosenFormat(_parsed(text, "--format"))


def format_of_directory(directory: Path) -> ChosenFormat:
    """The format that a trainer stated beside an adapter, else a guess from what lies there.

    Raises:
        ClientError: If the statement cannot be read.
    """
    stated = directory / FORMAT_FILE
    if stated.is_file():
        return ChosenFormat(_parsed(_read(stated), str(stated)), f"stated by {FORMAT_FILE}")
    if (directory / _TEMPLATE_FILE).is_file() or "chat_template" in _object_in(directory / _TOKENIZER_FILE):
        return ChosenFormat(PromptFormat(FormatType.CHAT), "guessed: a chat template lies beside the adapter", True)
    return ChosenFormat(PromptFormat(FormatType.RAW), "guessed: no chat template lies beside the adapter", True)


def _parsed(text: str, where: str) -> PromptFormat:
    try:
        return PromptFormat.parse(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ClientError(f"{where}: {error}", code="usage") from error


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ClientError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _object_in(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path)) if path.is_file() else {}
    except (ClientError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
