"""The commands ``prelude eval`` and ``prelude promote``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import uvloop

from prompt_store.types import DEFAULT_ALIAS, PromptRef
from server.client.bulk.command import Adapter, Concurrency, Priority, check_characters
from server.client.bulk.model_lookup import default_concurrency, resolve_model
from server.client.bulk.sender import SenderError, SendLimits
from server.client.bulk.summary import progress_bar
from server.client.bulk.transport import open_transport
from server.client.commands import (
    DEFAULT_URL,
    EXIT_CODES,
    Alias,
    ApiKey,
    ExitStatus,
    Expect,
    Json,
    Name,
    Reason,
    Url,
    answer,
    checked,
    serving,
    status_of,
)
from server.client.evaluation.evaluator import AnswerOptions, EvaluationResult, LabelsError, evaluate_model
from server.client.evaluation.kept import (
    PATH,
    check_recordable,
    compared,
    is_evaluation,
    newest_on_same_data,
    record_evaluation,
    why_not_better_than_kept,
)
from server.client.evaluation.report import PictureError, Report, check_drawable, draw
from server.client.http import ClientError, PreludeClient
from server.client.tables import clean
from server.datasets import Conversation, DatasetError, Example, digest, read_examples
from server.evaluation.examples import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_SEPARATOR,
    EvaluatedModel,
    metric_of,
    trained_separator,
)
from server.evaluation.significance import compare

app = typer.Typer(add_completion=False)

_ENDS = f"{EXIT_CODES} Also for eval: 4 some rows have no answer."
_PROMOTED = f"{EXIT_CODES} Also for promote: 1 the version is not better."

Data = Annotated[
    Path, typer.Option(help="Labelled examples: JSON Lines, CSV, TSV, Parquet or a directory that datasets saved.")
]
Separator = Annotated[
    str | None,
    typer.Option(help=r"Separator between a text and its label; default: the one used in training, or a line end."),
]
Stop = Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")]
KeepTexts = Annotated[bool, typer.Option("--keep-texts", help="With --record, keep the texts of the rows too.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens per answer.")]


class Combine(StrEnum):
    """How the answers of an ensemble's members are combined."""

    VOTE = "vote"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class _Data:
    path: Path
    examples: Sequence[Example]
    sha256: str

    @property
    def metric(self) -> str:
        return metric_of(self.examples[0])


