"""The faults of several members of one request, reported together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from server.api.errors import describe
from server.errors import InvalidRequestError, NotFoundError, ServerError, UnsupportedByEngineError

FAULTS = (InvalidRequestError, NotFoundError, UnsupportedByEngineError)
"""Errors that are about one member of a request."""


@dataclass(slots=True)
class MemberFaults:
    """What is wrong with the members of a request.

    Attributes:
        param: The request field that names the members.
        names: Each member as the request names it.
        found: The error of each faulty member by its index.
    """

    param: str
    names: Sequence[str]
    found: dict[int, ServerError] = field(default_factory=dict)

    def __contains__(self, index: object) -> bool:
        return index in self.found

    def add(self, index: int, error: ServerError) -> None:
        """Note the error of a member."""
        self.found[index] = error

    def raise_if_any(self) -> None:
        """Raise the faults of all members as one error with ``details``.

        Raises:
            ServerError: Of the members' class if all have the same; otherwise an InvalidRequestError.
        """
        if self.found:
            self._raise()

    def _raise(self) -> NoReturn:
        errors = [self.found[index] for index in sorted(self.found)]
        first = errors[0]
        kind = type(first) if len({type(error) for error in errors}) == 1 else InvalidRequestError
        count = len(self.names)
        text = (
            first.message if len(errors) == 1 else f"{len(errors)} of {count} members cannot answer: {first.message}"
        )
        raised = kind(text, param=first.param)
        raised.details = [
            {
                "code": describe(self.found[index], request_id="").code,
                "message": self.found[index].message,
                "field": f"{self.param}[{index}]",
                "member": self.names[index],
            }
            for index in sorted(self.found)
        ]
        raise raised from first
