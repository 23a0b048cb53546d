"""Flags made from the settings, and their help in groups."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from server.config import EngineSettings, HttpSettings, Settings, StoreSettings

_PANELS: dict[type, str] = {
    EngineSettings: "Model and engine",
    StoreSettings: "Soft prompts and their store",
    HttpSettings: "HTTP",
    Settings: "Names, logs and traces",
}
"""The heading of the flags of each section, in the order of the help."""

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"(\d+)\s*([kmg]i?b)?", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Parse a size: bytes, or a number with KB, MB, GB (powers of 1000) or KiB, MiB, GiB (powers of 1024).

    Raises:
        typer.BadParameter: If the text has another form or the size is zero.
    """
    match = _SIZE.fullmatch(str(text).strip())
    size = int(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0
    if size == 0:
        raise typer.BadParameter(f"{text!r} is not a size: give bytes, or a number with KiB, MiB or GiB")
    return size


def parse_fraction(text: str | float) -> float:
    """Parse a number in (0, 1].

    Raises:
        typer.BadParameter: If the text is no such number.
    """
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0.0 < fraction <= 1.0:
        raise typer.BadParameter(f"{text!r} is not a fraction: give a number above 0, at most 1")
    return fraction


@dataclass(frozen=True, slots=True)
class Flag:
    """One of serve's flags: a field of the settings tree.

    Attributes:
        section: The dataclass that holds the field and its default.
        field: The field's name.
        type: The type that the command line parses.
        help: One line.
        options: Further options for typer, such as bounds.
        name: The flag's name if it differs from the field's.
    """

    section: type
    field: str
    type: Any
    help: str
    options: dict[str, Any]
    name: str

    @property
    def variable(self) -> str:
        """The environment variable for this flag."""
        return f"PRELUDE_{self.name.upper()}"

    @property
    def default(self) -> Any:
        """The field's default; ``...`` if the flag is required."""
        field = next(field for field in fields(self.section) if field.name == self.field)
        return ... if field.default is MISSING else field.default

    @property
    def parameter(self) -> inspect.Parameter:
        """The flag as a parameter that typer reads."""
        panel = _PANELS[self.section]
        option = typer.Option(help=self.help, envvar=self.variable, rich_help_panel=panel, **self.options)
        default = inspect.Parameter.empty if self.default is ... else self.default
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[self.type, option]
        )


def with_flags(flags: tuple[Flag, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's ``**values`` by one parameter per flag, because typer reads signatures."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters += [flag.parameter for flag in flags]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


class GroupedHelp(TyperCommand):
    """A command whose help has one section for each group of flags.

    Rich's boxes cut names and variables at 80 columns; this is the plain format, where every name stands whole.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"rich_markup_mode": None})

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the flags under their headings; required ones are marked by typer."""
        groups: dict[str, list[tuple[str, str]]] = {heading: [] for heading in _PANELS.values()}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = getattr(parameter, "rich_help_panel", None) or "Other"
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
