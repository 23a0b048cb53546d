"""The use of versions, as it is counted and stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Use:
    """How much a version was used.

    Attributes:
        requests: Number of requests that were admitted.
        prompt_tokens: Text tokens of their prompts.
        completion_tokens: Tokens of their answers.
        last_used_at: Time of the last one, in microseconds since 1970, UTC; 0 if there was none.
        errors: Number of the requests that failed.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    last_used_at: int = 0
    errors: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            max(self.last_used_at, other.last_used_at),
            self.errors + other.errors,
        )


@dataclass(frozen=True, slots=True)
class VersionUse:
    """The use of one version.

    Attributes:
        version: Its number.
        created_at: Time of publication, in microseconds since 1970, UTC.
        use: How much it was used.
    """

    version: int
    created_at: int
    use: Use
