"""The ``prelude`` command: ``serve`` and ``demo`` with their flags, beside the client commands."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from prompt_store.errors import PromptStoreError
from prompt_store.types import PromptRef
from server import logs
from server.client import commands
from server.client.bulk import command as bulk
from server.client.evaluation import command as evaluation
from server.config import (
    Device,
    DType,
    EngineSettings,
    GenerationConfigUse,
    HttpSettings,
    LogFormat,
    Settings,
    StoreSettings,
)
from server.errors import ServerError
from server.training import command as training

app = typer.Typer(
    name="prelude",
    help="Serve one frozen language model with many hot-swappable soft prompts.",
    epilog=commands.EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

logger = logging.getLogger(__name__)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What a disk or a device answers that takes no more; a closed pipe is typer's to end quietly."""

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"(\d+)\s*([kmg]i?b)?", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Read a size: plain bytes, or a number with KB, MB, GB (powers of 1000) or KiB, MiB, GiB (powers of 1024).

    Raises:
        typer.BadParameter: If it is none of these, or zero.
    """
    match = _SIZE.fullmatch(str(text).strip())
    size = int(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0
    if size == 0:
        raise typer.BadParameter(f"{text!r} is not a size: write bytes, or a number with KiB, MiB or GiB")
    return size


@dataclass(frozen=True, slots=True)
class _Flag:
    """One of serve's flags: a field of the settings tree.

    Attributes:
        section: The dataclass that holds the field; it also has the default.
        field: The field.
        type: What the command line parses.
        help: One line.
        options: More of typer's options, such as bounds.
        name: The flag, where it is not the field's name.
    """

    section: type
    field: str
    type: Any
    help: str
    options: dict[str, Any]
    name: str

    @property
    def variable(self) -> str:
        """The environment variable that sets it too."""
        return f"PRELUDE_{self.name.upper()}"

    @property
    def default(self) -> Any:
        """The settings' own default; required where there is none."""
        field = next(field for field in fields(self.section) if field.name == self.field)
        return ... if field.default is MISSING else field.default

    @property
    def parameter(self) -> inspect.Parameter:
        """The flag as a parameter that typer reads."""
        option = typer.Option(help=self.help, envvar=self.variable, **self.options)
        default = inspect.Parameter.empty if self.default is ... else self.default
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[self.type, option]
        )


def _flag(section: type, field: str, type_: Any, text: str, *, name: str | None = None, **options: Any) -> _Flag:
    return _Flag(section, field, type_, text, options, name or field)


