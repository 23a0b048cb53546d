"""How the scripted engine tries uploads."""

from __future__ import annotations

from pathlib import Path

from server.engine.types import SoftPromptSource
from server.errors import EngineNotReadyError


class FakeProbes:
    """A part of the scripted engine: every upload passes, but for the tasks that ``probe_failures`` names."""

    def __init__(self) -> None:
        self.probed: list[tuple[SoftPromptSource, list[int], int, str, float | None]] = []
        """Soft prompt, text, new tokens, tenant, seconds of waiting."""
        self.probe_failures: dict[int | None, Exception] = {}
        """By task; None is of soft prompts that have none."""

    @property
    def is_ready(self) -> bool:
        raise NotImplementedError

    async def probe(
        self,
        soft_prompt: SoftPromptSource,
        token_ids: list[int],
        *,
        max_tokens: int,
        salt: str = "",
        max_wait: float | None = None,
    ) -> None:
        if not self.is_ready:
            raise EngineNotReadyError("the engine does not accept requests now")
        assert Path(soft_prompt.path).exists()  # noqa: ASYNC240 - it lies in memory
        self.probed.append((soft_prompt, token_ids, max_tokens, salt, max_wait))
        if soft_prompt.task_id in self.probe_failures:
            raise self.probe_failures[soft_prompt.task_id]