@app.command("eval", epilog=_ENDS)
def evaluate(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="NAME, NAME@VERSION or NAME@ALIAS, a soft prompt and an adapter as A+B, an ensemble as A,B,... or "
            "the base model.",
        ),
    ],
    data: Data,
    adapter: Adapter = None,
    against: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare with this soft prompt or version.")
    ] = None,
    against_base: Annotated[
        bool, typer.Option("--against-base", help="Compare with the model without a soft prompt.")
    ] = False,
    text_prompt: Annotated[
        str | None, typer.Option(help="Compare with the model given this instruction before each text, or around {}.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the confusion matrices to this PNG file.")
    ] = None,
    separator: Separator = None,
    ensemble: Annotated[
        Combine | None,
        typer.Option(help="How the members A,B,... of an ensemble are combined; default: vote."),
    ] = None,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate", help="Let the model answer texts that have a label, instead of scoring the labels."
        ),
    ] = False,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    stop: Stop = None,
    priority: Priority = None,
    concurrency: Concurrency = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the evaluation on the server.")] = False,
    keep_texts: KeepTexts = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Score a soft prompt on labelled examples, alone or compared with another."""
    if sum((against is not None, against_base, text_prompt is not None)) > 1:
        raise typer.BadParameter("give only one of --against, --against-base and --text-prompt")
    if keep_texts and not record:
        raise typer.BadParameter("--keep-texts needs --record")
    names = {"NAME": name, "adapter": adapter, "against": against, "text-prompt": text_prompt}
    check_characters(**names, stop=stop, separator=separator)
    with data_errors(as_json=as_json), serving(url, api_key, as_json=as_json) as client:
        examples = _read(data)
        if record:
            check_recordable(examples.examples)
            if any("," in text for text in (name, against or "")):
                raise typer.BadParameter("--record keeps evaluations of single soft prompts, not of ensembles")
        has_labels = examples.metric == "accuracy"
        if png is not None:
            check_drawable(has_labels=has_labels)
        if generate and not has_labels:
            raise typer.BadParameter("--generate needs data with labels; other data is always generated")
        if ensemble is not None and not any("," in text for text in (name, against or "")):
            raise typer.BadParameter("--ensemble needs several names, with commas between")
        options = AnswerOptions(max_tokens=max_tokens, stop=stop or (), priority=priority, generate=generate)
        first = _evaluated_model(client, name, separator, adapter, ensemble)
        if first.ensemble is not None and isinstance(examples.examples[0], Conversation):
            raise typer.BadParameter("an ensemble answers texts, not conversations")
        if generate and first.has_head:
            raise typer.BadParameter(f"--generate: {first.name} has a classification head, and does not generate")
        others = []
        if against is not None:
            others = [_evaluated_model(client, against, separator, ensemble=ensemble)]
        elif against_base or text_prompt is not None:
            base = client.models()[0]["id"]
            called = base if text_prompt is None else f"{base} with a text prompt"
            others = [EvaluatedModel(name=called, model=base, text_prompt=text_prompt, separator=first.separator)]
        limits = SendLimits(concurrency=concurrency or default_concurrency(client, _one_of(first)))
        models = [first, *others]
        found = _answers(examples, models, options, limits, url, api_key)
        report = _report(examples, models, found)
        recorded, refused = _recorded(client, examples, models, found, options, keep_texts) if record else ([], None)
    result = report.as_json | ({"recorded": [one["id"] for one in recorded]} if record else {})
    answer(result, as_json, *report.parts, *(f"recorded as {one['id']}: {one['model']}" for one in recorded))
    if refused is not None:  # the report is printed already
        typer.echo(f"prelude: the evaluation was not recorded: {clean(refused)}", err=True)
        raise typer.Exit(status_of(refused))
    if png is not None:
        try:
            draw(report, png)
        except PictureError as error:  # the report is printed already
            typer.echo(f"prelude: {clean(error)}", err=True)
            raise typer.Exit(ExitStatus.FAILED) from error
    if report.num_errors:
        raise typer.Exit(ExitStatus.INVALID)


@app.command("promote", epilog=_PROMOTED)
def promote(
    name: Name,
    version: Annotated[int, typer.Argument(metavar="V", min=1, help="Version to point at.")],
    alias: Alias = DEFAULT_ALIAS,
    expect: Expect = None,
    if_better_than: Annotated[
        str | None,
        typer.Option(
            metavar="ALIAS|V|EVALUATION",
            help="Only if its score is higher than this version's on --data, or than in this kept evaluation.",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled examples for --if-better-than.")] = None,
    significant: Annotated[
        float | None,
        typer.Option(metavar="P", min=0.0, max=1.0, help="And only if McNemar's p-value is below this."),
    ] = None,
    separator: Separator = None,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    stop: Stop = None,
    reason: Reason = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Point an alias at a version, optionally on a condition. Running requests keep their version."""
    checked(name, "name")
    checked(alias, "alias")
    is_kept = if_better_than is not None and is_evaluation(if_better_than)
    if (if_better_than is None) != (data is None) and not is_kept:
        raise typer.BadParameter("--if-better-than and --data must be given together, or name a kept evaluation")
    if significant is not None and if_better_than is None:
        raise typer.BadParameter("--significant needs --if-better-than")
    evaluation: dict[str, Any] | None = None
    why_not: str | None = None
    with data_errors(as_json=as_json), serving(url, api_key, as_json=as_json) as client:
        if if_better_than is not None:
            # Read the alias first: if it moves during the evaluation, the promotion is refused.
            now = client.prompt(name)["aliases"].get(alias)
            expect = now if expect is None else expect
            options = AnswerOptions(max_tokens=max_tokens, stop=stop or ())
            if is_kept:
                found = compare_with_kept(
                    client, (name, version), if_better_than, data, options, separator, url, api_key
                )
                if found is None:
                    _refuse(
                        f"{if_better_than} is the evaluation of version {version}: there is nothing to compare",
                        as_json,
                    )
                evaluation, why_not = found, why_not_better_than_kept(found, significant)
            elif data is not None:
                rival = f"{name}@{if_better_than}"
                try:
                    PromptRef.parse(rival)
                except ValueError as error:
                    raise typer.BadParameter(str(error)) from error
                report = compare_models(client, (f"{name}@{version}", rival), data, options, separator, url, api_key)
                if report is None:
                    _refuse(f"{rival} is already version {version}: there is nothing to compare", as_json)
                evaluation, why_not = report.as_json, why_not_better(report, significant)
            if why_not is not None:
                _refuse(f"{name}@{alias} was not moved: {why_not}", as_json, evaluation)
        reply = client.set_alias(name, alias, version, expected=expect, reason=reason)
    if evaluation is not None:
        reply = {**reply, "evaluation": evaluation}
    answer(reply, as_json, f"{name}@{alias} is version {reply['version']}")


