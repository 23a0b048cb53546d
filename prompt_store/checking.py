"""Check that an upload is a soft prompt or an adapter that the base can serve, and compute its digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prompt_store.adapters import NO_LIMITS, Adapter, AdapterLimits
from prompt_store.blobs.staging import Upload
from prompt_store.blobs.stored_files import disk_errors, version_digest
from prompt_store.catalog.over import check_over
from prompt_store.catalog.records import NewVersion
from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files.validation import validate
from prompt_store.formats import PromptFormat
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, BaseModelSpec, Lineage, SoftPrompt, StoredFile, TaskType


@dataclass(frozen=True, slots=True)
class CheckedUpload:
    """An upload whose files are a soft prompt or an adapter that the base can serve.

    Attributes:
        content: The parsed soft prompt or adapter.
        files: Configuration and weights.
        digest: The digest of the version to be.
    """

    content: SoftPrompt | Adapter
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
        prompt_format: PromptFormat | None,
        owner: str,
        over: str | None,
    ) -> NewVersion:
        """A version of a name with these files, to be published.

        Raises:
            ValueError: If ``over`` is not ``NAME@VERSION``, or is given for an adapter.
        """
        if over is not None:
            check_over(over)
            if isinstance(self.content, Adapter):
                raise ValueError("over is for soft prompts that were trained over an adapter; this is an adapter")
        content = self.content
        new = NewVersion(
            name=name,
            digest=self.digest,
            peft_type=content.peft_type,
            task_type=content.task_type,
            num_virtual_tokens=0,
            dtype="",
            base_model_name_or_path=content.base_model_name_or_path,
            files=self.files,
            num_labels=content.num_labels,
            kind=content.peft_type.kind,
            over=over,
            description=description,
            tags=tags,
            metadata=metadata,
            lineage=lineage,
            format=prompt_format,
            overrides=content.overrides,
            owner=owner,
        )
        if isinstance(content, SoftPrompt):
            return replace(
                new,
                num_virtual_tokens=content.num_virtual_tokens,
                num_tasks=content.num_tasks,
                dtype=content.prompt_embeddings.dtype,
            )
        return replace(
            new,
            dtype=content.dtype,
            rank=content.rank,
            num_modules=len(content.modules),
            num_parameters=content.num_parameters,
            targets=content.targets,
        )


def check_upload(
    upload: Upload,
    base: BaseModelSpec,
    *,
    require_same_base: bool,
    allow_float64: bool,
    task_type: TaskType | None = None,
    limits: AdapterLimits = NO_LIMITS,
) -> CheckedUpload:
    """Validate an upload. ``PromptStore.publish`` accepts the result, so that other checks can run in between.

    Args:
        upload: An upload with both files written and closed.
        base: The served model.
        require_same_base: See ``validate``.
        allow_float64: See ``validate``.
        task_type: See ``validate``.
        limits: See ``validate``.

    Raises:
        InvalidPromptError: With every fault of the files.
        StoreUnavailableError: If the disk cannot be read.
    """
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if file not in upload.files]
    if missing:
        raise InvalidPromptError([Fault("missing_file", f"{file} is missing", file) for file in missing])
    with disk_errors():
        content = validate(
            upload.read(CONFIG_FILE),
            upload.path(WEIGHTS_FILE),
            base,
            require_same_base=require_same_base,
            allow_float64=allow_float64,
            task_type=task_type,
            limits=limits,
        )
    files = tuple(upload.files[file].stored for file in (CONFIG_FILE, WEIGHTS_FILE))
    return CheckedUpload(content, files, version_digest(files))
