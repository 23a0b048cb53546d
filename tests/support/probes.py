"""Probes of uploads by the scripted engine."""

from __future__ import annotations

from pathlib import Path

from server.engine.types import GenerateRequest, SoftPromptSource


class FakeProbes:
    """A part of the scripted engine: every upload passes, except for tasks in ``probe_failures``."""

    def __init__(self) -> None:
        self.probed: list[tuple[SoftPromptSource, list[int], int, str, float | None]] = []
        """Soft prompt, text, new tokens, tenant, seconds of waiting."""
        self.probe_failures: dict[int | None, Exception] = {}
        """By task; None is of soft prompts that have none."""

    def try_out(self, request: GenerateRequest) -> None:
        source, params = request.soft_prompt, request.params
        assert source is not None
        assert Path(source.path).exists()
        self.probed.append((source, request.prompt_token_ids, params.max_tokens, request.salt, request.timeout))
        if source.task_id in self.probe_failures:
            raise self.probe_failures[source.task_id]
