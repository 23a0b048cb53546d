"""The services that routes use, and the state of the server."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Protocol

from fastapi import Depends
from starlette.requests import Request

from prompt_store.adapters import AdapterLimits
from prompt_store.types import BaseModelSpec
from server.api.admission import Admission
from server.api.keys.keys import ApiKeys
from server.api.keys.limit_exchange import LimitExchange
from server.api.live.engine_body import ShownPictures
from server.api.live.live_names import LiveNames
from server.api.load import Load
from server.api.shadowing import Shadowing
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.api.soft_prompts.catalog_changes import CatalogChanges
from server.api.soft_prompts.usage_counter import UsageCounter
from server.api.soft_prompts.warming import Warmer
from server.config import Settings
from server.continuations import Context
from server.engine.interface import Engine
from server.errors import (
    EngineDeadError,
    EngineNotReadyError,
    EngineRestartingError,
    EngineStartError,
    ServerError,
)
from server.metrics.metrics import Metrics


class Tokenizer(Protocol):
    """The base model's tokenizer as the API needs it."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the model came with a chat template."""
        ...

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, most: int | None = None, field: str = "prompt"
    ) -> list[list[int]]:
        """Texts to token ids, off the event loop.

        Args:
            texts: What to encode.
            add_special_tokens: Whether to add what the model expects around a text.
            most: Maximum number of tokens of a text; a longer one may be refused before all of it is encoded.
            field: The request field that the texts are from.

        Raises:
            ContextLengthError: If a text was refused.
        """
        ...

    async def encode_labels(
        self, context: Context, labels: Sequence[str], *, add_special_tokens: bool
    ) -> tuple[list[int], list[list[int]]]:
        """The tokens of labels as a text's continuation, off the event loop.

        Args:
            context: The text.
            labels: The labels.
            add_special_tokens: As for ``encode``, for the text alone.

        Returns:
            The tokens of the text, without spaces at its end that became part of the labels; and those of each label.
        """
        ...

    async def render_chat(
        self,
        turns: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        needs_tools: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Format a conversation with the model's template.

        Args:
            turns: The messages in the template's format.
            tools: Tools that the template may show.
            needs_tools: Whether it must show them.
            options: The end of the text, and variables of the template; by default an answer begins.

        Raises:
            InvalidRequestError: If the template rejects the conversation, or does not show tools that it must show.
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text; fast enough for the event loop on the few tokens of a step."""
        ...

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """The text of each token that ``skip_special_tokens`` omits."""
        ...

    def token_bytes(self, token_id: int, *, begins_text: bool = False) -> bytes:
        """The bytes that one token adds to a text, special tokens included; possibly part of a character.

        Args:
            token_id: The token.
            begins_text: Whether it is the first of its text.
        """
        ...

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary entry of each token, such as ``\u0120word``; empty for ids without a token."""
        ...

    @property
    def info(self) -> dict[str, object]:
        """Its configuration as JSON: ``tokenizer_class``, special tokens (or None), ``chat_template`` and more."""
        ...

    def close(self) -> None:
        """Stop its threads."""
        ...


class Phase(StrEnum):
    """The phase of the server's life."""

    LOADING = "loading"
    SERVING = "serving"
    RESTARTING = "restarting"
    """Only of a ``Status``: the engine is being restarted, or soft prompts reloaded after that."""
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Status:
    """Whether requests are accepted.

    Attributes:
        phase: The phase, in which restarts of the engine count.
        since: Unix time in seconds at which it began.
        reason: Why requests are refused; None while they are accepted.
    """

    phase: Phase
    since: float
    reason: str | None = None


@dataclass(slots=True)
class Lifecycle:
    """Whether the server serves, and why not.

    Attributes:
        phase: The current phase.
        failure: Why the engine could not start, if ``phase`` is ``failed``.
        since: Unix time in seconds at which the phase began.
    """

    phase: Phase = Phase.LOADING
    failure: ServerError | None = None
    since: float = field(default_factory=time.time)

    def serve(self) -> None:
        """Accept requests: the model is loaded. No effect if the server is stopping already."""
        if self.phase is Phase.LOADING:
            self._enter(Phase.SERVING)

    def fail(self, error: ServerError) -> None:
        """Reject all requests: the engine cannot start."""
        self._enter(Phase.FAILED)
        self.failure = error

    def drain(self) -> None:
        """Stop accepting requests."""
        if self.phase not in (Phase.FAILED, Phase.DRAINING):
            self._enter(Phase.DRAINING)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = time.time()


@dataclass(slots=True, kw_only=True)
class Services:
    """The parts of the server, one set for each application.

    Attributes:
        base_name: The base model's name in the API.
        warmer: Loads soft prompts before their first request, and holds the pins.
        admission: The permits of sequences.
        batch_admission: Those of the service tier ``batch``.
        has_keys: Whether requests need an API key.
        usage: Counts the use of versions.
        names: What the sequences in flight and the soft prompts on the device are called.
        shown_pictures: What was shown of the newest picture of the batch.
        load: The load of the last hour.
        catalog_changes: Names that have changed.
        num_subscribers: Clients of ``/v1/events``.
        shadowing: Sends copies of requests to shadow versions.
        loaded_tokenizer: None until the model is loaded.
        api_keys: The accepted API keys; None if there are none.
        created: When the server started, in Unix seconds.
    """

    settings: Settings
    base_name: str
    engine: Engine
    store: AsyncPromptStore
    warmer: Warmer
    admission: Admission
    batch_admission: Admission
    metrics: Metrics
    has_keys: bool = False
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    loaded_tokenizer: Tokenizer | None = None
    usage: UsageCounter = field(init=False)
    names: LiveNames = field(default_factory=LiveNames)
    shown_pictures: ShownPictures = field(default_factory=ShownPictures)
    load: Load = field(default_factory=Load)
    catalog_changes: CatalogChanges = field(default_factory=CatalogChanges)
    num_subscribers: int = 0
    shadowing: Shadowing = field(init=False)
    api_keys: ApiKeys | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.usage = UsageCounter(self.store)
        self.warmer.on_warmed = self.names.know
        self.shadowing = Shadowing(self.metrics, is_crowded=lambda: self.engine.stats.num_waiting > 0)

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer.

        Raises:
            EngineNotReadyError: If it is not loaded yet.
        """
        if self.loaded_tokenizer is None:
            raise EngineNotReadyError("the model is still being loaded")
        return self.loaded_tokenizer

    def limiting(self) -> AbstractAsyncContextManager[None]:
        """A block in which the limits of keys hold for all servers that share the catalog."""
        shared, keys = self.store.shared_limits, self.api_keys
        if shared is None or keys is None:
            return nullcontext()
        return LimitExchange(shared, self.store.call, keys, self.metrics).running()

    def admission_of(self, *, is_batch: bool) -> Admission:
        """The permits of a service tier."""
        return self.batch_admission if is_batch else self.admission

    def max_wait(self, requested: float | None) -> float | None:
        """Seconds that a request may wait in the queue: its timeout or the server's limit, the shorter.

        Args:
            requested: The request's timeout; None if it sets none.

        Returns:
            None if there is no limit.
        """
        limit = self.settings.http.max_wait_seconds
        return requested if not limit else limit if requested is None else min(requested, limit)

    @property
    def base_spec(self) -> BaseModelSpec:
        """The properties that a soft prompt or an adapter must match.

        Raises:
            EngineNotReadyError: If the model is not loaded yet.
        """
        model, source = self.engine.model, self.settings.engine.model
        return BaseModelSpec(
            name=self.base_name,
            embedding_width=model.embedding_width,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            max_model_len=model.max_model_len,
            dtype=model.dtype,
            hidden_size=model.hidden_size,
            # A directory may be a link or "."; both forms of a hub id have the same last part.
            other_names=(source, os.path.realpath(source), *self.settings.store.base_alias),
            modules=model.modules,
            adapters_off=model.adapters_off,
            adapter_parts=model.adapter_parts,
            digests=model.base_digests,
        )

    @property
    def adapter_limits(self) -> AdapterLimits:
        """The largest rank and size of an adapter; EngineNotReadyError if the model is not loaded yet."""
        settings = self.settings.engine
        is_on_gpu = self.engine.model.device.startswith("cuda")
        max_bytes = min(settings.adapter_host_bytes, settings.adapter_device_bytes if is_on_gpu else sys.maxsize)
        return AdapterLimits(settings.max_adapter_rank, max_bytes)

    @property
    def status(self) -> Status:
        """Whether new requests are accepted, since when, and why not."""
        lifecycle, engine = self.lifecycle, self.engine
        match lifecycle.phase:
            case Phase.LOADING:
                return Status(Phase.LOADING, lifecycle.since, "the model is still being loaded")
            case Phase.DRAINING:
                return Status(Phase.DRAINING, lifecycle.since, "the server is shutting down")
            case Phase.FAILED:
                return Status(Phase.FAILED, lifecycle.since, f"the engine could not start: {lifecycle.failure}")
        since = max(lifecycle.since, engine.since)
        if engine.outage is not None:
            return Status(Phase.RESTARTING, since, f"engine restarting: {engine.outage}")
        if not engine.is_ready:
            return Status(Phase.FAILED, since, "the engine process has ended")
        if self.warmer.is_restoring:
            return Status(Phase.RESTARTING, since, "engine restarting: soft prompts are being reloaded")
        return Status(Phase.SERVING, since)

    def require_ready(self) -> None:
        """Check that new requests are accepted.

        Raises:
            EngineNotReadyError: If the model is loading, or the server drains.
            EngineStartError: If the model could not be loaded.
            EngineRestartingError: If the engine process is being restarted.
            EngineDeadError: If the engine process has ended and is not restarted.
        """
        status = self.status
        if status.reason is None:
            return
        match status.phase:
            case Phase.RESTARTING:
                raise EngineRestartingError(status.reason)
            case Phase.FAILED:
                is_started = self.lifecycle.phase is not Phase.FAILED
                raise (EngineDeadError if is_started else EngineStartError)(status.reason)
            case _:
                raise EngineNotReadyError(status.reason)


async def get_services(request: Request) -> Services:
    """The application's services, for FastAPI's dependencies."""
    services = request.app.state.services
    if not isinstance(services, Services):
        raise TypeError("the application was not made by create_app")
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


async def require_ready(services: ServicesDep) -> None:
    """A route's dependency that rejects requests while the server does not serve."""
    services.require_ready()
