"""``/v1/server`` and ``/v1/me``: what the server is, and what the caller may do."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from server.api.keys.callers import Caller, CallerDep, Scope
from server.api.keys.limits import Left
from server.api.operations import ANY_KEY, Operation
from server.api.services import Phase, Services, ServicesDep
from server.engine.types import ModelInfo
from server.errors import EngineNotReadyError

router = APIRouter(prefix="/v1", tags=["server"])

LINKS = {
    "console": "/console",
    "docs": "/console#/api",
    "openapi": "/openapi.json",
    "metrics": "/metrics",
    "ready": "/ready",
}
"""Other addresses of the server, by what is there."""


class BaseModelBody(BaseModel):
    """The base model. What is known only after loading is null until then."""

    id: str = Field(description="Its name in requests.")
    engine: str = Field(description="The engine that serves it: `native` or `vllm`.")
    architecture: str | None = Field(description="Class name in transformers.")
    dtype: str | None = Field(description="Serving dtype.")
    device: str | None = Field(description="`cpu` or `cuda`.")
    num_layers: int | None = Field(description="Decoder layers.")
    hidden_size: int | None = Field(description="Width of the hidden states.")
    embedding_width: int | None = Field(description="Width of the input embeddings, and so of a soft prompt's rows.")
    num_kv_heads: int | None = Field(description="Key/value heads per layer.")
    head_dim: int | None = Field(description="Width of a head.")
    vocab_size: int | None = Field(description="Number of tokens.")
    has_chat_template: bool | None = Field(description="Whether chats can be sent.")


class ServerLimits(BaseModel):
    """The limits of requests, for all keys."""

    max_model_len: int | None = Field(description="Tokens of a sequence, virtual ones included; null while loading.")
    max_num_seqs: int = Field(description="Sequences that run at once.")
    max_num_batched_tokens: int = Field(description="Tokens computed in one step.")
    max_waiting: int = Field(description="Sequences that may wait, besides those that run.")
    max_wait_seconds: float | None = Field(description="Seconds that a request may wait; null for no limit.")
    max_body_bytes: int = Field(description="Size of a JSON body.")
    max_upload_bytes: int = Field(description="Size of an uploaded file.")
    max_adapter_rank: int = Field(description="Rank of a LoRA adapter.")


class KVCacheBody(BaseModel):
    """The key/value cache."""

    num_blocks: int = Field(description="Number of blocks.")
    block_size: int = Field(description="Positions per block.")
    bytes: int | None = Field(description="Size of all blocks; null if the engine does not report it.")


class StoreBody(BaseModel):
    """The store of soft prompts."""

    kind: str = Field(description="`directory`, or the scheme of an object store's URL, such as `s3`.")
    catalog: str = Field(description="Database of names and versions: `sqlite` or `postgresql`.")
    is_available: bool = Field(description="Whether the catalog answers; if not, what is cached is served.")
    since: int = Field(description="Since when it answers, or does not; Unix time in seconds.")


class ServerBody(BaseModel):
    """The server."""

    object: Annotated[str, Field(description="Always `server`.")] = "server"
    version: str = Field(description="Version of Prelude.")
    started_at: int = Field(description="When the server started; Unix time in seconds.")
    phase: Phase = Field(description="What the server does now; requests are accepted while `serving`.")
    reason: str | None = Field(description="Why requests are refused; null while `serving`.")
    since: int = Field(description="When the phase began; Unix time in seconds.")
    model: BaseModelBody = Field(description="The base model.")
    limits: ServerLimits = Field(description="Limits of requests.")
    kv_cache: KVCacheBody | None = Field(description="The key/value cache; null while loading.")
    store: StoreBody = Field(description="Where soft prompts are stored.")
    has_keys: bool = Field(description="Whether requests need an API key.")
    features: list[str] = Field(description="What the engine can do with this model; empty while loading.")
    links: dict[str, str] = Field(description="Paths of other addresses of this server.")


class LimitLeft(BaseModel):
    """A limit per minute."""

    limit: int = Field(description="Amount per minute.")
    remaining: int = Field(description="What is left now.")
    reset_seconds: float = Field(description="Seconds until all of it is left again.")


class ConcurrencyLeft(BaseModel):
    """The limit of concurrent requests."""

    limit: int = Field(description="Concurrent requests.")
    remaining: int = Field(description="What is left now.")


class LimitsLeft(BaseModel):
    """The limits of a key; null where it has none."""

    requests_per_minute: LimitLeft | None = Field(description="Accepted requests.")
    tokens_per_minute: LimitLeft | None = Field(description="Prompt tokens and new tokens.")
    max_concurrency: ConcurrencyLeft | None = Field(description="Concurrent requests.")


class Me(BaseModel):
    """The sender of the request."""

    object: Annotated[str, Field(description="Always `caller`.")] = "caller"
    name: str | None = Field(description="Name of the key in the key file.")
    key: str | None = Field(description="The beginning of the key's digest, as in the history; null without keys.")
    tenant: str = Field(description="Tenant of the key; empty without keys.")
    scopes: list[Scope] = Field(description="Permissions of the key, in alphabetical order.")
    limits: LimitsLeft = Field(description="Limits of the key, and what is left of them.")


@router.get("/server")
@Operation(scopes=ANY_KEY, errors=())
async def get_server(services: ServicesDep) -> ServerBody:
    """Get the state of the server, its model and limits, in every phase, also while the model is loading."""
    settings, status, catalog = services.settings, services.status, services.store.status
    model = _model_of(services)
    http, engine, store = settings.http, settings.engine, settings.store
    return ServerBody(
        version=metadata.version("prelude-server"),
        started_at=services.created,
        phase=status.phase,
        reason=status.reason,
        since=int(status.since),
        model=_base_model(services, model),
        limits=ServerLimits(
            max_model_len=None if model is None else model.max_model_len,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_waiting=http.max_waiting,
            max_wait_seconds=http.max_wait_seconds or None,
            max_body_bytes=http.max_body_bytes,
            max_upload_bytes=store.max_upload_bytes,
            max_adapter_rank=engine.max_adapter_rank,
        ),
        kv_cache=None if model is None else _kv_cache(services, model),
        store=StoreBody(
            kind=store.location.partition("://")[0] if "://" in store.location else "directory",
            catalog="postgresql" if (store.catalog_url or "").startswith("postgres") else "sqlite",
            is_available=catalog.is_available,
            since=int(catalog.since),
        ),
        has_keys=services.has_keys,
        features=[] if model is None else sorted(model.capabilities),
        links=LINKS,
    )


@router.get("/me")
@Operation(scopes=ANY_KEY, errors=())
async def get_me(caller: CallerDep) -> Me:
    """Get the key of this request: name, tenant, scopes, and what is left of its limits."""
    return Me(
        name=caller.key_name,
        key=caller.name,
        tenant=caller.tenant,
        scopes=sorted(caller.scopes),
        limits=_limits_left(caller),
    )


def _model_of(services: Services) -> ModelInfo | None:
    try:
        return services.engine.model
    except EngineNotReadyError:
        return None


def _base_model(services: Services, model: ModelInfo | None) -> BaseModelBody:
    tokenizer = services.loaded_tokenizer
    return BaseModelBody(
        id=services.base_name,
        engine=services.settings.engine.engine,
        architecture=None if model is None else model.architecture,
        dtype=None if model is None else model.dtype,
        device=None if model is None else model.device,
        num_layers=None if model is None else model.num_layers,
        hidden_size=None if model is None else model.hidden_size or model.embedding_width,
        embedding_width=None if model is None else model.embedding_width,
        num_kv_heads=None if model is None else model.num_kv_heads,
        head_dim=None if model is None else model.head_dim,
        vocab_size=None if model is None else model.vocab_size,
        has_chat_template=None if tokenizer is None else tokenizer.has_chat_template,
    )


def _kv_cache(services: Services, model: ModelInfo) -> KVCacheBody:
    num_blocks = services.engine.stats.num_blocks or model.num_blocks
    return KVCacheBody(
        num_blocks=num_blocks, block_size=model.block_size, bytes=num_blocks * model.block_bytes or None
    )


def _limits_left(caller: Caller) -> LimitsLeft:
    left, places = caller.limiter.left, caller.limiter.places_left
    most = caller.limiter.limits.max_concurrency
    return LimitsLeft(
        requests_per_minute=_per_minute(left.get("requests")),
        tokens_per_minute=_per_minute(left.get("tokens")),
        max_concurrency=None if most is None or places is None else ConcurrencyLeft(limit=most, remaining=places),
    )


def _per_minute(left: Left | None) -> LimitLeft | None:
    if left is None:
        return None
    return LimitLeft(limit=left.limit, remaining=left.remaining, reset_seconds=round(left.reset_seconds, 3))
