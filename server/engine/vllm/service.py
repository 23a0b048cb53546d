"""vLLM, loaded and served: the parts of the process that need vllm."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from vllm.v1.engine.async_llm import AsyncLLM

from server.config import EngineSettings
from server.engine.messages import FromEngine, ToEngine
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.types import ModelInfo
from server.engine.vllm.configuration import check_version, embedding_width, model_info, vllm_config_of
from server.engine.vllm.constraints import Constraints
from server.engine.vllm.front import Front
from server.engine.vllm.statistics import Statistics
from server.errors import EngineStartError

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0
"""Time that vLLM's processes have to end by themselves."""


class Service:
    """A loaded model that handles messages. Create it in a running event loop, which it blocks while it loads.

    Args:
        settings: The model and its limits.
        send: Sends a message to the server.

    Raises:
        EngineStartError: If the model cannot be served with these settings.
    """

    def __init__(self, settings: EngineSettings, send: Callable[[FromEngine], None]) -> None:
        check_version()
        config = vllm_config_of(settings)
        statistics = Statistics(self._stepped)
        try:
            self._llm = AsyncLLM.from_vllm_config(
                config, stat_loggers=[statistics.logger_factory()], disable_log_stats=True
            )
        except Exception as error:
            raise EngineStartError(
                f"vLLM cannot serve the model {settings.model!r} ({type(error).__name__}: {error})"
            ) from error
        try:
            self.model: ModelInfo = model_info(settings, self._llm.vllm_config)
        except EngineStartError:
            self._llm.shutdown(timeout=CLOSE_SECONDS)
            raise
        statistics.loaded(self.model)
        model = self._llm.vllm_config.model_config
        key_values_width = 2 * self.model.num_layers * self.model.num_kv_heads * self.model.head_dim
        self._loader = SoftPromptLoader(
            embedding_width=embedding_width(model),
            key_values_width=key_values_width,
            head_width=model.get_hidden_size(),
            dtype=model.dtype,
            budget_bytes=0,
        )
        self._front = Front(
            self._llm,
            self.model,
            stats=statistics.stats,
            constraints=Constraints(settings, self.model),
            read=self._loader.read,
            send=send,
        )

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when a request has found that vLLM has ended."""
        return self._front.ended

    @property
    def has_ended(self) -> bool:
        """Whether vLLM's own processes have ended."""
        return self.ended.done() or self._llm.errored

    def receive(self, message: ToEngine) -> None:
        """Handle a message other than Start and Shutdown."""
        self._front.receive(message)

    async def close(self) -> None:
        """End all requests and vLLM's processes."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._front.close(), CLOSE_SECONDS)
        self._loader.close()
        self._llm.shutdown(timeout=CLOSE_SECONDS)

    def _stepped(self, started: Sequence[str]) -> None:
        self._front.stepped(started)
