"""The ``prelude`` command: ``serve``, ``demo`` and ``key``, and the client commands."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from prompt_store.errors import PromptStoreError
from prompt_store.types import PromptRef
from server import logs
from server.client import commands, console_page
from server.client.bulk import command as bulk
from server.client.evaluation import command as evaluation
from server.client.importers import command as importers
from server.client.registry import canary, edit, history, prune, transfer
from server.cluster import command as cluster
from server.command_line import store_commands
from server.command_line.flags import Flag, GroupedHelp, parse_bytes, parse_fraction, with_flags
from server.command_line.starting import OWN_PROCESS, real_exhibit, started_early, terminal_for_log
from server.config import (
    Device,
    DType,
    EngineName,
    EngineSettings,
    GenerationConfigUse,
    HttpSettings,
    LogFormat,
    Settings,
    StoreSettings,
)
from server.demo import DEMO_MODEL, DEMO_NAME, EMBEDDED
from server.demo.real.model import REAL_NAME
from server.doctor import command as doctor
from server.errors import ServerError
from server.startup.display import StartDisplay
from server.training import command as training

app = typer.Typer(
    name="prelude",
    help="Serve one frozen language model with many hot-swappable soft prompts.",
    epilog=commands.EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

logger = logging.getLogger(__name__)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Errors of a full or failed output device. A closed pipe is handled by typer."""

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


def _flag(section: type, field: str, type_: Any, text: str, *, name: str | None = None, **options: Any) -> Flag:
    return Flag(section, field, type_, text, options, name or field)


