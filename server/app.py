"""The composition root: build an application from settings, and serve it."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import resource
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from prompt_store.errors import PromptStoreError, StoreUnavailableError
from prompt_store.files.base_names import hub_id
from prompt_store.open_store import open_store
from prompt_store.store import PromptStore
from prompt_store.types import StoreTotals
from server.api import ops
from server.api.administration import keys as keys_routes
from server.api.admission import Admission
from server.api.batches import routes as batch_routes
from server.api.batches.runner import make_runner
from server.api.classification import routes as classify
from server.api.comparison import routes as comparison
from server.api.errors import describe
from server.api.evaluations import routes as evaluation_routes
from server.api.evaluations.runner import make_evaluation_runner
from server.api.generation import routes as openai
from server.api.http.answers import PROTECTIVE_HEADERS
from server.api.http.connections import ConnectionLimits, LimitedProtocol, limited
from server.api.http.hosts import Hosts
from server.api.http.origins import Origins
from server.api.http.refusal_log import Refusal, RefusalLog
from server.api.inference.request_record import log_request, record_of
from server.api.keys.keys import ApiKeys, KeyReloader, is_loopback, load_keys
from server.api.keys.sessions import open_sessions
from server.api.middleware_stack import middleware_stack
from server.api.monitoring import replica_routes, server_routes
from server.api.monitoring import routes as monitoring
from server.api.openapi import describe_api
from server.api.operations import ANY_KEY, Operation, Operations, matched
from server.api.prompts import edits, history, inspection, lora_routes, models, transfer, usage
from server.api.prompts import routes as prompts
from server.api.runs import routes as run_routes
from server.api.services import Lifecycle, Phase, Services, Tokenizer, get_services
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.api.soft_prompts.pin_budget import PinBudget
from server.api.soft_prompts.warming import Warmer
from server.api.tokenization import routes as tokenization
from server.config import HttpSettings, Settings, StoreSettings
from server.console import routes as console
from server.console.routes import ConsoleEntryMiddleware, Login
from server.engine.interface import Engine
from server.engine.process.started_process import StartedProcess
from server.errors import ConfigurationError, ServerError
from server.metrics.metrics import Metrics
from server.metrics.scrape import StoreState
from server.model_source import locate
from server.startup.display import StartDisplay
from server.startup.start import announce, make_engine, start
from server.tracing import RequestTracer

logger = logging.getLogger(__name__)

_REGISTRY = (prompts, comparison, inspection, edits, history, transfer, usage, lora_routes)
_MONITORING = (server_routes, replica_routes, monitoring, console, keys_routes)
_MODULES = (
    ops,
    models,
    openai,
    classify,
    tokenization,
    batch_routes,
    evaluation_routes,
    run_routes,
    *_MONITORING,
    *_REGISTRY,
)
ROUTERS = tuple(module.router for module in _MODULES)
"""Every route of the API."""

_CLOSE_SECONDS = 5
"""Seconds that connections have to send their last bytes after the drain."""

_POLL_SECONDS = 0.1

_ABORT_SECONDS = 0.3
"""Seconds that connections have to send error responses after a second signal."""

_OTHER_FILES = 512
"""Number of open files besides connections: store, log, uploads."""


def create_app(
    settings: Settings,
    *,
    engine: Engine | None = None,
    tokenizer: Tokenizer | None = None,
    store: PromptStore | None = None,
    display: StartDisplay | None = None,
    process: StartedProcess | None = None,
) -> FastAPI:
    """Build the application. Its lifespan starts the engine in the background, and stops it at the end.

    Args:
        settings: The settings of the server.
        engine: Engine to use; default: the one of ``settings``.
        tokenizer: Loaded tokenizer to use; default: the model's, loaded together with the engine.
        store: Open store to use; the caller closes it.
        display: Where to show the stages of the start; default: the log.
        process: The first process of the engine, started with the same settings; default: one is started.

    Raises:
        ConfigurationError: If the settings cannot be used: an open host without keys, an invalid key file, a missing
            model, a malformed origin or host.
        PromptStoreError: If the store cannot be opened.
    """
    keys = load_keys(settings.http)
    sessions = open_sessions(keys, settings.http.session_secret_file)
    origins = Origins(settings.http.allow_origin)
    hosts = Hosts.parse(settings.http.allowed_host, is_guarded=keys is None and is_loopback(settings.http.host))
    display = display or StartDisplay()
    if engine is None:
        settings = _located(settings)
        engine = make_engine(settings.engine, display, process)
    opened = store or _open_store(settings.store)
    metrics = Metrics(
        max_num_seqs=settings.engine.max_num_seqs,
        read_stats=lambda: engine.stats,
        read_store=lambda: _store_state(opened, settings.store.local_path),
        read_exposition=lambda: engine.exposition,
        top_prompts=settings.http.metrics_top_prompts,
    )
    async_store = AsyncPromptStore(opened)
    services = Services(
        settings=settings,
        base_name=settings.served_model_name or _default_name(settings.engine.model),
        engine=engine,
        store=async_store,
        warmer=Warmer(engine, async_store, _pin_budget(settings, has_keys=keys is not None)),
        admission=Admission(settings.engine.max_num_seqs + settings.http.max_waiting),
        batch_admission=Admission(settings.engine.max_num_seqs + settings.http.max_waiting),
        metrics=metrics,
        has_keys=keys is not None,
        loaded_tokenizer=tokenizer,
        api_keys=keys,
    )
    batches = make_runner(settings, keys)
    evaluations = make_evaluation_runner(async_store, keys, settings.engine.max_num_seqs)
    endpoint = settings.otlp_traces_endpoint
    tracer = None if endpoint is None else RequestTracer.to(endpoint)
    observers = [log_request, services.load.observe, *([] if tracer is None else [tracer.observe])]
    app = FastAPI(
        title="Prelude",
        version=metadata.version("prelude-server"),
        description="One frozen model with many soft prompts in one batch, over an OpenAI-compatible API.",
        lifespan=lambda app: _lifespan(
            services,
            [services.limiting(), services.shadowing.running(app), batches.running(app), evaluations.running(app)],
            partial(announce, services, partial(_totals, opened), display),
            owns_store=store is None,
            reloader=_reloader(settings.http, keys, services),
            tracer=tracer,
        ),
        redirect_slashes=False,
        docs_url=None,  # the console has the reference of the API, without files from other hosts
        redoc_url=None,
    )
    app.state.services = services
    app.state.batches = batches
    app.state.evaluations = evaluations
    app.state.login = Login(sessions)
    for error in (ServerError, PromptStoreError, HTTPException, RequestValidationError):
        app.add_exception_handler(error, _answer_error)
    operations = _include_routes(app)
    app.user_middleware = middleware_stack(
        services,
        operations=operations,
        observers=observers,
        origins=origins,
        hosts=hosts,
        sessions=sessions,
        entry=[Middleware(ConsoleEntryMiddleware)],
    )
    # FastAPI would document its own error format, which this server never sends.
    app.openapi = lambda: describe_api(app, operations)  # type: ignore[method-assign]
    return app


def _include_routes(app: FastAPI) -> Operations:
    """Include all routers.

    Returns:
        The operations of their routes and of FastAPI's own, which are the documentation.

    Raises:
        TypeError: If a route has no operation.
    """
    documentation = list(app.routes)
    for route in documentation:
        if isinstance(route, Route):
            Operation(scopes=ANY_KEY)(route.endpoint)
    for router in ROUTERS:
        app.include_router(router)
    return Operations([*documentation, *(route for router in ROUTERS for route in router.routes)])


def _pin_budget(settings: Settings, *, has_keys: bool) -> PinBudget:
    total, of_tenant = settings.store.pinned_bytes, settings.store.tenant_pinned_bytes
    if total is None:
        total = settings.engine.soft_prompt_host_bytes
    if of_tenant is None:
        of_tenant = total // 2 if has_keys else total
    return PinBudget(total, of_tenant)


def lifecycle_of(app: FastAPI) -> Lifecycle:
    """The lifecycle of an application."""
    return _services_of(app).lifecycle


class PreludeServer(uvicorn.Server):
    """Uvicorn with a drain: after a signal, running requests finish and new ones are answered with 503.

    Args:
        app: An application made by ``create_app``.
        settings: The settings that it was made with.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        services, http = _services_of(app), settings.http
        limits = ConnectionLimits(
            max_connections=http.max_connections,
            max_head_bytes=http.max_head_bytes,
            head_seconds=http.head_timeout,
            stall_seconds=http.stall_timeout,
            on_refused=_note_refusals(services.metrics),
            origins=Origins(http.allow_origin),
        )
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=limited(limits),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # each request has a line of our own
                server_header=False,
                headers=list(PROTECTIVE_HEADERS),
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        self._services = services
        self._drain_seconds = http.drain_seconds
        self._is_second_signal = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain; a second signal ends running requests. Unlike in uvicorn, the exit status is then 0."""
        if self.should_exit:
            self._is_second_signal = True
            signal.signal(sig, signal.SIG_DFL)  # a third signal ends the process
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Also stop if the engine could not start."""
        return await super().on_tick(counter) or self._services.lifecycle.phase is Phase.FAILED

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests finish while new ones are answered with 503, then close the server."""
        self._services.lifecycle.drain()
        logger.info(
            "draining: refusing new requests; %d sequences have up to %g s to finish",
            self._services.admission.num_in_use + self._services.batch_admission.num_in_use,
            self._drain_seconds,
        )
        ending = asyncio.create_task(self._end_on_second_signal(), name="second signal")
        try:
            await self._services.engine.drain(self._drain_seconds)
        except Exception:
            logger.exception("the engine could not drain")
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _end_on_second_signal(self) -> None:
        """After a second signal, end running requests with an error, and then all connections."""
        while not self._is_second_signal:  # noqa: ASYNC110 - set by a signal handler, which may only set a flag
            await asyncio.sleep(_POLL_SECONDS)
        logger.warning("second signal: ending running requests")
        await self._services.engine.drain(0)
        await asyncio.sleep(_ABORT_SECONDS)
        for connection in list(self.server_state.connections):
            if isinstance(connection, LimitedProtocol):
                connection.transport.abort()


def _note_refusals(metrics: Metrics) -> Callable[[Refusal], None]:
    log = RefusalLog()

    def note(refusal: Refusal) -> None:
        metrics.count_error(refusal.code)
        log.log(refusal)

    return note


def bind(http: HttpSettings) -> socket.socket:
    """Bind the server's address before anything slow is started.

    Raises:
        ConfigurationError: If it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    try:
        return socket.create_server((http.host.strip("[]"), http.port), family=family, backlog=2048)
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        reason = "another process listens there; give another --port" if is_taken else error.strerror or error
        raise ConfigurationError(f"{http.host}:{http.port} cannot be bound: {reason}") from error
    except ValueError as error:  # a malformed host name, such as one with an empty label
        raise ConfigurationError(f"{http.host}:{http.port} cannot be bound: {error}") from error


