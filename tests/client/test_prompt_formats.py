"""Which format a push states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prompt_store.formats import FORMAT_FILE, FormatType, PromptFormat
from server.client.http import ClientError
from server.client.prompt_formats import format_of_directory, given_format
from tests.client.conftest import Data, Ok, Prelude
from tests.support.api_fixtures import PeftDirectory

TEMPLATE = PromptFormat(FormatType.TEMPLATE, template="Q: {{ text }}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raw", PromptFormat(FormatType.RAW)),
        ("chat", PromptFormat(FormatType.CHAT)),
        ("unknown", None),
        ('{"type": "raw", "separator": "|"}', PromptFormat(FormatType.RAW, separator="|")),
    ],
)
def test_a_format_is_given_by_name_or_as_json(text: str, expected: PromptFormat | None) -> None:
    assert given_format(text).value == expected


def test_a_format_is_given_by_a_file(tmp_path: Path) -> None:
    template, described = tmp_path / "prompt.jinja", tmp_path / "format.json"
    template.write_text("Q: {{ text }}\n")
    described.write_text(json.dumps(TEMPLATE.to_json()))
    assert given_format(str(template)).value == given_format(str(described)).value == TEMPLATE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("template", "neither raw, chat nor unknown"),
        ("no/such/file", "neither raw, chat nor unknown"),
        ("{", "--format: "),
        ('{"type": "template"}', "format.template is missing"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ClientError, match=message):
        given_format(text)


@pytest.mark.parametrize(
    ("files", "expected", "source"),
    [
        ({}, "raw", "guessed: no chat template"),
        ({"chat_template.jinja": "{{ messages }}"}, "chat", "guessed: a chat template"),
        ({"tokenizer_config.json": '{"chat_template": "x"}'}, "chat", "guessed: a chat template"),
        ({"tokenizer_config.json": "{}"}, "raw", "guessed: no chat template"),
        ({"tokenizer_config.json": "not json"}, "raw", "guessed: no chat template"),
        ({FORMAT_FILE: '{"type": "template", "template": "{{ text }}"}'}, "template", f"stated by {FORMAT_FILE}"),
    ],
)
def test_a_directory_states_its_format_or_it_is_guessed(
    tmp_path: Path, files: dict[str, str], expected: str, source: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = format_of_directory(tmp_path)
    assert found.name == expected
    assert source in str(found.source)
    assert found.is_guess is source.startswith("guessed")


def test_a_damaged_statement_is_refused(tmp_path: Path) -> None:
    (tmp_path / FORMAT_FILE).write_text('{"type": "other"}')
    with pytest.raises(ClientError, match="must be raw, chat or template"):
        format_of_directory(tmp_path)


@pytest.mark.slow
def test_push_says_which_format_it_records(ok: Ok, data: Data, peft_directory: PeftDirectory) -> None:
    first, second = str(peft_directory("a")), str(peft_directory("b", seed=1))
    assert ok("push", first, "--id", "a").splitlines()[1].startswith("format raw (guessed: no chat template lies")
    assert ok("push", second, "--id", "b", "--format", "chat").splitlines()[1] == "format chat"
    assert data("show", "a@1")["format"] == {"type": "raw"}
    assert "chat" in ok("show", "b@1")
    assert ok("push", str(peft_directory("c", seed=2)), "--id", "c", "--format", "unknown").endswith(
        "format unknown\n"
    )


@pytest.mark.slow
def test_push_asks_on_a_terminal(
    prelude: Prelude, data: Data, peft_directory: PeftDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def prompt(text: str, **options: Any) -> str:
        asked.append((text, options["default"]))
        return "chat"

    monkeypatch.setattr("server.client.commands.typer.prompt", prompt)
    monkeypatch.setattr("server.client.commands._is_terminal", lambda: True)
    assert prelude("push", str(peft_directory("a")), "--id", "a").exit_code == 0
    assert asked == [("Format (raw, chat or unknown)", "raw")]
    assert data("show", "a@1")["format"] == {"type": "chat"}
