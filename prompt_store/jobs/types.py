"""Evaluations and training runs as the catalog records them. Times are microseconds since 1970, UTC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class EvaluationStatus(StrEnum):
    """The states of an evaluation."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether it never changes again."""
        return self in (EvaluationStatus.COMPLETED, EvaluationStatus.FAILED, EvaluationStatus.CANCELLED)


class Outcome(StrEnum):
    """The result of one row."""

    RIGHT = "right"
    WRONG = "wrong"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """One row of an evaluation.

    Attributes:
        line: Its line in the data, from 1.
        outcome: Its result; None until it has one.
        expected: The label; the expected text only if texts are kept.
        answer: The answered label; an answered text only if texts are kept.
        text: The row as JSON while it waits, afterwards only if texts are kept.
        error: Why it has no answer.
    """

    line: int
    outcome: Outcome | None = None
    expected: str | None = None
    answer: str | None = None
    text: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation of one model on labelled rows.

    Attributes:
        id: ``eval-`` and 32 hexadecimal digits.
        owner: The tenant that alone sees it; empty for callers without a tenant.
        key: The API key that its requests are sent with, as in the history; None without keys.
        name: What the caller calls it; may be empty.
        model: What was asked: the base, ``NAME@VERSION``, or two of these with ``+`` between.
        prompt: Name of the soft prompt or, without one, of the adapter; None for the base.
        version: Its version.
        is_recorded: Whether a client sent the finished answers, rather than rows to answer here.
        status: Its state.
        dataset: Name of the data; may be empty.
        dataset_digest: SHA-256 of the data, in hexadecimal.
        metric: ``accuracy`` of labels, or ``exact_match`` of texts.
        settings: How the requests were made, as JSON values.
        total: Number of rows.
        right: Rows with the right answer.
        errors: Rows without an answer.
        answered: Rows with any outcome.
        scores: What was computed from the outcomes; None until it is over.
        failure: Why it failed.
        created_at: When it was created.
        started_at: When the first row was sent; None before.
        finished_at: When it reached its last state; None before.
    """

    id: str
    owner: str
    key: str | None
    name: str
    model: str
    prompt: str | None
    version: int | None
    is_recorded: bool
    status: EvaluationStatus
    dataset: str
    dataset_digest: str
    metric: str
    settings: Mapping[str, object] = field(default_factory=dict)
    total: int
    right: int = 0
    errors: int = 0
    answered: int = 0
    scores: Mapping[str, object] | None = None
    failure: str | None = None
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFilter:
    """Which evaluations to list; None does not restrict.

    Attributes:
        prompt: Only of this soft prompt or adapter.
        version: Only of this version of it.
        model: Only of exactly this model.
        dataset_digest: Only on these data.
        status: Only in this state.
    """

    prompt: str | None = None
    version: int | None = None
    model: str | None = None
    dataset_digest: str | None = None
    status: EvaluationStatus | None = None


class RunStatus(StrEnum):
    """The states of a training run, as its client reports them."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def is_over(self) -> bool:
        """Whether the training has ended."""
        return self is not RunStatus.RUNNING


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A training that a client reports.

    Attributes:
        id: ``run-`` and 32 hexadecimal digits, chosen by the client.
        owner: The tenant that alone sees it; empty for callers without a tenant.
        key: The API key that reports it, as in the history; None without keys.
        name: The soft prompt or adapter that is trained.
        method: The training method.
        base: Name of the base model.
        status: Its state.
        step: Optimizer steps done.
        num_steps: Optimizer steps planned; None if that is not known.
        settings: The settings, as JSON values.
        scores: Scores by stage, such as ``untrained`` and ``trained``; None before the end.
        golden_check: The comparison of the server with PEFT; None without one.
        version: The version that it published; None if it published none.
        alias: The alias that was moved; None if it published none.
        failure: Why it failed.
        warnings: Warnings about the training.
        best_step: The step whose state was saved.
        started_at: When the training began, by the client's clock.
        updated_at: When the last report arrived.
        finished_at: When the training ended, by the client's clock; None before.
    """

    id: str
    owner: str
    key: str | None
    name: str
    method: str
    base: str
    status: RunStatus
    step: int = 0
    num_steps: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    scores: Mapping[str, object] | None = None
    golden_check: Mapping[str, object] | None = None
    version: int | None = None
    alias: str | None = None
    failure: str | None = None
    warnings: Sequence[str] = ()
    best_step: int | None = None
    started_at: int
    updated_at: int
    finished_at: int | None = None


@dataclass(frozen=True, slots=True)
class RunPoint:
    """The metrics of a training at one step.

    Attributes:
        step: Optimizer steps done.
        values: Numbers by name, such as ``loss`` and ``eval_accuracy``; only finite ones.
    """

    step: int
    values: Mapping[str, float]
