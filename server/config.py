"""One frozen tree of settings. Flags and ``PRELUDE_*`` variables fill it (server/cli.py); nothing else does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
GenerationConfigUse = Literal["auto", "none"]
LogFormat = Literal["text", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the engine process needs to know.

    Attributes:
        model: A hub id or a directory that transformers can load.
        revision: The hub revision, where ``model`` is a hub id.
        device: Where the model runs; ``auto`` takes CUDA where there is one.
        dtype: The serving dtype; ``auto`` takes the checkpoint's, or float32 on CPUs without fast products of it.
        max_model_len: Positions of one sequence, virtual tokens included; None means the model's own limit.
        max_num_seqs: Sequences that run in one step.
        max_num_batched_tokens: Tokens computed in one step; longer prompts are prefilled in chunks.
        block_size: Positions in one key/value block.
        kv_cache_memory: Bytes for keys and values; None sizes them from the memory that is free.
        enable_prefix_caching: Whether full blocks of text are kept for later sequences with the same opening.
        num_threads: CPU threads of the model's products; None takes every core.
        soft_prompt_host_bytes: Host memory that caches unused, unpinned soft prompts.
        enforce_eager: Whether decodes are launched one by one even where CUDA graphs could replay them.
        generation_config: Whether the checkpoint's ``generation_config.json`` sets defaults (``auto``), or only ends
            of sequence (``none``).
        step_timeout: Seconds after which a step is taken for stuck and the process is replaced; 0 waits for ever.
    """

    model: str
    revision: str | None = None
    device: Device = "auto"
    dtype: DType = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_memory: int | None = None
    enable_prefix_caching: bool = True
    num_threads: int | None = None
    soft_prompt_host_bytes: int = 256 * 1024 * 1024
    enforce_eager: bool = False
    generation_config: GenerationConfigUse = "auto"
    step_timeout: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """Where soft prompts are kept.

    Attributes:
        location: A directory, or the URL of an object store.
        catalog_url: Names and versions: ``postgresql://...`` or ``sqlite:///PATH``; None is SQLite in the directory.
        cache_path: Directory for local copies of an object store's blobs.
        cache_bytes: What those copies may take.
        max_upload_bytes: Largest file that an upload may hold.
        allow_other_base: Take a soft prompt whose configuration names another base than the resident one.
        allow_float64: Take float64 files, whose rows are rounded to the serving dtype.
        preload: Soft prompts (``NAME`` or ``NAME@...``) to bring onto the device when the server starts.
        pin: Soft prompts to preload, and to keep in host memory and on the local disk.
        pinned_bytes: Host memory that all pins may take; None is as much as ``soft_prompt_host_bytes``.
        tenant_pinned_bytes: What those of one tenant may take; None is half of that, and all of it without keys.
    """

    location: str = "prelude-store"
    catalog_url: str | None = None
    cache_path: Path = Path("prelude-cache")
    cache_bytes: int = 10 * 1024**3
    max_upload_bytes: int = 512 * 1024 * 1024
    allow_other_base: bool = False
    allow_float64: bool = False
    preload: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    pinned_bytes: int | None = None
    tenant_pinned_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """The HTTP front.

    Attributes:
        host: Address to bind; anything but loopback needs keys, or ``allow_open``.
        port: TCP port; 0 picks a free one.
        api_key_file: The keys: one a line, or TOML or JSON with tenants and scopes (docs/security.md). Without keys
            everybody who can connect is served.
        api_keys: Keys that need no file; each may do everything.
        allow_open: Serve everybody on an address that other machines reach.
        open_metrics: Whether ``/metrics`` needs no key, where there are keys.
        allow_origin: Origins (``scheme://host:port``) whose pages may use the server.
        allowed_host: More names that requests may name as their host, without a port; ``*`` is any. Names are looked
            at where there are no keys and only loopback is bound, and where one is given here.
        max_waiting: Requests admitted beyond those that run, before the door answers 429.
        max_wait_seconds: How long a request may wait to begin to run; 0 is without limit.
        max_body_bytes: Largest JSON body.
        max_connections: Connections that may be open at once.
        max_head_bytes: Largest request line and headers of one request.
        head_timeout: Seconds in which a request's head has to come.
        body_timeout: Seconds that may be spent waiting for a request's body; every 4 KiB that come give one back.
        stall_timeout: Seconds that an answer may lie unread before its request is ended.
        drain_seconds: How long running requests may finish after SIGTERM.
        metrics_top_prompts: Soft prompts with a metric label of their own, the most used now; others share ``other``.
        log_prompts: Whether the line that is logged for a request holds its prompts or messages.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_open: bool = False
    open_metrics: bool = False
    allow_origin: tuple[str, ...] = ()
    allowed_host: tuple[str, ...] = ()
    max_waiting: int = 1024
    max_wait_seconds: float = 0.0
    max_body_bytes: int = 8 * 1024 * 1024
    max_connections: int = 4096
    max_head_bytes: int = 64 * 1024
    head_timeout: float = 15.0
    body_timeout: float = 30.0
    stall_timeout: float = 60.0
    drain_seconds: float = 30.0
    metrics_top_prompts: int = 50
    log_prompts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a server is started with.

    Attributes:
        engine: The engine process.
        served_model_name: The base's name in the API; None takes the model's own id or directory name.
        store: The prompt store.
        http: The HTTP front.
        log_level: Python's level name.
        log_format: Text for people, or one JSON object a line.
        otlp_traces_endpoint: Where spans of requests are sent, by OTLP over HTTP; None sends none.
    """

    engine: EngineSettings
    served_model_name: str | None = None
    store: StoreSettings = field(default_factory=StoreSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    log_level: str = "INFO"
    log_format: LogFormat = "text"
    otlp_traces_endpoint: str | None = None
