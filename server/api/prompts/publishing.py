"""From the files of an upload to a version: check them, let the model try them, publish."""

from __future__ import annotations

from contextlib import AsyncExitStack

from prompt_store.adapters import Adapter
from prompt_store.blobs.staging import Upload
from prompt_store.changes import HistoryAction
from prompt_store.checking import CheckedUpload, check_upload
from prompt_store.errors import Fault, InvalidPromptError, PromptNotFoundError
from prompt_store.types import SHARED, PromptKind, PromptRef, PromptVersion
from server.api.keys.callers import Caller
from server.api.prompts.acting import Acting
from server.api.prompts.probing import probe
from server.api.prompts.upload_form import ReadForm, UploadForm
from server.api.services import Services
from server.api.soft_prompts.engine_source import adapter_source
from server.engine.types import AdapterSource
from server.errors import InvalidRequestError


async def check_files(services: Services, upload: Upload, form: UploadForm | ReadForm) -> CheckedUpload:
    """Check the files of an upload; InvalidPromptError with all faults."""
    settings = services.settings.store
    return await services.store.call(
        check_upload,
        upload,
        services.base_spec,
        require_same_base=not (settings.allow_other_base or form.allow_other_base),
        allow_float64=settings.allow_float64,
        task_type=form.task_type,
        limits=services.adapter_limits,
    )


async def check(services: Services, upload: Upload, form: ReadForm) -> tuple[UploadForm, CheckedUpload]:
    """Check the text fields and the files of an upload.

    Raises:
        InvalidRequestError: If only text fields are at fault; ``details`` has all of them.
        InvalidPromptError: With all faults of the files, and those of text fields after them.
    """
    try:
        checked = await check_files(services, upload, form)
    except InvalidPromptError as error:
        if form.faults:
            raise InvalidPromptError([*error.faults, *form.faults]) from error
        raise
    return form.required, checked


async def publish(
    services: Services, upload: Upload, checked: CheckedUpload, form: UploadForm, acting: Acting
) -> tuple[PromptVersion, bool]:
    """Try a checked upload, and make it a version.

    Returns:
        The version, and whether it is new.

    Raises:
        InvalidPromptError: If the model cannot compute with it, or its adapter does not exist.
        InvalidRequestError: If the name is the base's, or an adapter is said to be trained over another.
        PromptConflictError: If the name is another owner's.
        EngineError: If the engine does not serve now, or cannot load the files.
    """
    require_soft_prompt(checked, form)
    caller = acting.caller
    await try_upload(services, upload, checked, form, caller)
    try:
        version, created = await services.store.publish(
            upload,
            name=form.id,
            base=services.base_spec,
            checked=checked,
            alias=form.alias,
            description=form.description,
            tags=form.tags,
            metadata=form.metadata,
            lineage=form.lineage,
            prompt_format=form.format,
            over=form.over,
            actor=acting.actor(),
            owner=SHARED if form.shared else caller.tenant,
            reserved_names=(services.base_name,),
            imported=form.imported,
        )
    except ValueError as error:  # the format was checked already: it is the name of the base model
        raise InvalidRequestError(f"id: {error}", param="id") from error
    if form.version is not None:  # from another server; no alias was moved
        acting.changed(HistoryAction.IMPORT, form.id, version=version.version)
        return version, created
    services.warmer.promoted(form.id, form.alias)
    acting.changed(HistoryAction.PUBLISH, form.id, version=version.version, alias=form.alias)
    return version, created


def require_soft_prompt(checked: CheckedUpload, form: UploadForm) -> None:
    """Check that ``over`` is given for a soft prompt only; InvalidRequestError if not."""
    if form.over is not None and isinstance(checked.content, Adapter):
        raise InvalidRequestError(
            "over: for soft prompts that were trained over an adapter; these files are an adapter", param="over"
        )


async def try_upload(
    services: Services, upload: Upload, checked: CheckedUpload, form: UploadForm, caller: Caller
) -> None:
    """Let the model compute with a checked upload, over the adapter that it was trained over.

    Raises:
        InvalidPromptError: If the model cannot compute with it, or its adapter does not exist.
        EngineError: If the engine does not serve now, or cannot load the files.
    """
    async with AsyncExitStack() as stack:
        over = None if form.over is None else await _leased_adapter(services, form.over, caller, stack)
        await probe(services, checked, upload, caller, over=over)


async def _leased_adapter(services: Services, over: str, caller: Caller, stack: AsyncExitStack) -> AdapterSource:
    """The adapter that a soft prompt was trained over; its files stay until ``stack`` ends."""
    try:
        leased = await stack.enter_async_context(services.store.lease(PromptRef.parse(over), caller.access))
    except PromptNotFoundError as error:
        raise InvalidPromptError([Fault("unknown_adapter", f"over: {error}", field="over")]) from error
    if leased.version.kind is not PromptKind.ADAPTER:
        fault = Fault("unknown_adapter", f"over: {over} is a soft prompt, not an adapter", field="over")
        raise InvalidPromptError([fault])
    return adapter_source(leased)
