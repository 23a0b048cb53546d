"""The generated reference has every command with every option."""

from __future__ import annotations

import re
from typing import Any

from typer.main import get_command

from scripts.command_reference import command_page
from server.cli import FLAGS, app

SECTIONS = dict(zip(*[iter(re.split(r"^## (.+)$", command_page(), flags=re.MULTILINE)[1:])] * 2, strict=True))


def leaves(words: str, command: Any) -> dict[str, Any]:
    inner = getattr(command, "commands", {})
    found = {words: command}
    for name, one in inner.items():
        found |= leaves(f"{words} {name}", one)
    return found


def test_every_command_has_a_section_with_all_its_options() -> None:
    commands = leaves("prelude", get_command(app))
    assert SECTIONS.keys() == commands.keys()
    assert {"prelude serve", "prelude store backup"} <= SECTIONS.keys()
    for words, command in commands.items():
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert all(f"`{name}" in SECTIONS[words] or f", {name}" in SECTIONS[words] for name in parameter.opts)


def test_flags_have_their_variable_default_and_meaning() -> None:
    rows = {
        line.split("`")[1].split(",")[0]: line for line in SECTIONS["prelude serve"].splitlines() if "`--" in line
    }
    for flag in FLAGS:
        row = rows[f"--{flag.name.replace('_', '-')}"]
        assert f"`{flag.variable}`" in row
        assert flag.help in row
    assert "| required |" in rows["--model"]
    assert "| `8000` |" in rows["--port"]
    assert "| `on` |" in rows["--enable-prefix-caching"]


def test_no_line_of_a_table_is_broken() -> None:
    for section in SECTIONS.values():
        for line in section.splitlines():
            if line.startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", line)) == 5, line
