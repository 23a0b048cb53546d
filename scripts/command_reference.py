"""The reference of all commands and options, generated from the command line; a page of the documentation site."""

from __future__ import annotations

from typing import Any

from typer.main import get_command

from server.cli import app


def command_page() -> str:
    """The reference as Markdown: a section for each command, with its arguments and options."""
    lines = [
        "# Command reference",
        "",
        "Generated from the command line; `prelude COMMAND --help` prints the same.",
        "",
    ]
    for words, command in _commands("prelude", get_command(app)):
        lines += _section(words, command)
    return "\n".join(lines)


def _commands(words: str, command: Any) -> list[tuple[str, Any]]:
    """All commands by the words that call them; a group is followed by its commands."""
    found = [(words, command)]
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        found += _commands(f"{words} {name}", inner)
    return found


def _section(words: str, command: Any) -> list[str]:
    with command.make_context(words, [], resilient_parsing=True) as context:
        usage = " ".join([words, *(piece for piece in command.collect_usage_pieces(context))])
        rows = [row for parameter in command.get_params(context) if (row := _row(parameter, context)) is not None]
    lines = [f"## {words}", "", "```text", usage, "```", "", _cell(command.help or ""), ""]
    if rows:
        lines += ["| option | variable | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    return lines


def _row(parameter: Any, context: Any) -> str | None:
    """A parameter's row of the table; None for hidden parameters and ``--help``."""
    if getattr(parameter, "hidden", False) or parameter.name == "help":
        return None
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
    else:
        name = ", ".join([*parameter.opts, *parameter.secondary_opts])
    variable = f"`{parameter.envvar}`" if isinstance(parameter.envvar, str) else "-"
    default = parameter.get_default(context, call=False)
    shown = "required" if parameter.required else "-" if default in (None, (), []) else f"`{_plain(default)}`"
    return f"| `{_cell(name)}` | {variable} | {shown} | {_cell(getattr(parameter, 'help', None) or '')} |"


def _plain(value: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return _cell(str(getattr(value, "value", value))) or "''"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
