"""Request and response bodies of training runs."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, model_validator

from prompt_store.jobs.types import RunPoint, RunStatus, TrainingRun
from prompt_store.types import check_name
from server.api.keys.callers import Caller
from server.api.prompts.bodies import ObjectType
from server.api.request_body import RequestBody

MAX_POINTS = 1000
"""Points of one request."""

MAX_SETTINGS_BYTES = 64 * 1024
SILENT_SECONDS = 15 * 60
"""A running training that has not reported for this long is shown as silent."""

_MICROSECONDS = 1_000_000
_MAX_STEPS = 2**53
_MAX_TIME = 2**40

Step = Annotated[int, Field(ge=0, le=_MAX_STEPS)]
Seconds = Annotated[int, Field(ge=0, le=_MAX_TIME)]
RunName = Annotated[str, AfterValidator(lambda name: check_name(name, "prompt_id"))]
AliasName = Annotated[str, AfterValidator(lambda name: check_name(name, "alias"))]
MeasureName = Annotated[str, Field(min_length=1, max_length=64)]


class ReportedRun(RequestBody):
    """``PUT /v1/runs/{run_id}``: all that is known about a training."""

    prompt_id: RunName = Field(description="The soft prompt or adapter that is trained.")
    method: str = Field(min_length=1, max_length=64, description="Training method.")
    base_model: str = Field("", max_length=512, description="Name of the base model.")
    status: RunStatus = Field(strict=False, description="Its state.")
    step: Step = Field(0, description="Optimizer steps done.")
    num_steps: Step | None = Field(None, description="Optimizer steps planned.")
    settings: dict[str, Any] = Field(default_factory=dict, description="The settings, without texts and paths.")
    scores: dict[str, Any] | None = Field(None, description="Scores by stage, such as `untrained` and `trained`.")
    golden_check: dict[str, Any] | None = Field(None, description="The comparison of the server with PEFT.")
    version: Annotated[int, Field(ge=1, le=2**53)] | None = Field(None, description="The version that it published.")
    alias: AliasName | None = Field(None, description="The alias that was moved to that version.")
    error: str | None = Field(None, max_length=4000, description="Why it failed.")
    warnings: list[Annotated[str, Field(max_length=2000)]] = Field(
        default_factory=list, max_length=100, description="Warnings about the training."
    )
    best_step: Step | None = Field(None, description="The step whose state was saved.")
    started_at: Seconds = Field(description="When it began; Unix time in seconds.")
    finished_at: Seconds | None = Field(None, description="When it ended; Unix time in seconds.")

    @model_validator(mode="after")
    def _check_sizes(self) -> ReportedRun:
        for name in ("settings", "scores", "golden_check"):
            if len(json.dumps(getattr(self, name))) > MAX_SETTINGS_BYTES:
                raise ValueError(f"{name} has more than {MAX_SETTINGS_BYTES} bytes")
        return self

    def run(self, run_id: str, caller: Caller) -> TrainingRun:
        """The run, as it is stored."""
        return TrainingRun(
            id=run_id,
            owner=caller.tenant,
            key=caller.name,
            name=self.prompt_id,
            method=_storable(self.method),
            base=_storable(self.base_model),
            status=self.status,
            step=self.step,
            num_steps=self.num_steps,
            settings=self.settings,
            scores=self.scores,
            golden_check=self.golden_check,
            version=self.version,
            alias=self.alias,
            failure=self.error,
            warnings=tuple(self.warnings),
            best_step=self.best_step,
            started_at=self.started_at * _MICROSECONDS,
            updated_at=time.time_ns() // 1000,
            finished_at=None if self.finished_at is None else self.finished_at * _MICROSECONDS,
        )


class ReportedPoint(RequestBody):
    """The metrics at one step."""

    step: Step = Field(description="Optimizer steps done.")
    values: dict[MeasureName, float] = Field(
        min_length=1, max_length=16, description="Numbers by name, such as `loss`, `eval_loss` and `eval_accuracy`."
    )


class ReportedPoints(RequestBody):
    """``POST /v1/runs/{run_id}/metrics``."""

    data: list[ReportedPoint] = Field(
        min_length=1, max_length=MAX_POINTS, description="Points; a step that is known gets the new numbers."
    )
    after_step: Annotated[int, Field(ge=-1, le=_MAX_STEPS)] | None = Field(
        None, description="Drop earlier metrics of later steps first: the training resumes from this step."
    )

    def points(self) -> list[RunPoint]:
        """The points, one a step."""
        found: dict[int, dict[str, float]] = {}
        for point in self.data:
            found.setdefault(point.step, {}).update(point.values)
        return [RunPoint(step, values) for step, values in found.items()]


class RunBody(BaseModel):
    """A training run."""

    object: ObjectType = "run"
    id: str = Field(description="Id of the run.")
    prompt_id: str = Field(description="The soft prompt or adapter that is trained.")
    method: str = Field(description="Training method.")
    base_model: str = Field(description="Name of the base model.")
    status: RunStatus = Field(description="Its state, as it was reported last.")
    is_silent: bool = Field(description="Whether it counts as running, and has not reported for 15 minutes.")
    step: int = Field(description="Optimizer steps done.")
    num_steps: int | None = Field(description="Optimizer steps planned.")
    settings: dict[str, Any] = Field(description="The settings.")
    scores: dict[str, Any] | None = Field(description="Scores by stage, such as `untrained` and `trained`.")
    golden_check: dict[str, Any] | None = Field(description="The comparison of the server with PEFT.")
    version: int | None = Field(description="The version that it published.")
    alias: str | None = Field(description="The alias that was moved to that version.")
    error: str | None = Field(description="Why it failed.")
    warnings: list[str] = Field(description="Warnings about the training.")
    best_step: int | None = Field(description="The step whose state was saved.")
    created_by: str | None = Field(description="The API key that reports it, as in the history.")
    started_at: int = Field(description="When it began; Unix time in seconds.")
    updated_at: int = Field(description="When it was last reported; Unix time in seconds.")
    finished_at: int | None = Field(description="When it ended; Unix time in seconds.")

    @classmethod
    def of(cls, run: TrainingRun) -> RunBody:
        """Convert a run."""
        silent_for = time.time() - run.updated_at / _MICROSECONDS
        return cls(
            id=run.id,
            prompt_id=run.name,
            method=run.method,
            base_model=run.base,
            status=run.status,
            is_silent=not run.status.is_over and silent_for > SILENT_SECONDS,
            step=run.step,
            num_steps=run.num_steps,
            settings=dict(run.settings),
            scores=None if run.scores is None else dict(run.scores),
            golden_check=None if run.golden_check is None else dict(run.golden_check),
            version=run.version,
            alias=run.alias,
            error=run.failure,
            warnings=list(run.warnings),
            best_step=run.best_step,
            created_by=run.key,
            started_at=run.started_at // _MICROSECONDS,
            updated_at=run.updated_at // _MICROSECONDS,
            finished_at=None if run.finished_at is None else run.finished_at // _MICROSECONDS,
        )


class RunList(BaseModel):
    """A page of runs, latest start first."""

    object: ObjectType = "list"
    data: list[RunBody] = Field(description="The runs, latest start first.")
    has_more: bool = Field(description="Whether there is another page.")
    last_id: str | None = Field(description="Value of `after` that fetches the next page.")


class RunDeleted(BaseModel):
    """A deleted run."""

    id: str = Field(description="Id of the run.")
    object: ObjectType = "run"
    deleted: Annotated[bool, Field(description="Always true.")] = True


class PointBody(BaseModel):
    """The metrics at one step."""

    step: int = Field(description="Optimizer steps done.")
    values: dict[str, float] = Field(description="Numbers by name.")


class PointList(BaseModel):
    """The metrics of a run, by step."""

    object: ObjectType = "list"
    data: list[PointBody] = Field(description="The points, by step.")
    has_more: bool = Field(description="Whether there are more.")
    last_step: int | None = Field(description="Value of `after` that fetches the next page.")


def _storable(text: str) -> str:
    """A text that PostgreSQL can store."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
