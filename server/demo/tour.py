"""``prelude demo``: serve a model, upload its soft prompts over HTTP, and show a mixed batch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from prompt_store.types import PromptKind
from server.api.keys.key_file import new_key
from server.api.services import Lifecycle, Phase
from server.app import PreludeServer, bind, create_app, lifecycle_of, url_of
from server.client.http import ClientError, PreludeClient
from server.config import Settings
from server.demo import DEMO_MODEL, DEMO_NAME, EMBEDDED, Exhibit
from server.demo.commands import Example, commands, training_command
from server.engine.process.started_process import StartedProcess
from server.errors import ConfigurationError
from server.startup.display import StartDisplay

MODEL_NAME, MODEL_DIRECTORY = DEMO_NAME, DEMO_MODEL
SOFT_PROMPTS_DIRECTORY, HELDOUT_DIRECTORY = EMBEDDED.soft_prompts, EMBEDDED.heldout

_CLASSIFIED = "sentiment"
_INPUTS_PER_PROMPT = 4
_INPUTS_WITHOUT_PROMPT = 2
_MAX_TOKENS = 32
_MAX_BURSTS = 3
_ANSWER_SECONDS = 60.0
"""Maximum time from the end of the loading to the first answer."""

_REQUEST_SECONDS = 120.0
_POLL_SECONDS = 0.1
_DISTINCT_METRIC = "prelude_batch_distinct_prompts_max"


class TourError(Exception):
    """The tour cannot continue; the message is for the user."""


@dataclass(frozen=True, slots=True)
class _Question:
    """One request of the batch.

    Attributes:
        text: The prompt.
        soft_prompt: Name of the soft prompt or adapter; None for the base model.
        expected: The held-out answer; None for the base model.
    """

    text: str
    soft_prompt: str | None
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    """The response to a question.

    Attributes:
        question: The question.
        text: The generated text.
        num_tokens: Number of generated tokens.
        first_token_seconds: Time from sending the request to its first event.
    """

    question: _Question
    text: str
    num_tokens: int
    first_token_seconds: float


@contextlib.contextmanager
def store_directory(chosen: str | None) -> Iterator[str]:
    """The chosen store, or a temporary one that is deleted afterwards."""
    if chosen is not None:
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="prelude-demo-") as directory:
        yield directory


def run(
    settings: Settings,
    *,
    any_port: bool,
    exit_after: bool,
    console: Console,
    display: StartDisplay | None = None,
    process: StartedProcess | None = None,
    is_temporary: bool = False,
    exhibit: Exhibit | None = None,
) -> int:
    """Serve a model, run the tour, and continue to serve until a signal.

    Args:
        settings: The settings of the server; the model is the exhibit's.
        any_port: Whether to use another port if the configured one is taken.
        exit_after: Whether to stop after the tour.
        console: Console to print to.
        display: Where to show the stages of the start; default: the console.
        process: The first process of the engine; default: one is started.
        is_temporary: Whether the store will be deleted.
        exhibit: What to upload and to ask; default: what is embedded.

    Returns:
        0 if the tour succeeded, 1 if it failed.

    Raises:
        ServerError: If the server cannot start.
    """
    exhibit = exhibit or EMBEDDED
    key = None
    if settings.http.api_key_file is not None or settings.http.api_keys:
        # Create a key for the tour, because a key file may contain only hashes.
        key, digest = new_key()
        settings = replace(settings, http=replace(settings.http, api_keys=(*settings.http.api_keys, digest)))
    display = display or StartDisplay(console)
    with contextlib.closing(_bind(settings, any_port=any_port)) as bound:
        display.url = url = url_of(bound)
        app = create_app(settings, display=display, process=process)
        server = PreludeServer(app, settings)
        serving = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="server")
        stopping = threading.Event()

        def stop(number: int, frame: FrameType | None) -> None:
            stopping.set()
            server.handle_exit(number, frame)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        serving.start()
        status = 0
        try:
            _wait_until_ready(url, serving, lifecycle_of(app))
            display.wait_until_shown(_POLL_SECONDS)
            if is_temporary:
                text = f"The store is temporary; to keep one: {exhibit.keep_command}"
                console.print(text, markup=False, highlight=False)
            _tour(url, settings.served_model_name or DEMO_NAME, exhibit, console, key=key)
            if not exit_after:
                console.print(f"\nServing at [bold]{url}[/]. Ctrl-C stops.")
                while serving.is_alive() and not stopping.is_set():
                    serving.join(_POLL_SECONDS)
        except (TourError, ClientError, httpx.HTTPError) as error:
            if not stopping.is_set() and lifecycle_of(app).failure is None:
                console.print(f"The tour failed: {error}", style="red", markup=False)
            status = 1
        finally:
            server.should_exit = True
            serving.join()
            for number, handler in previous.items():
                signal.signal(number, handler)
    failure = lifecycle_of(app).failure
    if failure is not None:
        raise failure
    return status


def _bind(settings: Settings, *, any_port: bool) -> socket.socket:
    try:
        return bind(settings.http)
    except ConfigurationError:
        if not any_port:
            raise
        return bind(replace(settings.http, port=0))


def _tour(url: str, base_name: str, exhibit: Exhibit, console: Console, *, key: str | None) -> None:
    console.print()
    with PreludeClient(url, api_key=key) as client:
        versions = _upload(client, exhibit, console)
    num_adapters = sum(version["kind"] == PromptKind.ADAPTER for version in versions)
    questions = _questions([version["id"] for version in versions], exhibit.heldout)
    console.print(f"\nSending {len(questions)} requests at once …\n")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    wanted = len(versions) - num_adapters
    answers, num_distinct = asyncio.run(_burst(url, base_name, questions, headers, wanted=wanted))
    console.print(_table(answers))
    expected = [answer for answer in answers if answer.question.expected is not None]
    num_right = sum(answer.text.strip() == answer.question.expected for answer in expected)
    console.print(f"\n{num_right} of {len(expected)} answers match the held-out ones exactly.")
    console.print(f"[bold]{num_distinct}[/] distinct soft prompts shared one forward pass.\n")
    uploaded = _directories(exhibit.soft_prompts)[0]
    _print_commands(url, base_name, questions, versions, uploaded, console, has_key=key is not None)
    if exhibit.examples.is_dir():
        text = training_command(url, exhibit.examples, has_key=key is not None)
        title = "train one of your own; needs pip install 'prelude-server[train]'"
        console.print(f"\n# {title}\n{text}", markup=False, highlight=False, soft_wrap=True)


def _directories(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _upload(client: PreludeClient, exhibit: Exhibit, console: Console) -> list[dict[str, Any]]:
    """Upload the soft prompts, the adapters and the soft prompts over them; returns the versions.

    If the server serves no adapters, only the soft prompts.
    """

    def push(directory: Path, over: str | None = None) -> dict[str, Any]:
        return client.push(directory, name=directory.name, shared=True, over=over)[0]

    versions = [push(directory) for directory in _directories(exhibit.soft_prompts)]
    for directory in _directories(exhibit.adapters):
        try:
            adapter = push(directory)
        except ClientError as error:
            if all(code != "adapters_off" for code, _ in error.faults):
                raise
            console.print(f"The adapter {directory.name} is left out: {error}", markup=False, highlight=False)
            continue
        versions.append(adapter)
        over = f"{adapter['id']}@{adapter['version']}"
        versions += [push(pair, over) for pair in _directories(exhibit.pairs / directory.name)]
    for version in versions:
        if version["kind"] == PromptKind.ADAPTER:
            size = f"rank {version['rank']}, {version['num_modules']} modules"
        else:
            size = f"{version['num_virtual_tokens']} virtual tokens"
        over = f" over {version['over']}" if version.get("over") else ""
        console.print(
            f"Uploaded [bold]{version['id']}@{version['version']}[/]{over}: {version['peft_type']}, {size}, "
            f"{version['size']:,} bytes"
        )
    return versions


def _wait_until_ready(url: str, serving: threading.Thread, lifecycle: Lifecycle) -> None:
    """Wait until the server answers.

    Loading may take any time: the first start on a machine compiles kernels, which takes minutes if the machine is
    busy. The server ends if its engine does.
    """
    deadline: float | None = None
    reason = "no answer"
    with httpx.Client(timeout=5.0) as http:
        while deadline is None or time.monotonic() < deadline:
            if not serving.is_alive():
                raise TourError("the server has ended")
            if deadline is None and lifecycle.phase is not Phase.LOADING:
                deadline = time.monotonic() + _ANSWER_SECONDS
            with contextlib.suppress(httpx.TransportError):
                response = http.get(f"{url}/ready")
                if response.is_success:
                    return
                reason = response.text
            time.sleep(_POLL_SECONDS)
    raise TourError(f"the server does not answer {_ANSWER_SECONDS:.0f} s after it was loaded: {reason}")


def _questions(names: list[str], heldout: Path) -> list[_Question]:
    """Held-out inputs of every soft prompt, and some for the base model, in random order."""
    questions = []
    for name in names:
        with (heldout / f"{name}.jsonl").open(encoding="utf-8") as lines:
            pairs = [json.loads(line) for line in islice(lines, _INPUTS_PER_PROMPT)]
        questions += [_Question(pair["input"], name, pair["output"]) for pair in pairs]
    bare = [_Question(question.text, None) for question in questions[::_INPUTS_PER_PROMPT]][:_INPUTS_WITHOUT_PROMPT]
    mixed = questions + bare
    random.Random(0).shuffle(mixed)  # noqa: S311 - an order, not a secret
    return mixed


async def _burst(
    url: str, base_name: str, questions: list[_Question], headers: dict[str, str], *, wanted: int
) -> tuple[list[_Answer], int]:
    """Send all questions at once; returns the answers, and the largest number of soft prompts in one step.

    On a busy machine the requests arrive slowly, and some end before others arrive. Then they are sent again, over
    the connections that are open by now.
    """
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=_REQUEST_SECONDS) as http:
        for _ in range(_MAX_BURSTS):
            answers = await asyncio.gather(*(_ask(http, base_name, question) for question in questions))
            metrics = (await http.get("/metrics")).raise_for_status().text
            values = (line.split()[1] for line in metrics.splitlines() if line.startswith(f"{_DISTINCT_METRIC} "))
            num_distinct = int(float(next(values)))
            if num_distinct >= wanted:
                break
    return answers, num_distinct


async def _ask(http: httpx.AsyncClient, base_name: str, question: _Question) -> _Answer:
    body = {
        "model": question.soft_prompt or base_name,
        "prompt": question.text,
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.monotonic()
    first: float | None = None
    text, num_tokens = "", 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if not response.is_success:
            raise TourError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            first = first or time.monotonic()
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise TourError(chunk["error"]["message"])
            text += "".join(choice["text"] for choice in chunk["choices"])
            num_tokens = (chunk["usage"] or {}).get("completion_tokens", num_tokens)
    return _Answer(question, text, num_tokens, (first or time.monotonic()) - sent)


def _table(answers: list[_Answer]) -> Table:
    table = Table("input", "model", "answer", title="One model, one batch")
    table.add_column("tokens", justify="right")
    table.add_column("first token", justify="right")
    for answer in sorted(answers, key=lambda answer: answer.question.soft_prompt or "~"):
        table.add_row(
            _cell(answer.question.text),
            answer.question.soft_prompt or "[dim]none[/]",
            _cell(answer.text.strip()),
            str(answer.num_tokens),
            f"{answer.first_token_seconds * 1000:.0f} ms",
        )
    return table


def _cell(text: str) -> str:
    """Put a text on one line, and escape brackets, which are markup."""
    return " ".join(text.split()).replace("[", r"\[")


def _print_commands(
    url: str,
    base_name: str,
    questions: list[_Question],
    versions: list[dict[str, Any]],
    uploaded: Path,
    console: Console,
    *,
    has_key: bool,
) -> None:
    """Print commands to try next; ``uploaded`` is the directory of a soft prompt."""
    texts = {question.soft_prompt: question.text for question in questions}
    examples = []
    for version in versions:
        name, over = str(version["id"]), version.get("over")
        kind = "adapter" if version["kind"] == PromptKind.ADAPTER else "soft prompt"
        title = f"the {kind} {name}" if over is None else f"a pair: the {kind} {name}, with the adapter {over}"
        examples.append(Example(title, name, texts[name]))
    classified = next((one for one in examples if one.name == _CLASSIFIED), examples[0])
    console.print("Try, in another terminal:")
    for title, command in commands(url, base_name, examples, classified, uploaded, has_key=has_key):
        console.print(f"\n# {title}\n{command}", markup=False, highlight=False, soft_wrap=True)
