"""The start of an application: the engine, the tokenizer, and what is said when both are there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from prompt_store.types import StoreTotals
from server.api.keys.keys import is_loopback
from server.api.services import Services, Tokenizer
from server.config import EngineSettings
from server.engine.process.async_engine import AsyncEngine
from server.engine.process.connection import EngineConnection, launch
from server.engine.process.started_process import StartedProcess
from server.errors import EngineStartError, ServerError
from server.logs import FIELDS
from server.startup.display import StartDisplay
from server.startup.summary import Summary

logger = logging.getLogger(__name__)


def make_engine(settings: EngineSettings, display: StartDisplay, process: StartedProcess | None) -> AsyncEngine:
    """An engine that shows the stages of its start.

    Args:
        settings: The settings of the engine.
        display: Where to show the stages.
        process: Its first process; None starts one.
    """
    first = iter([process])

    def launch_next(settings: EngineSettings) -> Awaitable[EngineConnection]:
        return launch(settings, next(first, None), on_stage=display.enter)

    return AsyncEngine(settings, launch=launch_next)


async def start(services: Services, show_served: Callable[[], Awaitable[None]]) -> None:
    """Load tokenizer and model concurrently, warm soft prompts, and serve.

    If both fail, the engine's error is reported, the more precise one.

    Args:
        services: The services; their lifecycle says afterwards whether they serve.
        show_served: Called when requests are accepted.
    """
    try:
        results = await asyncio.gather(services.engine.start(), _load_tokenizer(services), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        store = services.settings.store
        await services.warmer.start(preload=store.preload, pin=store.pin)
    except ServerError as error:
        services.lifecycle.fail(error)
    except Exception as error:
        logger.exception("the engine could not start")
        services.lifecycle.fail(EngineStartError(f"{type(error).__name__}: {error}"))
    else:
        services.lifecycle.serve()
        await show_served()


async def announce(services: Services, totals: Callable[[], StoreTotals], display: StartDisplay) -> None:
    """Log and show what is served.

    Args:
        services: The services, which serve.
        totals: Counts what the store holds; blocks.
        display: Where to show it.
    """
    http = services.settings.http
    has_keys = http.api_key_file is not None or bool(http.api_keys)
    summary = Summary(
        name=services.base_name,
        model=services.engine.model,
        totals=await services.store.call(totals),
        location=services.settings.store.location,
        has_keys=has_keys,
        is_open=not has_keys and not is_loopback(http.host),
    )
    logger.info("%s is ready", services.base_name, extra={FIELDS: summary.fields})
    display.show(summary)


async def _load_tokenizer(services: Services) -> None:
    if services.loaded_tokenizer is not None:
        return

    def load() -> Tokenizer:
        # Imported here because it takes seconds, beside the start of the engine.
        from server.tokenizer import Tokenizer as BaseTokenizer  # noqa: PLC0415

        engine = services.settings.engine
        return BaseTokenizer.load(engine.model, revision=engine.revision)

    services.loaded_tokenizer = await asyncio.to_thread(load)