def url_of(bound: socket.socket) -> str:
    """The URL of a bound address."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(settings: Settings, display: StartDisplay | None = None, process: StartedProcess | None = None) -> None:
    """Serve until a signal, and return after the shutdown.

    Args:
        settings: The settings of the server.
        display: Where to show the stages of the start; default: the log.
        process: The first process of the engine, started with the same settings; default: one is started.

    Raises:
        ServerError: If the settings cannot be used, or the engine cannot start.
        PromptStoreError: If the store cannot be opened.
    """
    _allow_open_files(settings.http.max_connections)
    display = display or StartDisplay()
    with closing(bind(settings.http)) as bound:
        display.url = url_of(bound)
        app = create_app(settings, display=display, process=process)
        freeze_loaded_objects()
        logger.info("loading %s; listening on %s", settings.engine.model, url_of(bound))
        PreludeServer(app, settings).run(sockets=[bound])
    failure = lifecycle_of(app).failure
    if failure is not None:
        raise failure


def freeze_loaded_objects() -> None:
    """Exclude loaded objects from garbage collection, which would block the event loop."""
    gc.collect()
    gc.freeze()


def _allow_open_files(max_connections: int) -> None:
    """Raise the soft limit of open files for this number of connections, up to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        if allowed < needed:
            logger.warning(
                "%d open files are allowed, which is too few for --max-connections %d", allowed, max_connections
            )


