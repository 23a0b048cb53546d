"""An upload that is checked as a real one, and stores nothing."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from prompt_store.adapters import Adapter
from prompt_store.blobs.staging import Upload
from prompt_store.checking import CheckedUpload
from prompt_store.types import SHARED, PromptVersion
from server.api.keys.callers import Caller
from server.api.prompts.bodies import FileBody
from server.api.prompts.publishing import require_soft_prompt, try_upload
from server.api.prompts.upload_form import UploadForm
from server.api.services import Services
from server.errors import InvalidRequestError


class DryRun(BaseModel):
    """What an upload would store."""

    object: Annotated[str, Field(description="Always `prompt.dry_run`.")] = "prompt.dry_run"
    id: str | None = Field(description="The soft prompt's name, if one was given.")
    kind: str = Field(description="`soft_prompt` or `adapter`.")
    peft_type: str = Field(description="PEFT method that trained it.")
    task_type: str = Field(description="`CAUSAL_LM` or `SEQ_CLS`.")
    dtype: str = Field(description="Element type of its tensors.")
    num_virtual_tokens: int = Field(description="Number of positions before the text; 0 for an adapter.")
    num_tasks: int | None = Field(description="Number of tasks of a multitask prompt.")
    num_labels: int | None = Field(description="Number of labels of the classification head.")
    rank: int | None = Field(description="Largest rank of an adapter; 0 for an IA3.")
    num_parameters: int | None = Field(description="Number of parameters of an adapter.")
    digest: str = Field(description="SHA-256 over the version's files.")
    files: list[FileBody] = Field(description="The files.")
    size: int = Field(description="Total size of the files, in bytes.")
    existing_version: int | None = Field(
        description="The version of this name with the same bytes; an upload would change only its fields."
    )
    same_bytes: list[str] = Field(
        description="`NAME@VERSION` of other versions with the same bytes that the caller sees; at most 16."
    )
    blocks: int = Field(description="Key/value blocks that it takes on the device, for each task.")
    warnings: list[str] = Field(description="What may be missing, in plain text.")


async def dry_run(
    services: Services, upload: Upload, checked: CheckedUpload, form: UploadForm, caller: Caller
) -> DryRun:
    """Check an upload with the model and the catalog, as ``publish`` does.

    Raises:
        InvalidPromptError: If the model cannot compute with it, or its adapter does not exist.
        InvalidRequestError: If the name is the base's, or an adapter is said to be trained over another.
        PromptConflictError: If the name is another owner's.
        EngineError: If the engine does not serve now, or cannot load the files.
    """
    require_soft_prompt(checked, form)
    if form.id == services.base_name:
        raise InvalidRequestError(f"id: name {form.id!r} is the name of the base model", param="id")
    await try_upload(services, upload, checked, form, caller)
    store = services.store
    if form.id:
        owner = SHARED if form.shared else caller.tenant
        await store.call(store.registry.check_owner, form.id, owner)
    same = await store.call(store.registry.same_bytes, checked.digest, form.over, caller.access)
    return _body(services, checked, form, same)


def _body(services: Services, checked: CheckedUpload, form: UploadForm, same: list[PromptVersion]) -> DryRun:
    content = checked.content
    is_adapter = isinstance(content, Adapter)
    num_virtual = 0 if isinstance(content, Adapter) else content.num_virtual_tokens
    block_size = services.engine.model.block_size
    warnings = []
    if content.num_labels is not None:
        warnings.append(
            f"the head has {content.num_labels} labels: give their names as labels in the metadata, unless the "
            "configuration has them"
        )
    others = [f"{version.name}@{version.version}" for version in same if version.name != form.id]
    if others:
        warnings.append(f"{others[0]} has the same bytes")
    new = checked.new_version(
        form.id or "unnamed",
        description="",
        tags=(),
        metadata={},
        lineage=form.lineage,
        prompt_format=None,
        owner=SHARED,
        over=form.over,
    )
    return DryRun(
        id=form.id or None,
        kind=new.kind.value,
        peft_type=new.peft_type.value,
        task_type=new.task_type,
        dtype=new.dtype,
        num_virtual_tokens=num_virtual,
        num_tasks=new.num_tasks,
        num_labels=new.num_labels,
        rank=new.rank if is_adapter else None,
        num_parameters=new.num_parameters if is_adapter else None,
        digest=checked.digest,
        files=[FileBody(filename=file.filename, sha256=file.sha256, size=file.size) for file in checked.files],
        size=sum(file.size for file in checked.files),
        existing_version=max((version.version for version in same if version.name == form.id), default=None),
        same_bytes=others,
        blocks=-(-num_virtual // block_size),
        warnings=warnings,
    )
