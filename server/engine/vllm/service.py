"""vLLM, loaded and served: the parts of the process that need vllm."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from uuid import uuid4

import msgspec
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM

from server.config import EngineSettings
from server.engine.messages import Exposition, FromEngine, ToEngine
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.types import ModelInfo, SoftPromptSource
from server.engine.vllm.adapters.lora import Lora
from server.engine.vllm.adapters.modules import base_modules, confirmed
from server.engine.vllm.configuration import (
    check_version,
    embedding_width,
    lora_capacity,
    model_info,
    vllm_config_of,
)
from server.engine.vllm.constraints import Constraints
from server.engine.vllm.exactness import NUM_TOP, check_exactness
from server.engine.vllm.front import Front
from server.engine.vllm.sampling import one_token
from server.engine.vllm.statistics import Statistics
from server.engine.vllm.use import Role, Use
from server.errors import EngineStartError

logger = logging.getLogger(__name__)

METRICS_SECONDS = 1.0
"""Time between reports of vLLM's own metrics."""

CLOSE_SECONDS = 2.0
"""Time that vLLM's processes have to end by themselves."""


class Service:
    """A loaded model that handles messages. Create it in a running event loop, which it blocks while it loads.

    Call ``finish_start`` before anything else.

    Args:
        settings: The model and its limits.
        send: Sends a message to the server.

    Raises:
        EngineStartError: If the model cannot be served with these settings.
    """

    def __init__(self, settings: EngineSettings, send: Callable[[FromEngine], None]) -> None:
        check_version()
        self._modules = base_modules(settings) if settings.max_loras else {}
        config = vllm_config_of(settings, self._modules)
        statistics = self._statistics = Statistics(self._stepped)
        self._settings = settings
        self._reports_metrics = settings.vllm_metrics
        self._send = send
        self._front: Front | None = None
        self._is_checked = False
        try:
            self._llm = AsyncLLM.from_vllm_config(
                config, stat_loggers=[statistics.logger_factory()], disable_log_stats=True
            )
        except Exception as error:
            raise EngineStartError(
                f"vLLM cannot serve the model {settings.model!r} ({type(error).__name__}: {error})"
            ) from error
        try:
            self.model: ModelInfo = model_info(settings, self._llm.vllm_config, self._modules)
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

    async def finish_start(self) -> None:
        """Find out what adapters can change, and check that vLLM uses what the connector loads.

        Raises:
            EngineStartError: If it does not.
        """
        lora, stats = None, self._statistics.stats
        if self._modules:
            adaptable = await self._llm.collective_rpc("adaptable_modules", args=(list(self._modules),))
            modules = confirmed(self._modules, set().union(*adaptable))
            self.model = msgspec.structs.replace(self.model, modules=modules)
            capacity, max_rank = lora_capacity(self._llm.vllm_config), self._settings.max_adapter_rank
            lora = Lora(self._llm, self.model, capacity=capacity, max_rank=max_rank, stats=stats)
        self._front = Front(
            self._llm,
            self.model,
            stats=stats,
            constraints=Constraints(self._settings, self.model),
            lora=lora,
            read=self._loader.read,
            send=self._send,
        )
        await check_exactness(self._first_logprobs, self.model)
        self._is_checked = True

    async def _first_logprobs(
        self, token_ids: list[int], role: Role | None, source: SoftPromptSource
    ) -> dict[int, float]:
        """The logprobs of the first token after a text; see ``exactness.FirstLogprobs``."""
        request_id = f"check-{uuid4().hex}"
        params = one_token(Use(request_id=request_id, role=role, source=source), logprobs=NUM_TOP)
        outputs = self._llm.generate(tokens_input(token_ids, cache_salt=request_id), params, request_id)
        found: dict[int, float] = {}
        async with aclosing(outputs):
            async for output in outputs:
                (completion,) = output.outputs
                if completion.finish_reason != "error" and completion.logprobs:
                    found = {token: entry.logprob for token, entry in completion.logprobs[0].items()}
        return found

    @property
    def _started_front(self) -> Front:
        if self._front is None:
            raise AssertionError("the start has not been finished")
        return self._front

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when a request has found that vLLM has ended."""
        return self._started_front.ended

    @property
    def has_ended(self) -> bool:
        """Whether vLLM's own processes have ended."""
        return self.ended.done() or self._llm.errored

    def receive(self, message: ToEngine) -> None:
        """Handle a message other than Start and Shutdown."""
        self._started_front.receive(message)

    async def close(self) -> None:
        """End all requests and vLLM's processes."""
        if self._front is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._front.close(), CLOSE_SECONDS)
        self._loader.close()
        self._llm.shutdown(timeout=CLOSE_SECONDS)

    async def report_metrics(self) -> None:
        """Send vLLM's own metrics again and again, if the settings ask for them."""
        reported = -1
        while self._reports_metrics:
            if reported != self._statistics.stats.steps:
                reported = self._statistics.stats.steps
                self._send(Exposition(await asyncio.to_thread(self._statistics.exposition)))
            await asyncio.sleep(METRICS_SECONDS)

    def _stepped(self, started: Sequence[str], num_queued: int) -> None:
        if self._is_checked:  # before that, the server expects no reports
            self._started_front.stepped(started, num_queued)
