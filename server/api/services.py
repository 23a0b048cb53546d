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
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(slots=True)
class Lifecycle:
    """Whether the server serves, and why not.

    Attributes:
        phase: The current phase.
        failure: Why the engine could not start, if ``phase`` is ``failed``.
    """

    phase: Phase = Phase.LOADING
    failure: ServerError | None = None

    def serve(self) -> None:
        """Accept requests: the model is loaded. No effect if the server is stopping already."""
        if self.phase is Phase.LOADING:
            self.phase = Phase.SERVING

    def fail(self, error: ServerError) -> None:
        """Reject all requests: the engine cannot start."""
        self.phase = Phase.FAILED
        self.failure = error

    def drain(self) -> None:
        """Stop accepting requests."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING


@dataclass(slots=True, kw_only=True)
class Services:
    """The parts of the server, one set for each application.

    Attributes:
        base_name: The base model's name in the API.
        warmer: Loads soft prompts before their first request, and holds the pins.
        admission: The permits of sequences.
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
            # A directory may be a link or "."; both forms of a hub id have the same last part.
            other_names=(source, os.path.realpath(source)),
        )

    def require_ready(self) -> None:
        """Check that new requests are accepted.

        Raises:
            EngineNotReadyError: If the model is loading, or the server drains.
            EngineStartError: If the model could not be loaded.
            EngineRestartingError: If the engine process is being restarted.
            EngineDeadError: If the engine process has ended and is not restarted.
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
    """A route's dependency that rejects requests while the server does not serve."""
    services.require_ready()


async def require_json(request: Request) -> None:
    """A route's dependency that rejects bodies without the content type of JSON, and text that is not Unicode.

    Browsers send other content types across origins without a preflight request. Half surrogate pairs are rejected
    here so that later code can encode every text.

    Raises:
        MediaTypeError: If the content type is not JSON.
        InvalidRequestError: If a text has half of a surrogate pair; the message names the field.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError("the body must be JSON, with 'Content-Type: application/json'")
    # Neither call waits: FastAPI reads the body before it resolves dependencies.
    if may_have_halves(await request.body()):
        loc = half_pair_in(await request.json())
        if loc is not None:
            field = field_path(loc)
            where = field or "the body"
            raise InvalidRequestError(f"{where}: should be Unicode, without half of a surrogate pair", param=field)


async def require_json_or_nothing(request: Request) -> None:
    """A route's dependency that accepts no body, or one that ``require_json`` accepts.

    Raises:
        MediaTypeError: If there is a body whose content type is not JSON.
    """
    if await request.body():
        await require_json(request)
