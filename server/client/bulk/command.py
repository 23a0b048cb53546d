"""``prelude run``: its options, output and exit status."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console

from prompt_store.files.strict_json import refuse_constant
from server.client.bulk.job import Finished, Job
from server.client.bulk.job import run as run_job
from server.client.bulk.journal import Journal, JournalError
from server.client.bulk.model_lookup import default_concurrency, resolve_model
from server.client.bulk.request_template import RequestTemplate, tier_fields
from server.client.bulk.rows import FileIdentity, identify
from server.client.bulk.sender import SendLimits
from server.client.bulk.summary import progress_bar
from server.client.bulk.transport import open_transport
from server.client.commands import DEFAULT_URL, EXIT_CODES, ApiKey, ExitStatus, Json, TaskId, Url, serving, status_of
from server.client.http import ClientError

app = typer.Typer(add_completion=False)

_LIMITS = SendLimits()

_INTERRUPTED = 130
"""The status that shells report for a process ended by SIGINT."""

_ENDS = f"{EXIT_CODES} Also for run: 4 some rows failed; 130 stopped by a signal (the same command resumes)."

_OWN_FIELDS = frozenset(
    {
        "model",
        "prompt_id",
        "prompt_ids",
        "adapter_id",
        "task_id",
        "prompt",
        "input",
        "messages",
        "labels",
        "stream",
        "n",
    }
)
"""Fields that the command sets itself, or that would give a row more than one answer."""

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", ",": ","}

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="NAME, NAME@VERSION or NAME@ALIAS, a soft prompt and an adapter as A+B, or the base model.",
    ),
]
Adapter = Annotated[str | None, typer.Option(metavar="NAME", help="An adapter beside NAME.")]
Concurrency = Annotated[
    int | None,
    typer.Option(min=1, help="Sequences in flight; default: twice the server's --max-num-seqs."),
]
RowsPerRequest = Annotated[int, typer.Option(min=1, max=1024, help="Number of rows per request.")]
Patience = Annotated[float, typer.Option(min=0.0, help="Seconds without any response before the command gives up.")]
Priority = Annotated[
    int | None,
    typer.Option(
        min=-100,
        max=100,
        help="Priority as interactive requests, instead of the service tier batch; lower is sooner.",
    ),
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Timeout of one request in seconds.")]


def parse_labels(text: str) -> tuple[str, ...]:
    r"""Parse comma-separated labels with the escapes ``\n``, ``\t``, ``\,`` and ``\\``.

    Raises:
        typer.BadParameter: If a label is empty or repeated, or has another escape.
    """
    labels, label = [], ""
    for piece in re.findall(r"\\.?|,|[^\\,]+", text, re.DOTALL):
        if piece == ",":
            labels.append(label)
            label = ""
        elif piece.startswith("\\"):
            if piece[1:] not in _ESCAPES:
                raise typer.BadParameter(f"{piece!r} is not a known escape: use \\n, \\t, \\, or \\\\")
            label += _ESCAPES[piece[1:]]
        else:
            label += piece
    labels.append(label)
    if not all(labels):
        raise typer.BadParameter("a label is empty")
    if len(set(labels)) < len(labels):
        raise typer.BadParameter("a label is repeated")
    return tuple(labels)


def parse_options(text: str) -> dict[str, Any]:
    """Parse further fields of the request body from a JSON object.

    Raises:
        typer.BadParameter: If the text is not a JSON object, or sets a field that the command sets itself.
    """
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("should be a JSON object")
    for name in sorted(_OWN_FIELDS & value.keys()):
        raise typer.BadParameter(f"{name} cannot be set by this option")
    return value


def check_characters(**given: Any) -> None:
    """Check that arguments are valid UTF-8; a shell passes any bytes.

    Raises:
        typer.BadParameter: With the name of the first argument that is not.
    """
    for name, value in given.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise typer.BadParameter(f"{name} is not valid UTF-8") from error


@app.command("run", epilog=_ENDS)
def run(
    name: ModelName,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Input rows, in JSON Lines.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", dir_okay=False, help="Output, in JSON Lines: rows with answers.")
    ],
    labels: Annotated[
        str | None, typer.Option(metavar="A,B,...", help=r"Labels to classify into; \n is a line end, \, a comma.")
    ] = None,
    classify: Annotated[
        bool | None,
        typer.Option(
            "--classify/--generate",
            help="Classify with the soft prompt's head, or generate; default: classify if it has one.",
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum number of new tokens per row.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Sampling temperature; 0: greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus sampling threshold.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    options: Annotated[str | None, typer.Option(metavar="JSON", help="Further request fields.")] = None,
    priority: Priority = None,
    task_id: TaskId = None,
    adapter: Adapter = None,
    concurrency: Concurrency = None,
    rows_per_request: RowsPerRequest = _LIMITS.rows_per_request,
    patience: Patience = _LIMITS.patience,
    timeout: Timeout = _LIMITS.timeout,
    max_errors: Annotated[
        int | None, typer.Option(min=0, help="Stop when more than this number of rows have failed.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start from the beginning and overwrite the output.")
    ] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Answer every row of a file, in order. Run the same command again to resume."""
    body = _body(max_tokens=max_tokens, temperature=temperature, top_p=top_p, stop=stop or None, seed=seed)
    body |= {} if options is None else parse_options(options)
    label_set = () if labels is None else parse_labels(labels)
    if label_set and classify is False:
        raise typer.BadParameter("--labels and --generate cannot be combined")
    check_characters(NAME=name, adapter=adapter, labels=label_set, stop=stop, options=body)
    with serving(url, api_key, as_json=as_json) as client:
        try:
            if source.exists() and not source.is_file():
                raise typer.BadParameter(f"{source} is not a regular file; the rows are read more than once")
            found = identify(source)
            if output.exists() and output.samefile(source):
                raise typer.BadParameter("IN and OUT are the same file")
            settings = {"name": name, "labels": label_set, "classify": classify, "task_id": task_id, "options": body}
            settings |= {} if adapter is None else {"adapter": adapter}
            with Journal(output, _identity(found, settings), restart=restart) as journal:
                if journal.is_new:
                    resolved = resolve_model(client, name, adapter)
                    by_head = not label_set and (resolved.has_head if classify is None else classify)
                    journal.start({"model": resolved.model, "by_head": by_head})
                notes = journal.notes
                template = RequestTemplate(
                    model=notes["model"],
                    labels=label_set,
                    by_head=notes["by_head"],
                    task_id=task_id,
                    options={**tier_fields(priority), **body},
                )
                limits = SendLimits(
                    concurrency=concurrency or default_concurrency(client, notes["model"]),
                    rows_per_request=rows_per_request,
                    patience=patience,
                    timeout=timeout,
                )
                job = Job(
                    source=source, num_rows=found.num_rows, template=template, limits=limits, max_errors=max_errors
                )
                finished = uvloop.run(_run(job, url, api_key, journal))
        except JournalError as error:
            raise ClientError(str(error)) from error
        except OSError as error:
            raise ClientError(f"{error.filename or source}: {error.strerror or error}") from error
        _end(finished, as_json=as_json)


