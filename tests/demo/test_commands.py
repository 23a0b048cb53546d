"""The commands that the demo prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from server.cli import app
from server.demo import EMBEDDED
from server.demo.commands import WIDTH, Example, commands, training_command

URL = "http://127.0.0.1:65535"


@pytest.mark.parametrize("name", ["x", "a-long-name-of-a-model-or-prompt"])
@pytest.mark.parametrize("has_key", [False, True])
def test_no_line_is_wrapped_and_every_body_is_json(name: str, has_key: bool, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    example = Example("one", name, "It's a lamp. The camera is hardly fantastic.")
    found = commands(URL, name, [example], example, Path(tmp_path), has_key=has_key)
    assert len(found) == 6
    for _, command in found:
        assert all(len(line) <= WIDTH for line in command.splitlines() if str(tmp_path) not in line)
        words = shlex.split(command)
        assert words[0] == "curl"
        assert ("Authorization: Bearer KEY" in words) is has_key
        if "-d" in words:
            body = json.loads(words[words.index("-d") + 1])
            assert body["model"].startswith(name)
            assert example.text in (body.get("prompt"), body.get("input"))


@pytest.mark.parametrize("has_key", [False, True])
def test_the_training_has_the_files_of_this_installation(has_key: bool) -> None:
    command = training_command(URL, EMBEDDED.examples, has_key=has_key)
    assert all(len(line) <= WIDTH for line in command.splitlines() if str(EMBEDDED.examples) not in line)
    name, *arguments = shlex.split(command.replace("\\\n", ""))[1:]
    with get_command(app).commands[name].make_context(name, arguments) as context:  # type: ignore[attr-defined]
        assert context.params["data"].is_file()
        assert context.params["eval_data"].is_file()
        assert context.params["api_key"] == ("KEY" if has_key else None)
