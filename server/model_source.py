"""Check once, within seconds and before anything slow is started, that a model exists.

transformers looks up each file separately and retries if the hub does not answer: two processes needed more than a
minute to report a mistyped name.
"""

from __future__ import annotations

import logging
import re
import threading
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from prompt_store.types import CONFIG_FILE
from server.errors import ConfigurationError

logger = logging.getLogger(__name__)

_MODEL_CONFIG = "config.json"

_ANSWER_SECONDS = 4.0
_CHECK_SECONDS = 5.0
"""Timeout of the whole check. The lookup of a host name has no configurable timeout."""

_MAX_FOLDERS = 200

GGUF = ".gguf"

_NO_GGUF = (
    "Prelude loads the safetensors that GGUF files are converted from. Give the hub id or the directory of the "
    "original checkpoint"
)

_LOG_IN = "log in (hf auth login, or HF_TOKEN)"


class _UnreachableError(Exception):
    """The hub does not answer; the message is the reason."""


def locate(model: str, revision: str | None = None) -> str:
    """What to load for ``--model``: the same name, or the cached copy if the hub cannot be used.

    Args:
        model: A hub id, or a directory that transformers can load.
        revision: The hub revision.

    Raises:
        ConfigurationError: If the model does not exist, as far as can be checked; the message says what to do.
    """
    if not model.strip():
        raise ConfigurationError("--model is empty: give a hub id (owner/name), or a directory")
    path = Path(model)
    try:
        if path.is_dir():
            _check_directory(path)
            return model
        is_file = path.exists()
    except (OSError, ValueError) as error:  # a name too long for a path, or a directory that may not be read
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"the model {model[:200]!r} cannot be read: {reason}") from error
    if path.suffix.lower() == GGUF:
        raise ConfigurationError(f"the model {model!r} is a GGUF file: {_NO_GGUF}")
    if is_file:
        raise ConfigurationError(
            f"the model {model!r} is a file: give the directory that contains it and {_MODEL_CONFIG}"
        )
    if _is_path(model):
        raise ConfigurationError(f"the model {model!r} does not exist: no such directory")
    return _on_the_hub(model, revision)


def _is_path(model: str) -> bool:
    return (
        model.startswith(("/", ".", "~"))
        or "\\" in model
        or model.count("/") > 1
        or bool(re.match("[A-Za-z]:", model))
    )


def _check_directory(path: Path) -> None:
    if (path / _MODEL_CONFIG).is_file():
        return
    text = f"the model's directory {path} has no {_MODEL_CONFIG}"
    if (path / CONFIG_FILE).is_file():
        raise ConfigurationError(
            f"{text}: it is an adapter. Serve its base model, and upload the adapter with prelude push {path}"
        )
    if any(path.glob(f"*{GGUF}")):
        raise ConfigurationError(f"{text} but a GGUF file: {_NO_GGUF}")
    inner = sorted(folder for folder in islice(path.iterdir(), _MAX_FOLDERS) if (folder / _MODEL_CONFIG).is_file())
    if inner:
        raise ConfigurationError(f"{text}; {inner[0]} has one")
    raise ConfigurationError(f"{text}: give a hub id, or the directory that save_pretrained() wrote")


def _on_the_hub(model: str, revision: str | None) -> str:
    try:
        cached = try_to_load_from_cache(model, _MODEL_CONFIG, revision=revision)
    except HFValidationError as error:
        raise ConfigurationError(
            f"the model {model[:200]!r} is neither a directory nor a hub id (owner/name)"
        ) from error
    found = Path(cached).parent if isinstance(cached, str) else None
    named = f"{model!r}" if revision is None else f"{model!r} (revision {revision!r})"
    if constants.HF_HUB_OFFLINE:
        if found is not None:
            return model
        raise ConfigurationError(
            f"the model {named} does not exist: no such directory, and it is not in the hub's cache "
            f"({constants.HF_HUB_CACHE}). Give a directory, or unset HF_HUB_OFFLINE to look it up{_hint(model)}"
        )
    try:
        _check_hub(hf_hub_url(model, _MODEL_CONFIG, revision=revision))
    except GatedRepoError as error:
        if found is not None:
            logger.warning("the model %s is gated and this account may not read it; loading the cached copy", named)
            return str(found)
        raise ConfigurationError(f"the model {named} is gated: {_LOG_IN} with an account that may read it") from error
    except RevisionNotFoundError as error:
        raise ConfigurationError(f"the model {model!r} has no revision {revision!r}") from error
    except EntryNotFoundError as error:
        raise ConfigurationError(f"{named} has no {_MODEL_CONFIG}: transformers cannot load it") from error
    except RepositoryNotFoundError as error:
        raise ConfigurationError(
            f"the model {named} does not exist: no such directory, and {constants.ENDPOINT} does not have it or "
            f"hides it. Check the spelling, give a directory, or {_LOG_IN}{_hint(model)}"
        ) from error
    except _UnreachableError as error:
        if found is None:
            raise ConfigurationError(
                f"the model {named} does not exist: no such directory, not in the hub's cache, and "
                f"{constants.ENDPOINT} cannot be reached ({error}). Give a directory, or check the network"
                f"{_hint(model)}"
            ) from error
        logger.warning("%s cannot be reached (%s); loading %s from the hub's cache", constants.ENDPOINT, error, model)
        return str(found)
    return model


def _hint(model: str) -> str:
    """What else a name without an owner may be, for the end of a message."""
    if "/" in model:
        return ""
    return f". If a server gives its model the name {model!r}, give the hub id or directory that it was loaded from"


def _check_hub(url: str) -> None:
    """Request the headers of a file; raises the hub's error, or _UnreachableError without an answer."""
    answers: SimpleQueue[Exception | None] = SimpleQueue()

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=_ANSWER_SECONDS)
        except Exception as error:  # the types depend on the HTTP library that huggingface_hub uses
            answers.put(error)
        else:
            answers.put(None)

    # A daemon thread, so that a hanging lookup of the host name does not keep the process alive.
    threading.Thread(target=ask, name="ask the hub", daemon=True).start()
    try:
        error = answers.get(timeout=_CHECK_SECONDS)
    except Empty:
        raise _UnreachableError(f"no answer within {_CHECK_SECONDS:.0f} s") from None
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
        raise error
    if error is not None:
        lines = str(error).strip().splitlines()
        raise _UnreachableError(lines[0] if lines else type(error).__name__) from error
