"""``prelude demo``: serve the embedded model, upload its soft prompts over HTTP, and show a mixed batch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shlex
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

import httpx
from rich.console import Console
from rich.table import Table

from server.api.keys.key_file import new_key
from server.app import PreludeServer, bind, create_app, lifecycle_of, url_of
from server.client.http import ClientError, PreludeClient
from server.config import Settings
from server.errors import ConfigurationError

MODEL_NAME = "prelude-demo"
MODEL_DIRECTORY = Path(__file__).parent / "model"
SOFT_PROMPTS_DIRECTORY = Path(__file__).parent / "soft_prompts"
HELDOUT_DIRECTORY = Path(__file__).parent / "heldout"

_INPUTS_PER_PROMPT = 4
_INPUTS_WITHOUT_PROMPT = 2
_MAX_TOKENS = 32
_READY_SECONDS = 300.0
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
        soft_prompt: Name of the soft prompt; None for the base model.
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


def run(settings: Settings, *, any_port: bool, exit_after: bool, console: Console) -> int:
    """Serve the embedded model, run the tour, and continue to serve until a signal.

    Args:
        settings: The settings of the server; the model is ``MODEL_DIRECTORY``.
        any_port: Whether to use another port if the configured one is taken.
        exit_after: Whether to stop after the tour.
        console: Console to print to.

    Returns:
        0 if the tour succeeded, 1 if it failed.

    Raises:
        ServerError: If the server cannot start.
    """
    key = None
    if settings.http.api_key_file is not None or settings.http.api_keys:
        # Create a key for the tour, because a key file may contain only hashes.
        key, digest = new_key()
        settings = replace(settings, http=replace(settings.http, api_keys=(*settings.http.api_keys, digest)))
    with contextlib.closing(_bind(settings, any_port=any_port)) as bound:
        app = create_app(settings)
        server = PreludeServer(app, settings)
        url = url_of(bound)
        serving = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="server")
        stopping = threading.Event()

        def stop(number: int, frame: FrameType | None) -> None:
            stopping.set()
            server.handle_exit(number, frame)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        serving.start()
        status = 0
        try:
            _tour(url, settings, serving, console, key=key)
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


def _tour(url: str, settings: Settings, serving: threading.Thread, console: Console, *, key: str | None) -> None:
    base_name = settings.served_model_name or MODEL_NAME
    console.print(f"Loading the embedded model [bold]{base_name}[/] …")
    started = time.monotonic()
    _wait_until_ready(url, serving)
    console.print(f"Ready after {time.monotonic() - started:.1f} s at {url}\n")

    directories = sorted(path for path in SOFT_PROMPTS_DIRECTORY.iterdir() if path.is_dir())
    with PreludeClient(url, api_key=key) as client:
        for directory in directories:
            version, _ = client.push(directory, name=directory.name, shared=True)
            console.print(
                f"Uploaded [bold]{version['id']}@{version['version']}[/]: {version['peft_type']}, "
                f"{version['num_virtual_tokens']} virtual tokens, {version['size']:,} bytes"
            )
    names = [directory.name for directory in directories]
    questions = _questions(names)
    console.print(f"\nSending {len(questions)} requests at once …\n")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answers, num_distinct = asyncio.run(_burst(url, base_name, questions, headers))
    console.print(_table(answers))
    expected = [answer for answer in answers if answer.question.expected is not None]
    num_right = sum(answer.text.strip() == answer.question.expected for answer in expected)
    console.print(f"\n{num_right} of {len(expected)} answers match the held-out ones exactly.")
    console.print(f"[bold]{num_distinct}[/] distinct soft prompts shared one forward pass.\n")
    _print_commands(url, base_name, questions, console, has_key=key is not None)


def _wait_until_ready(url: str, serving: threading.Thread) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    reason = "no answer"
    with httpx.Client(timeout=5.0) as http:
        while time.monotonic() < deadline:
            if not serving.is_alive():
                raise TourError("the server has ended")
            with contextlib.suppress(httpx.TransportError):
                response = http.get(f"{url}/ready")
                if response.is_success:
                    return
                reason = response.text
            time.sleep(_POLL_SECONDS)
    raise TourError(f"the server is not ready after {_READY_SECONDS:.0f} s: {reason}")


def _questions(names: list[str]) -> list[_Question]:
    """Held-out inputs of every soft prompt, and some for the base model, in random order."""
    questions = []
    for name in names:
        with (HELDOUT_DIRECTORY / f"{name}.jsonl").open(encoding="utf-8") as lines:
            pairs = [json.loads(line) for line in islice(lines, _INPUTS_PER_PROMPT)]
        questions += [_Question(pair["input"], name, pair["output"]) for pair in pairs]
    bare = [_Question(question.text, None) for question in questions[::_INPUTS_PER_PROMPT]][:_INPUTS_WITHOUT_PROMPT]
    mixed = questions + bare
    random.Random(0).shuffle(mixed)  # noqa: S311 - an order, not a secret
    return mixed


async def _burst(
    url: str, base_name: str, questions: list[_Question], headers: dict[str, str]
) -> tuple[list[_Answer], int]:
    """Send all questions at once; returns the answers, and the largest number of soft prompts in one step."""
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=_REQUEST_SECONDS) as http:
        answers = await asyncio.gather(*(_ask(http, base_name, question) for question in questions))
        metrics = (await http.get("/metrics")).raise_for_status().text
    values = (line.split()[1] for line in metrics.splitlines() if line.startswith(f"{_DISTINCT_METRIC} "))
    return answers, int(float(next(values)))


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
    table = Table("input", "soft prompt", "answer", title="One model, one batch")
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


def _print_commands(url: str, base_name: str, questions: list[_Question], console: Console, *, has_key: bool) -> None:
    """Print commands to try next, one per line, so that they can be copied."""
    auth = " -H 'Authorization: Bearer KEY'" if has_key else ""
    json_type = " -H 'Content-Type: application/json'"
    examples = {question.soft_prompt or base_name: question.text for question in questions}
    commands = []
    for model, text in sorted(examples.items()):
        body = {"model": model, "prompt": text, "temperature": 0, "max_tokens": _MAX_TOKENS}
        commands.append(f"curl {url}/v1/completions{auth}{json_type} -d {shlex.quote(json.dumps(body))}")
    model, text = next(iter(sorted(examples.items())))
    body = {"model": model, "prompt": text, "stream": True}
    commands.append(f"curl -N {url}/v1/completions{auth}{json_type} -d {shlex.quote(json.dumps(body))}")
    directories = sorted(path for path in SOFT_PROMPTS_DIRECTORY.iterdir() if path.is_dir())
    for directory in directories[:1]:
        files = " ".join(f"-F files=@{shlex.quote(str(path))}" for path in sorted(directory.glob("adapter_*")))
        commands.append(f"curl {url}/v1/prompts{auth} -F id=my-{directory.name} {files}")
    commands.append(f"curl {url}/v1/models{auth}")
    commands.append(f"curl {url}/metrics{auth}")
    console.print("Try:")
    for command in commands:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