@asynccontextmanager
async def _lifespan(
    services: Services,
    background: Sequence[AbstractAsyncContextManager[None]],
    show_served: Callable[[], Awaitable[None]],
    *,
    owns_store: bool,
    reloader: KeyReloader | None,
    tracer: RequestTracer | None,
) -> AsyncIterator[None]:
    starting = asyncio.create_task(start(services, show_served), name="start")
    loop = asyncio.get_running_loop()

    def notify(names: set[str] | None) -> None:
        with suppress(RuntimeError):  # the loop has ended; the store will be closed
            loop.call_soon_threadsafe(services.warmer.changed, names)
            loop.call_soon_threadsafe(services.catalog_changes.note, names)

    services.store.subscribe(notify)
    services.engine.subscribe(services.warmer.restore)
    services.engine.subscribe(lambda: services.load.mark("restart"))
    async with AsyncExitStack() as stack:
        if tracer is not None:
            stack.push_async_callback(asyncio.to_thread, tracer.close)
        if reloader is not None:
            await stack.enter_async_context(reloader.running())
        await stack.enter_async_context(services.usage.running())
        await stack.enter_async_context(services.load.running(lambda: services.engine.stats))
        stack.push_async_callback(_stop, services, starting, owns_store=owns_store)
        for work in background:
            await stack.enter_async_context(work)
        yield


