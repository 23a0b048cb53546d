"""Commands to try after the tour, in lines that a terminal does not wrap, so that they survive a copy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH = 78
"""Columns of a line, unless one word is longer."""

_INDENT = "    "
_WITH_VALUE = {"-H", "-F", "-d"}


@dataclass(frozen=True, slots=True)
class Example:
    """A request to show.

    Attributes:
        title: What it shows.
        name: The soft prompt or adapter.
        text: The input.
    """

    title: str
    name: str
    text: str


def commands(
    url: str, base_name: str, examples: Sequence[Example], classified: Example, directory: Path, *, has_key: bool
) -> list[tuple[str, str]]:
    """Commands for a shell, each with a line that says what it does.

    Args:
        url: The server.
        base_name: The model's name.
        examples: The requests.
        classified: One of them, whose answer is positive or negative.
        directory: A soft prompt to upload.
        has_key: Whether the server needs a key; the commands then have a placeholder for it.
    """
    auth = ["-H", "Authorization: Bearer KEY"] if has_key else []
    json_type = ["-H", "Content-Type: application/json"]

    def post(path: str, body: dict[str, object], *options: str) -> str:
        return _lines(["curl", *options, f"{url}{path}", *auth, *json_type, "-d", _body(body)])

    greedy = {"max_tokens": 32, "temperature": 0}
    found = [
        (one.title, post("/v1/completions", {"model": one.name, **greedy, "prompt": one.text})) for one in examples
    ]
    name, text = classified.name, classified.text
    base = {"model": base_name, **greedy, "stream": True, "prompt": text}
    found.append(("the bare model, streamed", post("/v1/completions", base, "-N")))
    version = {"model": f"{name}@1", **greedy, "prompt": text}
    found.append((f"version 1 of {name}, whatever is uploaded later", post("/v1/completions", version)))
    classify: dict[str, object] = {"model": name, "labels": ["\npositive", "\nnegative"], "input": text}
    found.append(("the probability of each label", post("/v1/classify", classify)))
    files = [word for path in sorted(directory.glob("adapter_*")) for word in ("-F", f"files=@{path}")]
    upload = _lines(["curl", f"{url}/v1/prompts", *auth, "-F", f"id=my-{directory.name}", *files])
    found.append(("upload a soft prompt", upload))
    found.append(("list them", _lines(["curl", f"{url}/v1/models", *auth])))
    return found


def training_command(url: str, examples: Path, *, has_key: bool) -> str:
    """A command that trains a soft prompt for the embedded model and publishes it.

    Args:
        url: The server.
        examples: Directory with the data.
        has_key: Whether the server needs a key; the command then has a placeholder for it.
    """
    words = ["prelude", "train", "--model", "demo", "--id", "triage", "--method", "p_tuning_v2"]
    words += ["--data", str(examples / "triage.jsonl"), "--eval-data", str(examples / "triage-test.jsonl")]
    words += ["--url", url, *(["--api-key", "KEY"] if has_key else []), "--push"]
    return _lines(words)


def _body(body: Mapping[str, object]) -> str:
    """A JSON object in lines of at most ``WIDTH``, with its last field on a line of its own."""
    *fields, last = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in body.items())
    lines = [f"{_INDENT}-d '{{"]
    for field in fields:
        if len(lines[-1]) + len(field) + 2 > WIDTH:
            lines.append(f"{_INDENT} ")
        lines[-1] += f"{field}, "
    text = "\n".join(line.rstrip() for line in [*lines, f"{_INDENT} {last}}}"])
    return text.removeprefix(f"{_INDENT}-d '")


def _lines(words: list[str]) -> str:
    """A command in lines that end with a backslash; an option stays with its value."""
    lines = [words[0]]
    index = 1
    while index < len(words):
        num_words = 2 if words[index] in _WITH_VALUE or words[index].startswith("--") else 1
        part = " ".join(map(shlex.quote, words[index : index + num_words]))
        index += num_words
        if len(lines[-1]) + 1 + len(part.partition("\n")[0]) + 2 > WIDTH:
            lines.append(_INDENT + part)
        else:
            lines[-1] += f" {part}"
    return " \\\n".join(lines)
