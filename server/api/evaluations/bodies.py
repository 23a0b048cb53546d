"""Request and response bodies of evaluations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from prompt_store.jobs.types import Evaluation, EvaluationRow, EvaluationStatus, Outcome
from server.api.prompts.bodies import ObjectType
from server.api.request_body import RequestBody
from server.evaluation.examples import DEFAULT_MAX_TOKENS

MAX_ROWS = 5_000
MAX_DATA_BYTES = 8 * 1024 * 1024
MAX_LABEL_CHARS = 512

_MICROSECONDS = 1_000_000


class RecordedRow(RequestBody):
    """One row that a client has evaluated."""

    line: int = Field(ge=1, le=2**31 - 1, description="Its line in the data, from 1.")
    expected: str | None = Field(None, description="The label; of other data the expected text, if it is to be kept.")
    answer: str | None = Field(None, description="The answered label; of other data the answer, if it is to be kept.")
    right: bool | None = Field(None, description="Whether the answer is right; with `exact_match` alone.")
    error: str | None = Field(None, max_length=2000, description="Why there is no answer.")
    text: str | None = Field(None, description="What was asked, if it is to be kept.")


class NewEvaluation(RequestBody):
    """``POST /v1/evaluations``: data to be answered here, or rows that were answered already."""

    model: str = Field(
        min_length=1, max_length=300, description="The base, a soft prompt, a version, an alias, or a pair."
    )
    name: str = Field("", max_length=200, description="What to call it.")
    dataset: str = Field("", max_length=300, description="What to call the data, such as the name of its file.")
    data: str | None = Field(
        None,
        max_length=MAX_DATA_BYTES,
        description=f"At most {MAX_ROWS} labelled examples in JSON Lines, to be answered in the tier `batch`.",
    )
    rows: list[RecordedRow] | None = Field(
        None, min_length=1, max_length=MAX_ROWS, description="Rows that were answered already, instead of `data`."
    )
    dataset_digest: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="SHA-256 of the data, in hexadecimal; only with `rows`."
    )
    metric: Literal["accuracy", "exact_match"] | None = Field(
        None, description="`accuracy` of labels, or `exact_match` of texts; only with `rows`."
    )
    separator: str | None = Field(
        None, max_length=64, description="Text between a text and its label; default: the one used in training."
    )
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=1, le=2**31 - 1, description="New tokens of an answer at most.")
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default_factory=list, max_length=4, description="Stop strings."
    )
    text_prompt: str | None = Field(
        None, max_length=16_384, description="Instruction before each text, or around `{}`."
    )
    keep_texts: bool = Field(
        False, description="Whether to keep the texts of the rows; labels and outcomes are always kept."
    )


class LabelScores(BaseModel):
    """Scores of one label."""

    precision: float = Field(description="Share of the rows answered with this label that have it.")
    recall: float = Field(description="Share of the rows with this label that were answered with it.")
    f1: float = Field(description="Harmonic mean of precision and recall.")
    support: int = Field(description="Rows with this label.")


class Confusion(BaseModel):
    """A confusion matrix."""

    labels: list[str] = Field(description="The labels; the last one, `(other)`, is for errors and foreign labels.")
    counts: list[list[int]] = Field(description="Rows by label (outer list) and answer (inner list).")


class EvaluationScores(BaseModel):
    """What follows from the outcomes of all rows."""

    accuracy: float = Field(description="Share of right answers; rows without an answer count as wrong.")
    interval: tuple[float, float] = Field(description="Its 95% confidence interval (Wilson).")
    macro_f1: float | None = Field(description="Plain mean of the labels' F1; null without labels.")
    labels: dict[str, LabelScores] | None = Field(
        description="Scores by label; null without labels, with more than 500, and in lists."
    )
    confusion: Confusion | None = Field(
        description="The confusion matrix; null without labels, with more than 64, and in lists."
    )


class EvaluationSettings(BaseModel):
    """Settings of an evaluation's requests."""

    separator: str | None = Field(description="Text between a text and its label; null for a head.")
    max_tokens: int = Field(description="New tokens of an answer at most.")
    stop: list[str] = Field(description="Stop strings.")
    text_prompt: str | None = Field(description="Instruction before each text, or around `{}`.")


class RowCounts(BaseModel):
    """An evaluation's rows by outcome."""

    total: int = Field(description="All rows.")
    answered: int = Field(description="Rows with an outcome.")
    right: int = Field(description="Rows with the right answer.")
    errors: int = Field(description="Rows without an answer.")


