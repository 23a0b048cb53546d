"""Explain why a directory cannot be uploaded, and what to do about it."""

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
"""Maximum number of folders to search; the directory may be a home directory."""

_MAX_NAMED = 5


def is_archive(path: Path) -> bool:
    """Whether a file name has the suffix of an archive."""
    return path.name.lower().endswith(_ARCHIVES)


def explain_directory(directory: Path) -> str:
    """Explain in one line why a directory lacks one of the two files of a soft prompt.

    Raises:
        OSError: If it cannot be read.
    """
    has_config, has_weights = ((directory / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))
    if (directory / _PICKLE).is_file() and not has_weights:
        return (
            f"{directory} contains {_PICKLE}, a pickle, which can run code and is never loaded. To get a "
            f"{WEIGHTS_FILE} without running it: prelude import {directory} --out NEW"
        )
    folders = [] if has_config or has_weights else sorted(_adapters_in(directory), key=_by_number)
    if folders:
        return f"{directory} contains no adapter; {_named(folders)}"
    missing = [name for name, is_there in ((CONFIG_FILE, has_config), (WEIGHTS_FILE, has_weights)) if not is_there]
    text = f"{directory} has no {' and no '.join(missing)}"
    reason = _guess(directory, has_config=has_config)
    return f"{text}: {reason}" if reason else f"{text}: give the directory that PEFT's save_pretrained() wrote"


def _named(folders: list[Path]) -> str:
    """Name the folders with adapters, the newest checkpoint first."""
    if len(folders) == 1:
        return f"push its folder {folders[0]}"
    newest = list(reversed(folders))
    more = f" and {len(newest) - _MAX_NAMED} more" if len(newest) > _MAX_NAMED else ""
    return f"push one of its folders: {', '.join(map(str, newest[:_MAX_NAMED]))}{more}"


def _by_number(folder: Path) -> tuple[str, int, str]:
    """Sort key that puts ``checkpoint-900`` before ``checkpoint-1000``."""
    stem, _, number = folder.name.rpartition("-")
    is_numbered = number.isascii() and number.isdigit() and len(number) < 18
    return (stem, int(number), "") if is_numbered else (folder.name, -1, "")


def _adapters_in(directory: Path) -> Iterator[Path]:
    """The folders in a directory that contain an adapter."""
    for path in islice(directory.iterdir(), _MAX_FOLDERS):
        if any((path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, _PICKLE)):
            yield path


def _guess(directory: Path, *, has_config: bool) -> str | None:
    files = [path for path in islice(directory.iterdir(), _MAX_FOLDERS) if path.is_file()]
    if has_config:
        kind = _peft_type(directory / CONFIG_FILE)
        archive = next((path for path in files if is_archive(path)), None)
        named = f" (peft_type {kind})" if kind else ""
        where = f"; unpack {archive.name} first" if archive else "; were the weights not copied?"
        return f"it contains only the configuration{named}{where}"
    archive = next((path for path in files if is_archive(path)), None)
    if (directory / _MODEL_CONFIG).is_file() or any(any(directory.glob(pattern)) for pattern in _MODEL_WEIGHTS):
        return (
            "it is a whole model, perhaps with a merged adapter: serve it with prelude serve --model "
            f"{directory}; a soft prompt is what PEFT's save_pretrained() writes before merging"
        )
    if archive is not None:
        return f"unpack {archive.name} first, and push the directory in it"
    return None


def _peft_type(path: Path) -> str | None:
    try:
        config = json.loads(path.read_bytes()[: 1024 * 1024])
    except (OSError, ValueError, RecursionError):
        return None
    value = config.get("peft_type") if isinstance(config, dict) else None
    return value[:40] if isinstance(value, str) else None
