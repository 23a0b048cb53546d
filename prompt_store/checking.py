"""Check that an upload is a soft prompt that the base can serve, and compute its digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prompt_store.blobs.staging import Upload
from prompt_store.blobs.stored_files import disk_errors, version_digest
from prompt_store.catalog.records import NewVersion
from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files.validation import validate
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, BaseModelSpec, Lineage, SoftPrompt, StoredFile, TaskType


@dataclass(frozen=True, slots=True)
class CheckedUpload:
    """An upload whose files are a soft prompt that the base can serve.

    Attributes:
        soft_prompt: The parsed soft prompt.
        files: Configuration and weights.
        digest: The digest of the version to be.
    """

    soft_prompt: SoftPrompt
    files: tuple[StoredFile, ...]
    digest: str

    def new_version(
        self,
        name: str,
        *,
        description: str,
        tags: tuple[str, ...],
        metadata: Mapping[str, object],
        lineage: Lineage,
        owner: str,
    ) -> NewVersion:
        """A version of a name with these files, to be published."""
        soft_prompt = self.soft_prompt
        return NewVersion(
            name=name,
            digest=self.digest,
            peft_type=soft_prompt.peft_type,
            task_type=soft_prompt.task_type,
            num_virtual_tokens=soft_prompt.num_virtual_tokens,
            dtype=soft_prompt.prompt_embeddings.dtype,
            base_model_name_or_path=soft_prompt.base_model_name_or_path,
            files=self.files,
            num_tasks=soft_prompt.num_tasks,
            num_labels=soft_prompt.num_labels,
            description=description,
            tags=tags,
            metadata=metadata,
            lineage=lineage,
            overrides=soft_prompt.overrides,
            owner=owner,
        )


def check_upload(
    upload: Upload,
    base: BaseModelSpec,
    *,
    require_same_base: bool,
    allow_float64: bool,
    task_type: TaskType | None = None,
) -> CheckedUpload:
    """Validate an upload. ``PromptStore.publish`` accepts the result, so that other checks can run in between.

    Args:
        upload: An upload with both files written and closed.
        base: The served model.
        require_same_base: See ``validate``.
        allow_float64: See ``validate``.
        task_type: See ``validate``.

    Raises:
        InvalidPromptError: With every fault of the files.
        StoreUnavailableError: If the disk cannot be read.
    """
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if file not in upload.files]
    if missing:
        raise InvalidPromptError([Fault("missing_file", f"{file} is missing", file) for file in missing])
    with disk_errors():
        soft_prompt = validate(
            upload.read(CONFIG_FILE),
            upload.path(WEIGHTS_FILE),
            base,
            require_same_base=require_same_base,
            allow_float64=allow_float64,
            task_type=task_type,
        )
    files = tuple(upload.files[file].stored for file in (CONFIG_FILE, WEIGHTS_FILE))
    return CheckedUpload(soft_prompt, files, version_digest(files))
