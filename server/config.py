"""The settings of a server, set by flags and ``PRELUDE_*`` variables only (server/cli.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
GenerationConfigUse = Literal["auto", "none"]
EngineName = Literal["native", "vllm"]
LogFormat = Literal["text", "json"]

VLLM_VERSION = "0.32"
"""The minor version of vLLM that its connector is tested with. Its interfaces differ between minor versions."""

GPU_MEMORY_UTILIZATION = 0.9
"""Default of ``EngineSettings.gpu_memory_utilization``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of the engine process; sizes are in bytes, times in seconds.

    Attributes:
        model: Hub id, or a directory that transformers can load.
        device: Device of the model; ``auto`` uses CUDA if available.
        dtype: Serving dtype; ``auto`` uses the checkpoint's, or float32 on CPUs that are slow at it.
        max_model_len: Maximum length of a sequence, including virtual tokens; None: the model's limit.
        max_num_seqs: Maximum number of sequences in one step.
        max_num_batched_tokens: Maximum number of tokens in one step; longer prompts are prefilled in chunks.
        block_size: Number of positions in one key/value block.
        kv_cache_memory: Size of the key/value cache; None: what ``gpu_memory_utilization`` leaves, or a part of the
            free memory on CPUs.
        gpu_memory_utilization: Fraction of a GPU's memory that may be in use, in (0, 1]; of each of vLLM's devices.
        enable_prefix_caching: Whether to keep full blocks of text for later sequences with the same beginning.
        num_threads: CPU threads for the model; None: all cores.
        soft_prompt_host_bytes: Host memory that caches unused, unpinned soft prompts.
        adapter_host_bytes: Host memory for LoRA adapters, in use or not; requests wait for room.
        adapter_device_bytes: Memory of a GPU for adapters, besides that of keys and values.
        max_adapter_rank: Largest rank of an adapter.
        enforce_eager: Whether to run decode steps without CUDA graphs.
        generation_config: ``auto``: the checkpoint's ``generation_config.json`` sets defaults. ``none``: it only
            sets the end-of-sequence tokens.
        step_timeout: Time after which a step counts as hung and the process is restarted; 0: never.
        engine: Which engine serves the model. What follows is for vLLM only.
        engine_python: Interpreter of an environment with vLLM.
        tensor_parallel_size: Number of devices that share each layer.
        pipeline_parallel_size: Number of groups of devices that have different layers.
        quantization: vLLM's name of a quantisation; None: the checkpoint's.
        engine_args: JSON object of further arguments of vLLM's engine.
        max_loras: Adapters that may be loaded at once, each with memory for ``max_adapter_rank``; 0: none are served.
        vllm_metrics: Whether ``/metrics`` has vLLM's own metrics, too.
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
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    enable_prefix_caching: bool = True
    num_threads: int | None = None
    soft_prompt_host_bytes: int = 256 * 1024 * 1024
    adapter_host_bytes: int = 1024 * 1024 * 1024
    adapter_device_bytes: int = 1024 * 1024 * 1024
    max_adapter_rank: int = 256
    enforce_eager: bool = False
    generation_config: GenerationConfigUse = "auto"
    step_timeout: float = 120.0
    engine: EngineName = "native"
    engine_python: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: str | None = None
    engine_args: str | None = None
    max_loras: int = 0
    vllm_metrics: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """Settings of the prompt store; sizes are in bytes.

    Attributes:
        location: A directory, or the URL of an object store.
        catalog_url: Catalog database, ``postgresql://...`` or ``sqlite:///PATH``; None: SQLite in the directory.
        cache_path: Directory for local copies of an object store's blobs.
        cache_bytes: Maximum size of the local copies.
        max_upload_bytes: Maximum size of an uploaded file.
        retention_days: How long deleted versions can be restored, in days; 0: never.
        base_alias: Further names of the base model, for the configurations of soft prompts.
        allow_other_base: Whether to accept soft prompts whose configuration names another base model.
        allow_float64: Whether to accept float64 files; they are rounded to the serving dtype.
        adapter_dir: Directory from which clients may load adapters by path; None: no client may.
        preload: Soft prompts and adapters (``NAME`` or ``NAME@...``) to load onto the device at startup.
        pin: Soft prompts and adapters to preload, and to keep in host memory and on the local disk.
        pinned_bytes: Host memory for all pins; None: the same as ``soft_prompt_host_bytes``.
        tenant_pinned_bytes: Host memory for the pins of one tenant; None: half of ``pinned_bytes``, or all of it
            without API keys.
    """

    location: str = "prelude-store"
    catalog_url: str | None = None
    cache_path: Path = Path("prelude-cache")
    cache_bytes: int = 10 * 1024**3
    max_upload_bytes: int = 1024 * 1024 * 1024
    retention_days: float = 7.0
    base_alias: tuple[str, ...] = ()
    allow_other_base: bool = False
    allow_float64: bool = False
    adapter_dir: Path | None = None
    preload: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    pinned_bytes: int | None = None
    tenant_pinned_bytes: int | None = None

    @property
    def local_path(self) -> Path:
        """The directory on this server's disk: the store itself, or the local copies of an object store."""
        return self.cache_path if "://" in self.location else Path(self.location)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """Settings of the HTTP server; sizes are in bytes, times in seconds.

    Attributes:
        host: Address to bind; anything but loopback needs keys, an ingress, or ``allow_open``.
        port: TCP port; 0 picks a free one.
        api_key_file: API keys: one per line, or TOML or JSON with tenants and scopes (docs/security.md). Without keys
            every client is served.
        api_keys: API keys without a file; each has all permissions.
        session_secret_file: A secret of at least 32 bytes, the same on all servers behind one address; the console's
            sessions are then valid on all of them. None: each server keeps its sessions.
        ingress_secret_file: A secret of at least 32 bytes, shared with the ingress of a cluster: only requests that
            the ingress has signed are served. None: the server is no replica of a cluster.
        allow_open: Whether to serve without keys on an address that other machines can reach.
        open_metrics: Whether ``/metrics`` needs no key.
        allow_origin: Origins (``scheme://host:port``) whose pages may call the server.
        allowed_host: Additional names accepted in the Host header, without a port; ``*`` is any. The header is
            checked if a name is given here, or if there are no keys and only loopback is bound.
        max_waiting: Maximum number of waiting sequences; more are answered with 429.
        max_wait_seconds: Maximum time in the queue; 0: no limit.
        max_body_bytes: Maximum size of a JSON body.
        max_connections: Maximum number of open connections.
        max_head_bytes: Maximum size of the request line and headers.
        head_timeout: Time to wait for the request line and headers.
        body_timeout: Time to wait for a request body; extended by one second per 4 KiB received.
        stall_timeout: Time before a client that does not read its response is disconnected.
        drain_seconds: Time that running requests have to finish after SIGTERM.
        metrics_top_prompts: Number of soft prompts with a separate metric label; all others share ``other``.
        log_prompts: Whether to include prompts or messages in the log line of a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    session_secret_file: Path | None = None
    ingress_secret_file: Path | None = None
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
    """All settings of a server.

    Attributes:
        served_model_name: Name of the base model in the API; None: its hub id or directory name.
        log_level: Python's level name.
        log_format: ``text``, or ``json`` for one JSON object per line.
        otlp_traces_endpoint: URL for OTLP traces over HTTP; None sends none.
        replica_name: Name of this server among the replicas of a cluster, in its log; None: it has none.
    """

    engine: EngineSettings
    served_model_name: str | None = None
    store: StoreSettings = field(default_factory=StoreSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    log_level: str = "INFO"
    log_format: LogFormat = "text"
    otlp_traces_endpoint: str | None = None
    replica_name: str | None = None