async def _run(job: Job, url: str, api_key: str | None, journal: Journal) -> Finished:
    async with open_transport(url, api_key) as http:
        with progress_bar("rows", job.num_rows, journal.written.num_rows) as on_rows:
            return await run_job(job, http, journal, on_rows)


def _body(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _identity(found: FileIdentity, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"input": found.sha256, **settings}


def _end(finished: Finished, *, as_json: bool) -> None:
    """Report the result of a run and exit with its status."""
    summary = finished.summary
    if as_json:
        typer.echo(json.dumps(summary.as_json))
    else:
        console = Console(highlight=False, markup=False, soft_wrap=True)
        for line in summary.lines:
            console.print(line)
    if finished.reason:
        typer.echo(f"prelude: {' '.join(finished.reason.split())}; run the same command to resume", err=True)
    if summary.state == "complete":
        status = ExitStatus.INVALID if summary.errors else ExitStatus.OK
    elif finished.failure is not None:
        failure = finished.failure
        status = status_of(ClientError(str(failure), status=failure.status, code=failure.code))
        if failure.code == "timeout":
            status = ExitStatus.UNAVAILABLE
    else:
        status = ExitStatus.INVALID
    if summary.state == "interrupted":
        raise typer.Exit(_INTERRUPTED)
    if status:
        raise typer.Exit(status)
