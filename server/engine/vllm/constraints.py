"""Grammars beside vLLM: compiled here first, within limits, so that vLLM compiles none that is refused or costly."""

from __future__ import annotations

import asyncio

from server.config import EngineSettings
from server.engine.constraints import Constraint
from server.engine.sampling.grammars import GrammarCompiler, Matcher, load_tokenizer
from server.engine.types import ModelInfo, RequestFailure


class ConstraintRefusedError(Exception):
    """A constraint cannot be used.

    Attributes:
        failure: How the request ends.
    """

    def __init__(self, failure: RequestFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Constraints:
    """The matchers of constrained requests, on one event loop.

    Args:
        settings: The model.
        model: The loaded model.
    """

    def __init__(self, settings: EngineSettings, model: ModelInfo) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Constraint, list[asyncio.Future[None]]] = {}
        self._compiler = GrammarCompiler(
            lambda: load_tokenizer(settings.model, settings.revision),
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            on_compiled=self._on_compiled,
        )

    async def matcher(self, constraint: Constraint, tenant: str) -> Matcher:
        """A matcher for a new request.

        Raises:
            ConstraintRefusedError: If the grammar cannot be used.
            TooManyGrammarsError: If too many of the tenant's constraints are being compiled.
        """
        while (matcher := self._compiler.matcher(constraint, tenant)) is None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting = self._waiting.setdefault(constraint, [])
            waiting.append(future)
            try:
                await future
            finally:
                if future in waiting:
                    waiting.remove(future)
                if not waiting and self._waiting.get(constraint) is waiting:
                    del self._waiting[constraint]
                    self._compiler.abandon(constraint)
        return matcher

    def close(self) -> None:
        """End the compiling threads and their processes."""
        self._compiler.close()

    def _on_compiled(self) -> None:
        self._loop.call_soon_threadsafe(self._take_compiled)

    def _take_compiled(self) -> None:
        for constraint, failure in self._compiler.take_compiled():
            for future in self._waiting.pop(constraint, []):
                if future.done():
                    continue
                if failure is None:
                    future.set_result(None)
                else:
                    future.set_exception(ConstraintRefusedError(failure))