async def _stop(services: Services, starting: asyncio.Task[None], *, owns_store: bool) -> None:
    services.lifecycle.drain()
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await services.warmer.close()
    await services.engine.stop()
    if services.loaded_tokenizer is not None:
        await asyncio.to_thread(services.loaded_tokenizer.close)
    await services.usage.flush()
    await asyncio.to_thread(services.store.close, close_store=owns_store)


def _reloader(http: HttpSettings, keys: ApiKeys | None, services: Services) -> KeyReloader | None:
    """The reloader of the key file; None without a file."""
    if keys is None or http.api_key_file is None:
        return None
    return KeyReloader(http, keys, services.metrics, lambda: services.load.mark("keys_reloaded"))


async def _answer_error(request: Request, error: Exception) -> Response:
    reply = describe(error, request_id=request.state.request_id)
    record_of(request).error = reply.code
    if not matched(request.scope).is_open:  # a probe that finds the server loading is no failed request
        (await get_services(request)).metrics.count_error(reply.code)
    return reply.response()


def _services_of(app: FastAPI) -> Services:
    services = app.state.services
    if not isinstance(services, Services):
        raise TypeError("the application was not made by create_app")
    return services


def _located(settings: Settings) -> Settings:
    """The settings with the model located, after a quick check that it exists."""
    engine = settings.engine
    return replace(settings, engine=replace(engine, model=locate(engine.model, engine.revision)))


def _open_store(settings: StoreSettings) -> PromptStore:
    return open_store(
        settings.location,
        catalog_url=settings.catalog_url,
        cache_path=settings.cache_path,
        cache_bytes=settings.cache_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        retention_seconds=settings.retention_days * 86400,
    )


def _store_state(store: PromptStore, path: Path) -> StoreState:
    free = shutil.disk_usage(path).free if path.is_dir() else 0
    return StoreState(_totals(store), store.tier_stats(), store.status.is_available, free)


def _totals(store: PromptStore) -> StoreTotals:
    try:
        return store.totals()
    except StoreUnavailableError:  # unavailable since the last check; the scrape still reports all other metrics
        return StoreTotals()


def _default_name(model: str) -> str:
    """The default name of a model: its hub id, also for a directory of the hub's cache, or the directory's name."""
    path = Path(model)
    if not path.is_dir():
        return model
    resolved = path.resolve()
    return hub_id(str(resolved)) or resolved.name