def compare_models(
    client: PreludeClient,
    names: tuple[str, str],
    data: Path,
    options: AnswerOptions,
    separator: str | None,
    url: str,
    api_key: str | None,
) -> Report | None:
    """Score two models on the same examples; None if they are the same version.

    Raises:
        DatasetError: If the data are not valid.
        ClientError: If a model does not exist, or the server does not answer.
    """
    examples = _read(data)
    first, second = (_evaluated_model(client, name, separator) for name in names)
    if first.model == second.model:
        return None
    limits = SendLimits(concurrency=default_concurrency(client, _one_of(first)))
    models = [first, second]
    return _report(examples, models, _answers(examples, models, options, limits, url, api_key))


def compare_with_kept(
    client: PreludeClient,
    candidate: tuple[str, int],
    evaluation_id: str,
    data: Path | None,
    options: AnswerOptions,
    separator: str | None,
    url: str,
    api_key: str | None,
) -> dict[str, Any] | None:
    """Compare a version with a kept evaluation; None if that is of the same version.

    Args:
        client: Client of the server.
        candidate: Name and version.
        evaluation_id: The kept evaluation.
        data: Its data, to score the version now, and keep that too; None for the version's newest kept evaluation.
        options: How answers are generated.
        separator: Text between a text and its label; None for the one used in training.
        url: URL of the server.
        api_key: API key of the server.

    Raises:
        DatasetError: If the data are not valid.
        ClientError: If there is no such evaluation, or none of the version on the same data.
    """
    name, version = candidate
    named = client.call("GET", f"{PATH}/{evaluation_id}")
    if (named["prompt_id"], named["version"]) == candidate:
        return None
    if data is None:
        return compared(client, newest_on_same_data(client, name, version, named), named)
    examples = _read(data)
    if examples.sha256 != named["dataset_digest"]:
        raise ClientError(f"{data} is not the data of {evaluation_id}: its SHA-256 is another", code="usage")
    evaluated = _evaluated_model(client, f"{name}@{version}", separator)
    limits = SendLimits(concurrency=default_concurrency(client, _one_of(evaluated)))
    found = _answers(examples, [evaluated], options, limits, url, api_key)
    kept = record_evaluation(
        client, examples.examples, evaluated, found[0], data=data, sha256=examples.sha256, options=options
    )
    return compared(client, kept, named)


def why_not_better(report: Report, significant: float | None) -> str | None:
    """Why the first model is not better; None if it is. ``significant`` bounds McNemar's p-value."""
    (ours, theirs), found = report.scores, report.comparison
    if found is None:
        raise TypeError("two models are compared")
    metric, names = report.metric.replace("_", " "), report.names
    scores = f"{metric} {ours.accuracy:.4f} for {names[0]} against {theirs.accuracy:.4f} for {names[1]}"
    rows = f"on {found.num_rows} rows"
    if report.num_errors:
        error = next(error for error in report.first_errors if error is not None)
        return f"{report.num_errors} rows have no answer ({error})"
    if found.only_first <= found.only_second:
        return f"{scores} {rows} is not better"
    if significant is not None and found.p_value >= significant:
        return (
            f"{scores} {rows} is not significant: McNemar's p-value is {found.p_value:.3g}, not below {significant:g}"
        )
    return None


def _refuse(reason: str, as_json: bool, evaluation: Mapping[str, Any] | None = None) -> NoReturn:
    if as_json:
        error = {"message": reason, "type": "client_error", "param": None, "code": "not_better"}
        typer.echo(json.dumps({"error": error, "evaluation": evaluation}))
    typer.echo(f"prelude: {clean(reason)}", err=True)
    raise typer.Exit(ExitStatus.FAILED)