class EvaluationBody(BaseModel):
    """An evaluation of one model on labelled rows."""

    object: ObjectType = "evaluation"
    id: str = Field(description="Id of the evaluation.")
    name: str = Field(description="What its creator calls it.")
    model: str = Field(description="What was asked, with versions.")
    prompt_id: str | None = Field(description="The soft prompt or, without one, the adapter; null for the base.")
    version: int | None = Field(description="Its version.")
    source: Literal["client", "server"] = Field(description="Who has sent the rows to the model.")
    status: EvaluationStatus = Field(description="Its state.")
    dataset: str = Field(description="Name of the data.")
    dataset_digest: str = Field(description="SHA-256 of the data, in hexadecimal.")
    metric: str = Field(description="`accuracy` of labels, or `exact_match` of texts.")
    settings: EvaluationSettings = Field(description="How the rows were asked.")
    keep_texts: bool = Field(description="Whether the texts of the rows are kept.")
    rows: RowCounts = Field(description="Numbers of rows.")
    scores: EvaluationScores | None = Field(description="Null until it is completed.")
    error: str | None = Field(description="Why it failed.")
    created_by: str | None = Field(description="The API key, as in the history.")
    created_at: int = Field(description="Unix time in seconds.")
    started_at: int | None = Field(description="When the first row was sent; Unix time in seconds.")
    finished_at: int | None = Field(description="When it ended; Unix time in seconds.")

    @classmethod
    def of(cls, found: Evaluation, *, is_whole: bool = False) -> EvaluationBody:
        """Convert an evaluation; scores by label only if the whole is asked for."""
        settings: dict[str, Any] = dict(found.settings)
        scores: dict[str, Any] | None = None
        if found.scores is not None:
            scores = dict(found.scores)
            if not is_whole:
                scores |= {"labels": None, "confusion": None}
        return cls(
            id=found.id,
            name=found.name,
            model=found.model,
            prompt_id=found.prompt,
            version=found.version,
            source="client" if found.is_recorded else "server",
            status=found.status,
            dataset=found.dataset,
            dataset_digest=found.dataset_digest,
            metric=found.metric,
            settings=EvaluationSettings(
                separator=settings.get("separator"),
                max_tokens=settings["max_tokens"],
                stop=settings["stop"],
                text_prompt=settings.get("text_prompt"),
            ),
            keep_texts=settings["keep_texts"],
            rows=RowCounts(total=found.total, answered=found.answered, right=found.right, errors=found.errors),
            scores=None if scores is None else EvaluationScores.model_validate(scores),
            error=found.failure,
            created_by=found.key,
            created_at=found.created_at // _MICROSECONDS,
            started_at=None if found.started_at is None else found.started_at // _MICROSECONDS,
            finished_at=None if found.finished_at is None else found.finished_at // _MICROSECONDS,
        )


class EvaluationList(BaseModel):
    """A page of evaluations, newest first."""

    object: ObjectType = "list"
    data: list[EvaluationBody] = Field(description="The evaluations, newest first.")
    has_more: bool = Field(description="Whether there is another page.")
    last_id: str | None = Field(description="Value of `after` that fetches the next page.")


class EvaluationDeleted(BaseModel):
    """A deleted evaluation."""

    id: str = Field(description="Id of the evaluation.")
    object: ObjectType = "evaluation"
    deleted: Annotated[bool, Field(description="Always true.")] = True


class RowBody(BaseModel):
    """One row of an evaluation."""

    row: int = Field(description="Its number, from 0.")
    line: int = Field(description="Its line in the data, from 1.")
    outcome: Outcome | None = Field(description="Its result; null until it has one.")
    expected: str | None = Field(description="The label; the expected text only if texts are kept.")
    answer: str | None = Field(description="The answered label; an answered text only if texts are kept.")
    text: str | None = Field(description="The row, if texts are kept.")
    error: str | None = Field(description="Why it has no answer.")

    @classmethod
    def of(cls, number: int, row: EvaluationRow, *, shows_text: bool) -> RowBody:
        """Convert a row; while an evaluation runs, texts are there that it does not keep."""
        return cls(
            row=number,
            line=row.line,
            outcome=row.outcome,
            expected=row.expected,
            answer=row.answer,
            text=row.text if shows_text else None,
            error=row.error,
        )


class RowList(BaseModel):
    """A page of rows, in order."""

    object: ObjectType = "list"
    data: list[RowBody] = Field(description="The rows, in order.")
    has_more: bool = Field(description="Whether there is another page.")
    last_row: int | None = Field(description="Value of `after` that fetches the next page.")


class DifferingRow(BaseModel):
    """A row that one of two models answers correctly, and the other does not."""

    row: int = Field(description="Its number, from 0.")
    line: int = Field(description="Its line in the data, from 1.")
    right: Literal["first", "second"] = Field(description="Which of the two answers it correctly.")
    expected: str | None = Field(description="The label; the expected text only if texts are kept.")
    first_answer: str | None = Field(description="The first model's answer; null for an error, or if it is not kept.")
    second_answer: str | None = Field(description="The second model's answer, likewise.")
    text: str | None = Field(description="The row, if one of the evaluations keeps texts.")


class EvaluationComparison(BaseModel):
    """Two evaluations on the same rows."""

    object: ObjectType = "evaluation_comparison"
    first: EvaluationBody = Field(description="The one in the path.")
    second: EvaluationBody = Field(description="The one it is compared with.")
    rows: int = Field(description="Number of rows.")
    both_right: int = Field(description="Rows that both answer correctly.")
    only_first: int = Field(description="Rows that only the first answers correctly.")
    only_second: int = Field(description="Rows that only the second answers correctly.")
    both_wrong: int = Field(description="Rows that neither answers correctly.")
    difference: float = Field(description="Accuracy of the first minus that of the second.")
    interval: tuple[float, float] = Field(
        description="Its 95% confidence interval: percentiles of a bootstrap over rows."
    )
    p_value: float = Field(description="Two-sided p-value of McNemar's exact test.")
    data: list[DifferingRow] = Field(description="Rows that only one of the two answers correctly, in order.")
    has_more: bool = Field(description="Whether there are more of them.")
    last_row: int | None = Field(description="Value of `after` that fetches the next page.")