def parse_names(text: str | tuple[str, ...]) -> tuple[str, ...]:
    """Parse comma-separated references to soft prompts.

    Raises:
        typer.BadParameter: If one is malformed.
    """
    if isinstance(text, tuple):
        return text
    names = tuple(name for part in text.split(",") if (name := part.strip()))
    for name in names:
        try:
            PromptRef.parse(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return names


def parse_keys(text: str | tuple[str, ...]) -> tuple[str, ...]:
    """Parse comma-separated API keys."""
    return text if isinstance(text, tuple) else tuple(key for part in text.split(",") if (key := part.strip()))


def parse_list(text: str) -> tuple[str, ...]:
    """Parse the comma-separated values of a repeatable flag."""
    return tuple(value for part in text.split(",") if (value := part.strip()))


_NAMES: dict[str, Any] = {"parser": parse_names, "metavar": "NAME[@V],..."}
_KEYS: dict[str, Any] = {"parser": parse_keys, "metavar": "KEY,..."}
_BYTES: dict[str, Any] = {"parser": parse_bytes, "metavar": "BYTES"}

FLAGS = (
    _flag(EngineSettings, "model", str, "Hub id, or a directory that transformers can load."),
    _flag(EngineSettings, "revision", str | None, "Hub revision of the model."),
    _flag(
        Settings,
        "served_model_name",
        str | None,
        "Name of the model in the API; default: its hub id or directory name.",
    ),
    _flag(EngineSettings, "device", Device, "Device to run the model on; auto uses CUDA if available."),
    _flag(
        EngineSettings,
        "dtype",
        DType,
        "Serving dtype; auto uses the checkpoint's if the device is fast at it.",
    ),
    _flag(HttpSettings, "host", str, "Address to bind; anything but loopback needs keys."),
    _flag(HttpSettings, "port", int, "TCP port; 0 picks a free one.", min=0, max=65535),
    _flag(
        StoreSettings,
        "location",
        str,
        "Where soft prompts are stored: a directory, or s3://, gs:// or az://.",
        name="store",
    ),
    _flag(
        StoreSettings,
        "catalog_url",
        str | None,
        "Database of names and versions: postgresql://... or sqlite:///PATH; default: SQLite in the store.",
        name="catalog",
    ),
    _flag(StoreSettings, "cache_path", Path, "Directory for local copies of an object store's files.", name="cache"),
    _flag(StoreSettings, "cache_bytes", int, "Maximum size of the local copies.", **_BYTES),
    _flag(StoreSettings, "max_upload_bytes", int, "Maximum size of one uploaded file.", **_BYTES),
    _flag(
        StoreSettings,
        "retention_days",
        float,
        "Days for which deleted versions can be restored and keep their files; 0: none.",
        min=0.0,
    ),
    _flag(
        StoreSettings,
        "base_alias",
        list[Any],
        "Further name of the base model in configurations of soft prompts; repeatable.",
        parser=parse_list,
        metavar="NAME",
    ),
    _flag(
        StoreSettings, "allow_other_base", bool, "Accept soft prompts whose configuration names another base model."
    ),
    _flag(
        StoreSettings, "allow_float64", bool, "Accept float64 soft prompts; they are rounded to the serving dtype."
    ),
    _flag(
        StoreSettings,
        "adapter_dir",
        Path | None,
        "Let clients load adapters from this directory by path (POST /v1/load_lora_adapter); default: off.",
    ),
    _flag(StoreSettings, "preload", tuple, "Soft prompts and adapters to load onto the device at startup.", **_NAMES),
    _flag(
        StoreSettings,
        "pin",
        tuple,
        "Soft prompts and adapters to preload and to keep in host memory at all times.",
        **_NAMES,
    ),
    _flag(
        StoreSettings,
        "pinned_bytes",
        int | None,
        "Host memory for all pins; default: the same as --soft-prompt-host-memory.",
        name="pinned_memory",
        **_BYTES,
    ),
    _flag(
        StoreSettings,
        "tenant_pinned_bytes",
        int | None,
        "Host memory for the pins of one tenant; default: half of --pinned-memory.",
        name="pinned_memory_per_tenant",
        **_BYTES,
    ),
    _flag(
        EngineSettings, "max_model_len", int | None, "Maximum length of a sequence, virtual tokens included.", min=1
    ),
    _flag(EngineSettings, "max_num_seqs", int, "Maximum number of sequences in one step.", min=1),
    _flag(EngineSettings, "max_num_batched_tokens", int, "Maximum number of tokens computed in one step.", min=1),
    _flag(EngineSettings, "block_size", int, "Number of positions in one key/value block.", min=1),
    _flag(
        EngineSettings,
        "kv_cache_memory",
        int | None,
        "Memory for keys and values; default: see --gpu-memory-utilization, or 40% of the free memory on CPUs.",
        **_BYTES,
    ),
    _flag(
        EngineSettings,
        "gpu_memory_utilization",
        float,
        "Fraction of the GPU's memory that may be in use; keys and values take what the largest step leaves.",
        parser=parse_fraction,
        metavar="FRACTION",
    ),
    _flag(
        EngineSettings,
        "soft_prompt_host_bytes",
        int,
        "Host memory that caches soft prompts between requests.",
        name="soft_prompt_host_memory",
        **_BYTES,
    ),
    _flag(
        EngineSettings,
        "adapter_host_bytes",
        int,
        "Host memory for LoRA adapters, in use or not; requests whose adapter has no room wait.",
        name="adapter_host_memory",
        **_BYTES,
    ),
    _flag(
        EngineSettings,
        "adapter_device_bytes",
        int,
        "Memory of a GPU for LoRA adapters; keys and values get the rest.",
        name="adapter_device_memory",
        **_BYTES,
    ),
    _flag(EngineSettings, "max_adapter_rank", int, "Largest rank of a LoRA adapter.", min=1),
    _flag(
        EngineSettings,
        "enable_prefix_caching",
        bool,
        "Reuse the keys and values of a text's beginning for later texts that begin alike.",
    ),
    _flag(EngineSettings, "num_threads", int | None, "CPU threads for the model; default: all cores.", min=1),
    _flag(
        EngineSettings,
        "generation_config",
        GenerationConfigUse,
        "auto: take request defaults from the checkpoint's generation_config.json; none: ignore them.",
    ),
    _flag(EngineSettings, "enforce_eager", bool, "Do not use CUDA graphs for decode steps."),
    _flag(
        EngineSettings,
        "step_timeout",
        float,
        "Seconds before a hung step is killed and the engine restarted; 0: never.",
        min=0.0,
    ),
    _flag(EngineSettings, "engine", EngineName, "native: every feature, on one device; vllm: many GPUs."),
    _flag(EngineSettings, "engine_python", str | None, "Interpreter of an environment with vLLM, for --engine vllm."),
    _flag(
        EngineSettings, "tensor_parallel_size", int, "Number of devices that share each layer; engine vllm.", min=1
    ),
    _flag(
        EngineSettings,
        "pipeline_parallel_size",
        int,
        "Number of groups of devices with different layers; engine vllm.",
        min=1,
    ),
    _flag(EngineSettings, "quantization", str | None, "vLLM's name of a quantisation; default: the checkpoint's."),
    _flag(EngineSettings, "engine_args", str | None, "JSON object of further arguments of vLLM's engine."),
    _flag(EngineSettings, "max_loras", int, "LoRA adapters loaded at once, for --engine vllm; 0: none.", min=0),
    _flag(EngineSettings, "vllm_metrics", bool, "Add vLLM's own metrics to /metrics, under their names."),
    _flag(
        HttpSettings,
        "api_key_file",
        Path | None,
        "File of API keys: one per line, or *.toml or *.json with tenants and scopes.",
    ),
    _flag(
        HttpSettings,
        "api_keys",
        tuple,
        "API keys without a file; set the variable to hide them from process lists.",
        **_KEYS,
    ),
    _flag(
        HttpSettings,
        "session_secret_file",
        Path | None,
        "File with a secret that makes logins of the console valid on all servers that have it.",
    ),
    _flag(
        HttpSettings,
        "ingress_secret_file",
        Path | None,
        "File with the secret of a cluster's ingress; only requests that it has signed are served.",
    ),
    _flag(HttpSettings, "allow_open", bool, "Serve without API keys on an address that other machines can reach."),
    _flag(HttpSettings, "open_metrics", bool, "Serve /metrics without an API key."),
    _flag(
        HttpSettings,
        "allow_origin",
        list[Any],
        "Web origin whose pages may call the server; repeatable.",
        parser=parse_list,
        metavar="URL",
    ),
    _flag(
        HttpSettings,
        "allowed_host",
        list[Any],
        "Additional host name accepted in the Host header; repeatable.",
        parser=parse_list,
        metavar="NAME",
    ),
    _flag(
        HttpSettings, "max_waiting", int, "Maximum number of waiting sequences; more are answered with 429.", min=0
    ),
    _flag(HttpSettings, "max_wait_seconds", float, "Maximum time in the queue before a 503; 0: no limit.", min=0.0),
    _flag(HttpSettings, "max_body_bytes", int, "Maximum size of a JSON body.", **_BYTES),
    _flag(HttpSettings, "max_connections", int, "Maximum number of open connections.", min=1),
    _flag(HttpSettings, "max_head_bytes", int, "Maximum size of the request line and headers.", **_BYTES),
    _flag(HttpSettings, "head_timeout", float, "Seconds to wait for the request line and headers.", min=0.1),
    _flag(
        HttpSettings,
        "body_timeout",
        float,
        "Seconds to wait for a request body; extended by one second per 4 KiB received.",
        min=0.1,
    ),
    _flag(
        HttpSettings,
        "stall_timeout",
        float,
        "Seconds before a client that does not read its response is disconnected.",
        min=0.1,
    ),
    _flag(
        HttpSettings, "drain_seconds", float, "Seconds that running requests have to finish after SIGTERM.", min=0.0
    ),
    _flag(HttpSettings, "metrics_top_prompts", int, "Number of soft prompts with a separate metric label.", min=0),
    _flag(Settings, "log_level", LogLevel, "Minimum level of log lines; they go to standard error."),
    _flag(Settings, "log_format", LogFormat, "text for people, or json for one JSON object per line."),
    _flag(HttpSettings, "log_prompts", bool, "Include each request's prompts or messages in the log."),
    _flag(
        Settings, "otlp_traces_endpoint", str | None, "URL to send OTLP traces to, over HTTP; they contain no text."
    ),
    _flag(Settings, "replica_name", str | None, "Name of this server among the replicas of a cluster, in its log."),
)
"""All flags of ``serve``."""


def settings_from(values: dict[str, Any]) -> Settings:
    """Fill the settings tree from parsed flags."""
    by_section: dict[type, dict[str, Any]] = {}
    for flag in FLAGS:
        value = values[flag.name]
        if isinstance(value, list):  # a repeatable flag, each occurrence with several values
            value = tuple(item for part in value for item in part)
        by_section.setdefault(flag.section, {})[flag.field] = value
    return Settings(
        engine=EngineSettings(**by_section[EngineSettings]),
        store=StoreSettings(**by_section[StoreSettings]),
        http=HttpSettings(**by_section[HttpSettings]),
        **by_section[Settings],
    )


@contextmanager
def _errors_on_one_line(log_format: LogFormat = "text") -> Iterator[None]:
    """Report an error in one line and exit with status 1."""
    try:
        yield
    except (ServerError, PromptStoreError) as error:
        line = " ".join(str(error).split())
        if log_format == "json":
            logger.error("%s", line)
        else:
            typer.echo(f"prelude: {line}", err=True)
        raise typer.Exit(1) from error


def _is_default(context: typer.Context, name: str) -> bool:
    """Whether a flag was set neither on the command line nor by its variable."""
    source = context.get_parameter_source(name)
    return source is None or source.name.startswith("DEFAULT")


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"prelude {metadata.version('prelude-server')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Serve one frozen language model with many hot-swappable soft prompts."""


@app.command(cls=GroupedHelp)
@with_flags(FLAGS)
def serve(context: typer.Context, **values: Any) -> None:
    """Serve a model and its soft prompts until SIGTERM or Ctrl-C."""
    logs.configure(values["log_level"], values["log_format"], replica=values["replica_name"])
    display = StartDisplay(terminal_for_log(values))
    with _errors_on_one_line(values["log_format"]), display:
        settings = settings_from(values)
        with started_early(context, settings.engine) as process:
            # Imported here because it takes a second or two; client commands do not need it.
            from server.app import run  # noqa: PLC0415

            run(settings, display, process)


@app.command(cls=GroupedHelp)
@with_flags(tuple(flag for flag in FLAGS if flag.name not in {"model", "revision"}))
def demo(
    context: typer.Context,
    exit_: Annotated[bool, typer.Option("--exit", help="Exit after the tour; status 0 if it succeeded.")] = False,
    is_real: Annotated[
        bool, typer.Option("--real", help="Serve SmolLM2-135M-Instruct instead; needs the extra 'real'.")
    ] = False,
    **values: Any,
) -> None:
    """Serve the embedded model and its soft prompts, run a tour of them, and print commands to try."""
    is_temporary = _is_default(context, "store")
    # Show only the tour, unless a log was requested.
    is_quiet = _is_default(context, "log_level") and _is_default(context, "log_format")
    logs.configure("WARNING" if is_quiet else values["log_level"], values["log_format"])
    console = Console()
    display = StartDisplay(console)
    with _errors_on_one_line(values["log_format"]), display:
        model, exhibit = real_exhibit(display) if is_real else (DEMO_MODEL, EMBEDDED)
        values |= {"model": str(model), "revision": None}
        values["served_model_name"] = values["served_model_name"] or (REAL_NAME if is_real else DEMO_NAME)
        settings = settings_from(values)
        with started_early(context, settings.engine) as process:
            from server.demo import tour  # noqa: PLC0415 - slow to import, like server.app

            with tour.store_directory(None if is_temporary else values["store"]) as store:
                status = tour.run(
                    replace(settings, store=replace(settings.store, location=store)),
                    any_port=_is_default(context, "port"),
                    exit_after=exit_,
                    console=console,
                    display=display,
                    process=process,
                    is_temporary=is_temporary,
                    exhibit=exhibit,
                )
    raise typer.Exit(status)


@app.command()
def key(
    tenant: Annotated[str | None, typer.Option(help="Tenant of the key; default: a separate tenant.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="Permission of the key; repeatable.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the key in history and logs.")] = None,
) -> None:
    """Create a random API key: print its hash (for a key file) to standard output, the key to standard error."""
    # Imported here because starlette is slow to import and client commands do not need it.
    from server.api.keys.key_file import describe_key, new_key  # noqa: PLC0415

    secret, digest = new_key()
    with _errors_on_one_line():
        line = describe_key(digest, tenant=tenant, scopes=scope or [], name=name)
    typer.echo(line)
    # Labelled on a terminal only: a file gets the bare key, as PRELUDE_API_KEY expects it.
    typer.echo(f"API key (not shown again): {secret}" if sys.stderr.isatty() else secret, err=True)


_OF_SERVER = (commands, console_page, canary, edit, history, prune, transfer, bulk, doctor, evaluation)
for module in (*_OF_SERVER, importers, training, store_commands, cluster):
    app.add_typer(module.app)


def main() -> None:
    """Run the command line."""
    try:
        app(obj=OWN_PROCESS)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        with suppress(OSError):
            typer.echo(f"prelude: {error.filename or 'the output'} cannot be written: {error.strerror}", err=True)
        # Buffered output would fail again when the interpreter exits.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(commands.ExitStatus.FAILED)
