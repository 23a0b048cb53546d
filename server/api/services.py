"""The services that routes use, and the state of the server."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Protocol

from fastapi import Depends
from starlette.requests import Request

from prompt_store.types import BaseModelSpec
from server.api.admission import Admission
from server.api.errors import field_path
from server.api.request_body import half_pair_in, may_have_halves
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.api.soft_prompts.warming import Warmer
from server.config import Settings
from server.continuations import Context
from server.engine.interface import Engine
from server.errors import (
    EngineDeadError,
    EngineNotReadyError,
    EngineRestartingError,
    EngineStartError,
    InvalidRequestError,
    MediaTypeError,
    ServerError,
)
from server.metrics import Metrics


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
            most: Tokens of a text beyond which it may be refused before all of it is encoded.
            field: The request's field that the texts are from.

        Raises:
            ContextLengthError: If it was.
        """
        ...

    async def encode_labels(
        self, context: Context, labels: Sequence[str], *, add_special_tokens: bool
    ) -> tuple[list[int], list[list[int]]]:
        """The tokens of labels as a text's continuation, off the event loop.

        Args:
            context: The text.
            labels: What may continue it.
            add_special_tokens: As for ``encode``; of the text alone.

        Returns:
            The tokens of the text, which may have lost the spaces at its end to the labels; and those of each label.
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
            turns: The messages as templates take them.
            tools: Tools that the template may show.
            needs_tools: Whether it has to show them.
            options: How the text ends, and variables of the template; by default an answer begins.

        Raises:
            InvalidRequestError: If the template refuses the conversation, or does not show tools that it has to.
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text; fast enough for the event loop on the few tokens of a step."""
        ...

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """The text of each token that ``skip_special_tokens`` leaves out."""
        ...

    def token_bytes(self, token_id: int, *, begins_text: bool = False) -> bytes:
        """The bytes that one token adds to a text, special tokens included; possibly part of a character.

        Args:
            token_id: Which token.
            begins_text: Whether nothing stands before it.
        """
        ...

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's own text of each token, such as ``\u0120word``; empty for ids that no token has."""
        ...

    @property
    def info(self) -> dict[str, object]:
        """Its configuration as JSON: ``tokenizer_class``, special tokens (or None), ``chat_template`` and more."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


class Phase(StrEnum):
    """The phase of the server's life."""

    LOADING = "loading"
    SERVING = "serving"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(slots=True)
class Lifecycle:
    """Whether the server serves, and why not.

    Attributes:
        phase: Where it stands.
        failure: What kept the engine from starting, when ``phase`` is ``failed``.
    """

    phase: Phase = Phase.LOADING
    failure: ServerError | None = None

    def serve(self) -> None:
        """The model is loaded (unless the server is stopping already)."""
        if self.phase is Phase.LOADING:
            self.phase = Phase.SERVING

    def fail(self, error: ServerError) -> None:
        """The engine cannot start."""
        self.phase = Phase.FAILED
        self.failure = error

    def drain(self) -> None:
        """Stop accepting requests."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING


@dataclass(slots=True, kw_only=True)
class Services:
    """The server's parts; one for each application.

    Attributes:
        settings: What it was started with.
        base_name: The base model's name in the API.
        engine: Where tokens come from.
        store: Where soft prompts are kept.
        warmer: Brings them onto the device early, and keeps the pinned ones.
        admission: The permits.
        metrics: Every measurement.
        lifecycle: Whether it serves.
        loaded_tokenizer: None until the model is loaded.
        created: When the server started, in Unix seconds.
    """

    settings: Settings
    base_name: str
    engine: Engine
    store: AsyncPromptStore
    warmer: Warmer
    admission: Admission
    metrics: Metrics
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    loaded_tokenizer: Tokenizer | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer.

        Raises:
            EngineNotReadyError: If it is not loaded yet.
        """
        if self.loaded_tokenizer is None:
            raise EngineNotReadyError("the model is still being loaded")
        return self.loaded_tokenizer

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
        """The properties that a soft prompt must match.

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
            # A directory may be a link, or "."; of a hub id, neither form has another last part.
            other_names=(source, os.path.realpath(source)),
        )

    def require_ready(self) -> None:
        """Check that new requests are accepted.

        Raises:
            EngineNotReadyError: If the model is loading, or the server drains.
            EngineStartError: If the model could not be loaded.
            EngineRestartingError: If the engine process has ended, and another does not serve yet.
            EngineDeadError: If it has ended for good.
        """
        match self.lifecycle.phase:
            case Phase.LOADING:
                raise EngineNotReadyError("the model is still being loaded")
            case Phase.DRAINING:
                raise EngineNotReadyError("the server is shutting down")
            case Phase.FAILED:
                raise EngineStartError(f"the engine could not start: {self.lifecycle.failure}")
            case Phase.SERVING:
                if self.engine.outage is not None:
                    raise EngineRestartingError(f"engine restarting: {self.engine.outage}")
                if not self.engine.is_ready:
                    raise EngineDeadError("the engine process has ended")
                if self.warmer.is_restoring:
                    raise EngineRestartingError("engine restarting: soft prompts are being reloaded")


async def get_services(request: Request) -> Services:
    """The application's services, for FastAPI's dependencies."""
    services = request.app.state.services
    if not isinstance(services, Services):
        raise TypeError("the application was not made by create_app")
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


async def require_ready(services: ServicesDep) -> None:
    """A route's dependency that refuses requests while the server does not serve."""
    services.require_ready()


async def require_json(request: Request) -> None:
    """A route's dependency that refuses bodies which are not declared as JSON.

    Browsers send other types across origins without asking; they cannot send this one.

    It refuses text that is none, too, wherever it stands: what is behind it encodes texts and need not look.

    Raises:
        MediaTypeError: If the body is not declared as JSON.
        InvalidRequestError: If it has half of a surrogate pair somewhere; the field is named.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError("the body must be JSON, with 'Content-Type: application/json'")
    # Both are at hand: FastAPI has read the body before it asks its dependencies.
    if may_have_halves(await request.body()):
        loc = half_pair_in(await request.json())
        if loc is not None:
            field = field_path(loc)
            where = field or "the body"
            raise InvalidRequestError(f"{where}: should be Unicode, without half of a surrogate pair", param=field)


async def require_json_or_nothing(request: Request) -> None:
    """A route's dependency that refuses bodies which are not declared as JSON, and takes none.

    Raises:
        MediaTypeError: If there is a body that is not declared as JSON.
    """
    if await request.body():
        await require_json(request)