def _read(path: Path) -> _Data:
    return _Data(path, read_examples(path), digest(path))


def _evaluated_model(
    client: PreludeClient,
    name: str,
    separator: str | None,
    adapter: str | None = None,
    ensemble: Combine | None = None,
) -> EvaluatedModel:
    """Resolve a name, or the names of an ensemble with commas between, to a model to evaluate."""
    names = [part.strip() for part in name.split(",")]
    if len(names) > 1 and adapter is not None:
        raise typer.BadParameter("--adapter cannot be combined with an ensemble: name its pairs as A+B")
    members = [resolve_model(client, part, adapter) for part in names]
    records: list[Mapping[str, Any]] = [member.record or {} for member in members]
    if separator is None:
        known = {
            text
            for record in records
            if (text := trained_separator(record.get("format"), record.get("metadata"))) is not None
        }
        if len(known) > 1:
            raise typer.BadParameter(
                "the members of the ensemble were trained with other separators: give --separator"
            )
        separator = known.pop() if known else DEFAULT_SEPARATOR
    versions = tuple(member.model for member in members)
    mode = (ensemble or Combine.VOTE) if len(members) > 1 else None
    return EvaluatedModel(
        name=", ".join(versions) if mode is None else f"{', '.join(versions)} ({mode})",
        model=versions[0] if mode is None else versions,
        ensemble=mode,
        has_head=members[0].has_head,
        has_tasks=any(record.get("num_tasks") for record in records),
        separator=separator,
    )


def _one_of(evaluated: EvaluatedModel) -> str:
    """A served model's name: itself, or the first member."""
    return evaluated.model if isinstance(evaluated.model, str) else evaluated.model[0]


def _answers(
    data: _Data,
    models: Sequence[EvaluatedModel],
    options: AnswerOptions,
    limits: SendLimits,
    url: str,
    api_key: str | None,
) -> list[EvaluationResult]:
    """Score the models one after another."""

    async def score_all() -> list[EvaluationResult]:
        found = []
        async with open_transport(url, api_key) as http:
            for evaluated in models:
                with progress_bar(evaluated.name, len(data.examples), 0) as on_rows:
                    found.append(await evaluate_model(data.examples, evaluated, options, http, limits, on_rows))
        return found

    try:
        return uvloop.run(score_all())
    except SenderError as error:
        raise ClientError(str(error), status=error.status, code=error.code) from error


def _report(data: _Data, models: Sequence[EvaluatedModel], found: Sequence[EvaluationResult]) -> Report:
    scores = [answers.scores for answers in found]
    return Report(
        data=str(data.path),
        sha256=data.sha256,
        metric=data.metric,
        names=[evaluated.name for evaluated in models],
        scores=scores,
        first_errors=[answers.first_error for answers in found],
        comparison=compare(scores[0].right, scores[1].right) if len(scores) > 1 else None,
    )


def _recorded(
    client: PreludeClient,
    data: _Data,
    models: Sequence[EvaluatedModel],
    found: Sequence[EvaluationResult],
    options: AnswerOptions,
    keeps_texts: bool,
) -> tuple[list[dict[str, Any]], ClientError | None]:
    """Record the evaluations of all models; those that were recorded, and why the others were not."""
    recorded: list[dict[str, Any]] = []
    try:
        for evaluated, result in zip(models, found, strict=True):
            kept = record_evaluation(
                client,
                data.examples,
                evaluated,
                result,
                data=data.path,
                sha256=data.sha256,
                options=options,
                keeps_texts=keeps_texts,
            )
            recorded.append(kept)
    except ClientError as error:
        return recorded, error
    return recorded, None


@contextmanager
def data_errors(*, as_json: bool) -> Iterator[None]:
    """Report invalid data or a failed picture, one line per fault, and exit."""
    try:
        yield
    except (DatasetError, LabelsError, PictureError) as error:
        is_data = not isinstance(error, PictureError)
        if as_json:
            code = "invalid_data" if is_data else "local"
            body = {"message": str(error), "type": "client_error", "param": None, "code": code}
            typer.echo(json.dumps({"error": body}))
        for line in str(error).splitlines():
            typer.echo(f"prelude: {clean(line)}", err=True)
        raise typer.Exit(ExitStatus.INVALID if is_data else ExitStatus.FAILED) from error
