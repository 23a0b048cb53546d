"""What a directory holds that is not what PEFT's ``save_pretrained`` writes, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE

_PICKLE = "adapter_model.bin"
_MODEL_CONFIG = "config.json"
_MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.gguf")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")

_MAX_FOLDERS = 1000
"""Folders that are looked into: somebody may give their home directory."""

_MAX_NAMED = 5

_HOW_TO_CONVERT = (
    "load it where it comes from and save it again, by PEFT: PeftModel.from_pretrained(base, DIRECTORY)"
    ".save_pretrained(NEW, safe_serialization=True)"
)


def is_archive(path: Path) -> bool:
    """Whether a file's name is an archive's."""
    return path.name.lower().endswith(_ARCHIVES)


def what_is_wrong(directory: Path) -> str:
    """One line on a directory that lacks one of the two files of a soft prompt.

    Raises:
        OSError: If it cannot be read.
    """
    has_config, has_weights = ((directory / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))
    if (directory / _PICKLE).is_file() and not has_weights:
        return (
            f"{directory} holds {_PICKLE}, a pickle, which can run code and is never opened; {WEIGHTS_FILE} is "
            f"needed: {_HOW_TO_CONVERT}"
        )
    folders = [] if has_config or has_weights else sorted(_adapters_in(directory), key=_by_number)
    if folders:
        return f"{directory} holds no adapter itself; {_named(folders)}"
    missing = [name for name, is_there in ((CONFIG_FILE, has_config), (WEIGHTS_FILE, has_weights)) if not is_there]
    text = f"{directory} has no {' and no '.join(missing)}"
    guess = _what_it_is(directory, has_config=has_config)
    return f"{text}: {guess}" if guess else f"{text}: give the directory that PEFT's save_pretrained() wrote"


def _named(folders: list[Path]) -> str:
    """Where the adapters are; of checkpoints, the last one first."""
    if len(folders) == 1:
        return f"push the folder that does: {folders[0]}"
    newest = list(reversed(folders))
    more = f" and {len(newest) - _MAX_NAMED} more" if len(newest) > _MAX_NAMED else ""
    return f"push one of the folders that do: {', '.join(map(str, newest[:_MAX_NAMED]))}{more}"


def _by_number(folder: Path) -> tuple[str, int, str]:
    """``checkpoint-900`` before ``checkpoint-1000``."""
    stem, _, number = folder.name.rpartition("-")
    is_numbered = number.isascii() and number.isdigit() and len(number) < 18
    return (stem, int(number), "") if is_numbered else (folder.name, -1, "")


def _adapters_in(directory: Path) -> Iterator[Path]:
    """The folders in it that hold an adapter of any kind."""
    for path in islice(directory.iterdir(), _MAX_FOLDERS):
        if any((path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, _PICKLE)):
            yield path


def _what_it_is(directory: Path, *, has_config: bool) -> str | None:
    files = [path for path in islice(directory.iterdir(), _MAX_FOLDERS) if path.is_file()]
    if has_config:
        kind = _peft_type(directory / CONFIG_FILE)
        archive = next((path for path in files if is_archive(path)), None)
        named = f" (peft_type {kind})" if kind else ""
        where = f"; unpack {archive.name} first" if archive else ": was it copied without its weights?"
        return f"the configuration{named} is there alone{where}"
    archive = next((path for path in files if is_archive(path)), None)
    if (directory / _MODEL_CONFIG).is_file() or any(any(directory.glob(pattern)) for pattern in _MODEL_WEIGHTS):
        return (
            "it is a whole model, or one that an adapter was merged into: serve it by prelude serve --model "
            f"{directory}; a soft prompt is what PEFT's save_pretrained() writes before any merging"
        )
    if archive is not None:
        return f"unpack {archive.name} first, and push the directory that is in it"
    return None


def _peft_type(path: Path) -> str | None:
    try:
        config = json.loads(path.read_bytes()[: 1024 * 1024])
    except (OSError, ValueError, RecursionError):
        return None
    value = config.get("peft_type") if isinstance(config, dict) else None
    return value[:40] if isinstance(value, str) else None
