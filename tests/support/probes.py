"""Probes of uploads by the scripted engine."""

from __future__ import annotations

from pathlib import Path

from server.engine.types import AdapterSource, GenerateRequest, SoftPromptSource


class FakeProbes:
    """A part of the scripted engine: every upload passes, except for tasks in ``probe_failures``."""

    def __init__(self) -> None:
        self.probed: list[tuple[SoftPromptSource, list[int], int, str, float | None]] = []
        """Soft prompt, text, new tokens, tenant, seconds of waiting."""
        self.probe_failures: dict[int | None, Exception] = {}
        """By task; None is of adapters, and of soft prompts that have no tasks."""
        self.probed_adapters: list[AdapterSource] = []

    def try_out(self, request: GenerateRequest) -> None:
        source, adapter, params = request.soft_prompt, request.adapter, request.params
        if adapter is not None:
            assert Path(adapter.path).exists()
            assert Path(adapter.config_path).exists()
            self.probed_adapters.append(adapter)
        task_id = None
        if source is not None:
            assert Path(source.path).exists()
            self.probed.append((source, request.prompt_token_ids, params.max_tokens, request.salt, request.timeout))
            task_id = source.task_id
        assert source or adapter
        if task_id in self.probe_failures:
            raise self.probe_failures[task_id]
