"""Whether an upload is a soft prompt that the base can serve, and what identifies it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.staging import Upload
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, BaseModelSpec, SoftPrompt, StoredFile
from prompt_store.validation import validate


@dataclass(frozen=True, slots=True)
class CheckedUpload:
    """An upload whose files are a soft prompt that the base can serve.

    Attributes:
        soft_prompt: What it holds.
        files: Both of them.
        digest: The version's, if it becomes one.
    """

    soft_prompt: SoftPrompt
    files: tuple[StoredFile, ...]
    digest: str


def check_upload(
    upload: Upload, base: BaseModelSpec, *, require_same_base: bool, allow_float64: bool
) -> CheckedUpload:
    """Validate an upload; ``PromptStore.publish`` takes the result, where something else is asked in between.

    Args:
        upload: With both files written and closed.
        base: The resident model, which it has to fit.
        require_same_base: As in ``validate``; so is the next.
        allow_float64: See there.

    Raises:
        InvalidPromptError: With every fault of the files.
    """
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if file not in upload.files]
    if missing:
        raise InvalidPromptError([Fault("missing_file", f"{file} is missing", file) for file in missing])
    soft_prompt = validate(
        upload.read(CONFIG_FILE),
        upload.path(WEIGHTS_FILE),
        base,
        require_same_base=require_same_base,
        allow_float64=allow_float64,
    )
    files = tuple(upload.files[file].stored for file in (CONFIG_FILE, WEIGHTS_FILE))
    return CheckedUpload(soft_prompt, files, _version_digest(files))


def _version_digest(files: tuple[StoredFile, ...]) -> str:
    """sha256 over ``NAME LENGTH SHA256`` lines in order of name: the same files, the same digest."""
    lines = [f"{file.filename} {file.size} {file.sha256}\n" for file in sorted(files, key=lambda file: file.filename)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
