"""New evaluations: the model is resolved to versions, and data and rows are checked."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from prompt_store.jobs.types import Evaluation, EvaluationRow, EvaluationStatus, Outcome
from prompt_store.types import PromptVersion, TaskType
from server.api.evaluations.asking import scores_of
from server.api.evaluations.bodies import MAX_LABEL_CHARS, MAX_ROWS, NewEvaluation, RecordedRow
from server.api.inference.pair import versions_of
from server.api.inference.target import resolve
from server.api.keys.callers import Caller
from server.api.services import Services
from server.api.soft_prompts.engine_source import full_name
from server.datasets import DatasetError, Example, LabelledText, parse_examples
from server.errors import InvalidRequestError
from server.evaluation.examples import DEFAULT_SEPARATOR, expected_of, metric_of, trained_separator


async def create(services: Services, caller: Caller, body: NewEvaluation) -> Evaluation:
    """Check and store an evaluation.

    Raises:
        NotFoundError: If the model does not exist.
        InvalidRequestError: If the data or the rows are not valid; with every fault.
        JobsFullError: If too many evaluations of the tenant are not over.
    """
    target = resolve(body.model, None, base_name=services.base_name, access=caller.access)
    versions = await versions_of(services, target)
    if (body.data is None) == (body.rows is None):
        raise InvalidRequestError("data: either data or rows must be given", param="data")
    store = services.store
    evaluation, rows = await store.call(_checked, body, versions, services.base_name, caller)
    await store.call(store.evaluations.add, evaluation, rows)
    return evaluation


def _checked(
    body: NewEvaluation, versions: Sequence[PromptVersion], base_name: str, caller: Caller
) -> tuple[Evaluation, list[EvaluationRow]]:
    now = time.time_ns() // 1000
    scores = None
    if body.data is not None:
        for name in ("dataset_digest", "metric"):
            if getattr(body, name) is not None:
                raise InvalidRequestError(f"{name}: follows from data; give it with rows alone", param=name)
        data = body.data.encode()
        examples = _examples(data)
        rows = [
            _waiting(example, line, keeps=body.keep_texts)
            for example, line in zip(examples, _lines(data), strict=True)
        ]
        metric, digest = metric_of(examples[0]), hashlib.sha256(data).hexdigest()
        status = EvaluationStatus.QUEUED
    else:
        if body.metric is None or body.dataset_digest is None:
            missing = "metric" if body.metric is None else "dataset_digest"
            raise InvalidRequestError(f"{missing}: must be given with rows", param=missing)
        rows = [_recorded(number, row, body) for number, row in enumerate(body.rows or [])]
        metric, digest, status = body.metric, body.dataset_digest, EvaluationStatus.COMPLETED
        scores = scores_of(rows, metric)
    is_over = status.is_over
    outcomes = [row.outcome for row in rows]
    first = versions[0] if versions else None
    evaluation = Evaluation(
        id=f"eval-{secrets.token_hex(16)}",
        owner=caller.tenant,
        key=caller.name,
        name=_clean(body.name),
        model="+".join(map(full_name, versions)) or base_name,
        prompt=None if first is None else first.name,
        version=None if first is None else first.version,
        is_recorded=is_over,
        status=status,
        dataset=_clean(body.dataset),
        dataset_digest=digest,
        metric=metric,
        settings=_settings(body, versions),
        total=len(rows),
        right=outcomes.count(Outcome.RIGHT),
        errors=outcomes.count(Outcome.ERROR),
        answered=len(rows) if is_over else 0,
        scores=scores,
        created_at=now,
        started_at=now if is_over else None,
        finished_at=now if is_over else None,
    )
    return evaluation, rows


def _settings(body: NewEvaluation, versions: Sequence[PromptVersion]) -> dict[str, Any]:
    """How the rows are asked; ``by_head`` and ``has_tasks`` follow from the versions."""
    by_head = any(version.task_type == TaskType.SEQ_CLS for version in versions)
    separator = body.separator
    if separator is None and not by_head:
        known = None
        if versions:
            first = versions[0]
            known = trained_separator(None if first.format is None else first.format.to_json(), first.metadata)
        separator = known or DEFAULT_SEPARATOR
    return {
        "separator": separator,
        "max_tokens": body.max_tokens,
        "stop": body.stop,
        "text_prompt": body.text_prompt,
        "keep_texts": body.keep_texts,
        "by_head": by_head,
        "has_tasks": bool(versions and versions[0].num_tasks),
    }


def _examples(data: bytes) -> list[Example]:
    try:
        examples = parse_examples(data, "data")
    except DatasetError as error:
        first_line, first_reason = error.faults[0]
        where = f"line {first_line}: " if first_line else ""
        more = f" (and {error.num_faults - 1} more faults)" if error.num_faults > 1 else ""
        invalid = InvalidRequestError(f"data: {where}{first_reason}{more}", param="data")
        invalid.details = [{"code": "invalid_row", "message": reason, "line": line} for line, reason in error.faults]
        raise invalid from error
    if len(examples) > MAX_ROWS:
        raise InvalidRequestError(f"data: has {len(examples)} rows, of at most {MAX_ROWS}", param="data")
    for example in examples:
        if isinstance(example, LabelledText) and len(example.label) > MAX_LABEL_CHARS:
            raise InvalidRequestError(
                f"data: line {example.line}: the label has more than {MAX_LABEL_CHARS} characters", param="data"
            )
    return examples


def _lines(data: bytes) -> list[str]:
    """The lines that are not blank, as they are stored."""
    text = data.decode().removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    return [line.strip() for line in text.split("\n") if line.strip()]


def _waiting(example: Example, source: str, *, keeps: bool) -> EvaluationRow:
    expected = expected_of(example) if keeps or isinstance(example, LabelledText) else None
    return EvaluationRow(line=example.line, expected=expected, text=source)


def _recorded(number: int, row: RecordedRow, body: NewEvaluation) -> EvaluationRow:
    """A row with its outcome, which follows from label and answer where there are labels."""

    def refuse(reason: str) -> InvalidRequestError:
        return InvalidRequestError(f"rows[{number}]: {reason}", param=f"rows[{number}]")

    if row.error is not None and (row.right or row.answer is not None):
        raise refuse("has an error, and so neither an answer nor right")
    kept: tuple[str | None, str | None]
    if body.metric == "accuracy":
        if row.expected is None or len(row.expected) > MAX_LABEL_CHARS:
            raise refuse(f"expected must be a label of at most {MAX_LABEL_CHARS} characters")
        if row.error is None and (row.answer is None or len(row.answer) > MAX_LABEL_CHARS):
            raise refuse(f"answer must be a label of at most {MAX_LABEL_CHARS} characters, or there must be an error")
        if row.right is not None and row.right is not (row.answer == row.expected):
            raise refuse("right does not follow from expected and answer")
        is_right, kept = row.answer == row.expected, (row.expected, row.answer)
    else:
        if row.error is None and row.right is None:
            raise refuse("either right or error must be given")
        is_right = row.right is True
        kept = (row.expected, row.answer) if body.keep_texts else (None, None)
    outcome = Outcome.ERROR if row.error is not None else Outcome.RIGHT if is_right else Outcome.WRONG
    return EvaluationRow(
        line=row.line,
        outcome=outcome,
        expected=kept[0],
        answer=kept[1],
        text=row.text if body.keep_texts else None,
        error=row.error,
    )


def _clean(text: str) -> str:
    """A name on one line, without control characters, which a database may not store."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
