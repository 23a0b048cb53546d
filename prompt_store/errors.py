"""The errors of the prompt store.

PromptStoreError
├── PromptNotFoundError      no such name, version or alias
│   └── AliasNotFoundError   the name exists, but not this alias; lists those that do
├── InvalidPromptError       the uploaded files are not a soft prompt that this base can serve; lists every fault
├── PromptForbiddenError     the soft prompt may be used, but not changed
├── PromptConflictError      the catalog is not in the state that the caller expected
│   └── PromptInUseError     a deletion would take aliases or several versions along
├── PromptTooLargeError      a file is over the size limit
├── JobNotFoundError         no such evaluation or training run
├── JobsFullError            too many evaluations or metrics of one tenant
├── CorruptBlobError         stored bytes no longer match their digest
│   └── BlobNotFoundError    there are no bytes under that digest at all
└── StoreUnavailableError    catalog or blobs cannot be reached now; nothing was lost
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class PromptStoreError(Exception):
    """Base of all errors of the prompt store."""


class PromptNotFoundError(PromptStoreError):
    """No such name, version or alias."""


class AliasNotFoundError(PromptNotFoundError):
    """The name exists but has no such alias; the message lists those that it has."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of an uploaded soft prompt.

    Attributes:
        code: Stable identifier, such as ``shape_mismatch``.
        message: The fault, with the numbers.
        file: The faulty file, if any.
        field: The faulty configuration field or tensor, if any.
    """

    code: str
    message: str
    file: str | None = None
    field: str | None = None


class InvalidPromptError(PromptStoreError):
    """The uploaded files are not a soft prompt that this base can serve."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = tuple(faults)


class PromptForbiddenError(PromptStoreError):
    """The soft prompt may be used, but not changed."""


class PromptConflictError(PromptStoreError):
    """The catalog is not in the state that the caller expected."""


class PromptInUseError(PromptConflictError):
    """A deletion would also remove aliases, or several versions, and was not forced."""


class PromptTooLargeError(PromptStoreError):
    """A file is over the size limit."""


class JobNotFoundError(PromptStoreError):
    """No such evaluation or training run."""


class JobsFullError(PromptStoreError):
    """Too many evaluations of one tenant are not over, or a training run has too many metrics."""


class CorruptBlobError(PromptStoreError):
    """Stored bytes no longer match their digest."""


class BlobNotFoundError(CorruptBlobError):
    """The blob does not exist; a version without its blob counts as damaged."""


class StoreUnavailableError(PromptStoreError):
    """Catalog or blobs are temporarily unavailable, or reject the credentials; nothing was lost."""
