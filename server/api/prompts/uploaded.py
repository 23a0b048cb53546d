"""What an upload answers, and the change of what is known about a version by an upload of the same bytes."""

from __future__ import annotations

from pydantic import Field

from prompt_store.changes import VersionEdit
from prompt_store.types import PromptVersion
from server.api.prompts.acting import Acting
from server.api.prompts.bodies import VersionBody
from server.api.prompts.upload_form import UploadForm
from server.api.services import Services
from server.api.soft_prompts.head_labels import known_labels
from server.errors import InvalidRequestError


class EditedVersion(VersionBody):
    """A version after an edit."""

    changed: list[str] = Field(description="Fields whose values have changed.")


class UploadedVersion(EditedVersion):
    """A version after an upload."""

    warnings: list[str] = Field(description="What may be missing, in plain text, such as the names of labels.")


async def uploaded(
    services: Services, acting: Acting, version: PromptVersion, form: UploadForm, *, is_new: bool
) -> UploadedVersion:
    """The answer to an upload.

    An upload of the bytes of an existing version changes what is known about it to what the form says.
    """
    changed: tuple[str, ...] = ()
    if not is_new:
        given = form.model_fields_set
        new = VersionEdit(
            description=form.description if "description" in given else None,
            tags=form.tags if "tags" in given else None,
            metadata=form.metadata if "metadata" in given else None,
            lineage=form.lineage if "lineage" in given else None,
        )
        version, changed = await edit(services, acting, version.name, version.version, new, None)
    warnings = []
    if version.num_labels is not None and await known_labels(services.store, version) is None:
        warnings.append(
            f"the names of the head's {version.num_labels} labels are unknown; classify answers LABEL_0 and so on: "
            f"set them with prelude edit {version.name}@{version.version} --labels NAME,..."
        )
    fields = VersionBody.of(version, pinned=services.warmer.is_pinned(version)).model_dump()
    return UploadedVersion(**fields, changed=list(changed), warnings=warnings)


async def edit(
    services: Services, acting: Acting, name: str, version: int, new: VersionEdit, reason: str | None
) -> tuple[PromptVersion, tuple[str, ...]]:
    """Edit a version.

    Returns:
        The version, and the names of the fields whose values have changed.

    Raises:
        InvalidRequestError: If the new values do not fit the version.
    """
    store = services.store
    try:
        return await store.call(
            store.registry.edit, name, version, new, actor=acting.actor(reason), access=acting.access
        )
    except ValueError as error:
        raise InvalidRequestError(str(error), param=str(error).partition(":")[0]) from error