def parse_names(text: str | tuple[str, ...]) -> tuple[str, ...]:
    """Read soft prompts as requests name them, with commas between.

    Raises:
        typer.BadParameter: If one is not well formed.
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
    """Read API keys with commas between."""
    return text if isinstance(text, tuple) else tuple(key for part in text.split(",") if (key := part.strip()))


def parse_list(text: str) -> tuple[str, ...]:
    """Read one or more values with commas between, of a flag that may be given several times."""
    return tuple(value for part in text.split(",") if (value := part.strip()))


_NAMES: dict[str, Any] = {"parser": parse_names, "metavar": "NAME[@V],..."}
_KEYS: dict[str, Any] = {"parser": parse_keys, "metavar": "KEY,..."}
_BYTES: dict[str, Any] = {"parser": parse_bytes, "metavar": "BYTES"}

FLAGS = (
    _flag(EngineSettings, "model", str, "A hub id, or a directory that transformers can load."),
    _flag(EngineSettings, "revision", str | None, "The hub revision of the model."),
    _flag(Settings, "served_model_name", str | None, "The model's name in the API; by default its id or directory."),
    _flag(EngineSettings, "device", Device, "Where the model runs; auto takes CUDA where there is one."),
    _flag(
        EngineSettings,
        "dtype",
        DType,
        "The serving dtype; auto takes the checkpoint's where the device is fast at it.",
    ),
    _flag(HttpSettings, "host", str, "Address to bind; anything but loopback needs keys."),
    _flag(HttpSettings, "port", int, "TCP port; 0 takes a free one.", min=0, max=65535),
    _flag(
        StoreSettings, "location", str, "Where soft prompts are: a directory, or s3://, gs:// or az://.", name="store"
    ),
    _flag(
        StoreSettings,
        "catalog_url",
        str | None,
        "Names and versions: postgresql://... or sqlite:///PATH; by default SQLite in the store's directory.",
        name="catalog",
    ),
    _flag(StoreSettings, "cache_path", Path, "Directory for copies of an object store's files.", name="cache"),
    _flag(StoreSettings, "cache_bytes", int, "What those copies may take.", **_BYTES),
    _flag(StoreSettings, "max_upload_bytes", int, "Largest file of an upload.", **_BYTES),
    _flag(StoreSettings, "allow_other_base", bool, "Take soft prompts that name another base model."),
    _flag(StoreSettings, "allow_float64", bool, "Take float64 soft prompts, rounded to the serving dtype."),
    _flag(StoreSettings, "preload", tuple, "Soft prompts to bring onto the device at the start.", **_NAMES),
    _flag(StoreSettings, "pin", tuple, "Soft prompts to preload and to keep in host memory.", **_NAMES),
    _flag(
        StoreSettings,
        "pinned_bytes",
        int | None,
        "Host memory for all pins; by default as much as for soft prompts.",
        name="pinned_memory",
        **_BYTES,
    ),
    _flag(
        StoreSettings,
        "tenant_pinned_bytes",
        int | None,
        "Host memory for one tenant's pins; by default half of that.",
        name="pinned_memory_per_tenant",
        **_BYTES,
    ),
    _flag(EngineSettings, "max_model_len", int | None, "Positions of one sequence, virtual tokens included.", min=1),
    _flag(EngineSettings, "max_num_seqs", int, "Sequences that run in one step.", min=1),
    _flag(EngineSettings, "max_num_batched_tokens", int, "Tokens computed in one step.", min=1),
    _flag(EngineSettings, "block_size", int, "Positions in one key/value block.", min=1),
    _flag(
        EngineSettings,
        "kv_cache_memory",
        int | None,
        "Memory for keys and values; by default what is free.",
        **_BYTES,
    ),
    _flag(
        EngineSettings,
        "soft_prompt_host_bytes",
        int,
        "Host memory for soft prompts that nobody uses at the moment.",
        name="soft_prompt_host_memory",
        **_BYTES,
    ),
    _flag(
        EngineSettings, "enable_prefix_caching", bool, "Keep the blocks of texts for others with the same opening."
    ),
    _flag(EngineSettings, "num_threads", int | None, "CPU threads of the model; by default every core.", min=1),
    _flag(
        EngineSettings,
        "generation_config",
        GenerationConfigUse,
        "Take defaults of requests from the checkpoint's generation_config.json, or none of them.",
    ),
    _flag(EngineSettings, "enforce_eager", bool, "Do not replay decodes from CUDA graphs."),
    _flag(
        EngineSettings,
        "step_timeout",
        float,
        "Seconds until a stuck step's process is replaced; 0 is never.",
        min=0.0,
    ),
    _flag(
        HttpSettings, "api_key_file", Path | None, "Keys, one a line, or *.toml or *.json with tenants and scopes."
    ),
    _flag(
        HttpSettings,
        "api_keys",
        tuple,
        "Keys without a file; as a variable, a process list does not show them.",
        **_KEYS,
    ),
    _flag(HttpSettings, "allow_open", bool, "Serve everybody, without keys, on an address that others reach."),
    _flag(HttpSettings, "open_metrics", bool, "Serve /metrics without a key, for what scrapes it and has none."),
    _flag(
        HttpSettings,
        "allow_origin",
        list[Any],
        "An origin whose pages may use the server; may be given several times.",
        parser=parse_list,
        metavar="URL",
    ),
    _flag(
        HttpSettings,
        "allowed_host",
        list[Any],
        "Another name for the server in requests; may be given several times.",
        parser=parse_list,
        metavar="NAME",
    ),
    _flag(HttpSettings, "max_waiting", int, "Sequences that may wait for a place before the answer is 429.", min=0),
    _flag(
        HttpSettings, "max_wait_seconds", float, "Wait for a place before the answer is 503; 0 is no limit.", min=0.0
    ),
    _flag(HttpSettings, "max_body_bytes", int, "Largest JSON body.", **_BYTES),
    _flag(HttpSettings, "max_connections", int, "Connections that may be open at once.", min=1),
    _flag(HttpSettings, "max_head_bytes", int, "Largest request line and headers.", **_BYTES),
    _flag(HttpSettings, "head_timeout", float, "Seconds for a request's line and headers to come.", min=0.1),
    _flag(HttpSettings, "body_timeout", float, "Seconds to wait for a body; 4 KiB of it give one back.", min=0.1),
    _flag(HttpSettings, "stall_timeout", float, "Seconds that an answer may lie unread.", min=0.1),
    _flag(HttpSettings, "drain_seconds", float, "How long running requests may finish after SIGTERM.", min=0.0),
    _flag(HttpSettings, "metrics_top_prompts", int, "Soft prompts with a metric label of their own.", min=0),
    _flag(Settings, "log_level", LogLevel, "How much is logged, to the standard error."),
    _flag(Settings, "log_format", LogFormat, "Lines of text, or one JSON object a line."),
    _flag(HttpSettings, "log_prompts", bool, "Log each request's prompts or messages, too."),
    _flag(Settings, "otlp_traces_endpoint", str | None, "Collector of traces by OTLP over HTTP; no text is sent."),
)
"""Every flag of ``serve``. Names come from the fields, defaults from the settings."""


def settings_from(values: dict[str, Any]) -> Settings:
    """Fill the settings tree from parsed flags."""
    by_section: dict[type, dict[str, Any]] = {}
    for flag in FLAGS:
        value = values[flag.name]
        if isinstance(value, list):  # a flag that may be given several times, each time with several values
            value = tuple(item for part in value for item in part)
        by_section.setdefault(flag.section, {})[flag.field] = value
    return Settings(
        engine=EngineSettings(**by_section[EngineSettings]),
        store=StoreSettings(**by_section[StoreSettings]),
        http=HttpSettings(**by_section[HttpSettings]),
        **by_section[Settings],
    )


def _with_flags(flags: tuple[_Flag, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's ``**values`` by one parameter for each flag: typer reads signatures."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters += [flag.parameter for flag in flags]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


@contextmanager
def _errors_on_one_line(log_format: LogFormat = "text") -> Iterator[None]:
    """End with status 1 and one line where the operator is told what is wrong."""
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
    """Whether a flag came neither from the command line nor from its variable."""
    source = context.get_parameter_source(name)
    return source is None or source.name.startswith("DEFAULT")


@app.command()
@_with_flags(FLAGS)
def serve(**values: Any) -> None:
    """Serve a model and its soft prompts until SIGTERM or Ctrl-C."""
    # Not at the top: it brings transformers, which takes seconds that the client commands need not wait.
    from server.app import run  # noqa: PLC0415

    logs.configure(values["log_level"], values["log_format"])
    with _errors_on_one_line(values["log_format"]):
        run(settings_from(values))


@app.command()
@_with_flags(tuple(flag for flag in FLAGS if flag.name not in {"model", "revision"}))
def demo(
    context: typer.Context,
    exit_: Annotated[bool, typer.Option("--exit", help="Stop after the tour; status 0 if all of it worked.")] = False,
    **values: Any,
) -> None:
    """Serve the embedded model and its soft prompts, tour them, and print what to try."""
    from server.demo import tour  # noqa: PLC0415 - as in serve

    if _is_default(context, "store"):
        values["store"] = None
    values["served_model_name"] = values["served_model_name"] or tour.MODEL_NAME
    # The tour is what people look at; whoever asks for a log gets all of it.
    is_quiet = _is_default(context, "log_level") and _is_default(context, "log_format")
    logs.configure("WARNING" if is_quiet else values["log_level"], values["log_format"])
    with _errors_on_one_line(values["log_format"]), tour.store_directory(values["store"]) as store:
        settings = settings_from(values | {"model": str(tour.MODEL_DIRECTORY), "revision": None, "store": store})
        status = tour.run(settings, any_port=_is_default(context, "port"), exit_after=exit_, console=Console())
    raise typer.Exit(status)


@app.command()
def key(
    tenant: Annotated[
        str | None, typer.Option(help="Whose key it is; by default it has a tenant of its own.")
    ] = None,
    scope: Annotated[list[str] | None, typer.Option(help="What it may do; may be given several times.")] = None,
) -> None:
    """Make a random API key: its hash for a key file on standard output, the key alone on standard error."""
    # Not at the top: starlette takes time that the client commands need not wait.
    from server.api.keys.key_file import describe_key, new_key  # noqa: PLC0415

    secret, digest = new_key()
    with _errors_on_one_line():
        line = describe_key(digest, tenant=tenant, scopes=scope or [])
    typer.echo(line)
    # Labelled for people only: what a file gets is the key, as PRELUDE_API_KEY takes it.
    typer.echo(f"the key, shown only now: {secret}" if sys.stderr.isatty() else secret, err=True)


for module in (commands, bulk, evaluation, training):
    app.add_typer(module.app)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        with suppress(OSError):
            typer.echo(f"prelude: {error.filename or 'the output'} cannot be written: {error.strerror}", err=True)
        # What is left in the buffers would fail once more when the interpreter ends.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(commands.ExitStatus.FAILED)
