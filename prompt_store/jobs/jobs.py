"""Evaluations and training runs of the tenants of one catalog."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.change import now
from prompt_store.jobs import evaluations, runs
from prompt_store.jobs.types import (
    Evaluation,
    EvaluationFilter,
    EvaluationRow,
    EvaluationStatus,
    Outcome,
    RunPoint,
    TrainingRun,
)

_SECOND = 1_000_000


class Evaluations:
    """The evaluations of a catalog. Thread-safe; its methods block.

    Every method raises StoreUnavailableError if the catalog cannot be reached. Those with an owner raise
    JobNotFoundError for an evaluation that does not exist or is another tenant's.

    Args:
        catalog: The catalog.
        cached: Its cache, which knows whether the catalog can be reached.
    """

    def __init__(self, catalog: Catalog, cached: CachedCatalog) -> None:
        self._catalog = catalog
        self._cached = cached

    def add(self, evaluation: Evaluation, rows: Sequence[EvaluationRow]) -> None:
        """Store an evaluation and its rows, at least one; the oldest ones of the tenant make room for it.

        Raises:
            JobsFullError: If too many evaluations of the tenant are not over.
        """
        self._cached.require()
        with self._catalog.writing() as connection:
            evaluations.add(connection, evaluation, rows)

    def get(self, evaluation_id: str, owner: str) -> Evaluation:
        """An evaluation."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return evaluations.get(connection, evaluation_id, owner)

    def list_all(
        self, owner: str, only: EvaluationFilter, limit: int = 100, after: str | None = None
    ) -> tuple[list[Evaluation], bool]:
        """Evaluations, newest first, after the one with the id ``after``; and whether there are more."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return evaluations.list_all(connection, owner, only, limit, after)

    def changed(self, owner: str, since: float, limit: int = 100) -> list[Evaluation]:
        """The newest ones that are not over, or ended at a Unix time in seconds or later."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return evaluations.changed(connection, owner, int(since * _SECOND), limit)

    def rows(
        self, evaluation_id: str, owner: str, *, outcome: Outcome | None, after: int, limit: int
    ) -> dict[int, EvaluationRow]:
        """Rows beyond the number ``after``, by number from 0, with their texts if they are kept."""
        self._cached.require()
        with self._catalog.reading() as connection:
            evaluations.get(connection, evaluation_id, owner)
            return evaluations.rows_of(connection, evaluation_id, outcome=outcome, after=after, limit=limit)

    def rows_by_number(self, evaluation_id: str, owner: str, numbers: Collection[int]) -> dict[int, EvaluationRow]:
        """Some rows, by number from 0."""
        self._cached.require()
        with self._catalog.reading() as connection:
            evaluations.get(connection, evaluation_id, owner)
            return evaluations.rows_of(connection, evaluation_id, numbers=numbers)

    def outcomes(self, evaluation_id: str, owner: str) -> list[EvaluationRow]:
        """All rows in order, without their texts."""
        self._cached.require()
        with self._catalog.reading() as connection:
            evaluations.get(connection, evaluation_id, owner)
            return evaluations.outcomes_of(connection, evaluation_id)

    def cancel(self, evaluation_id: str, owner: str) -> Evaluation:
        """End one early, with the answers so far; no effect if it is over."""
        self._cached.require()
        with self._catalog.writing() as connection:
            return evaluations.cancel(connection, evaluation_id, owner, now())

    def delete(self, evaluation_id: str, owner: str) -> None:
        """Delete one; PromptConflictError if it is not over."""
        self._cached.require()
        with self._catalog.writing() as connection:
            evaluations.delete(connection, evaluation_id, owner)

    # What the server that runs one calls

    def claim(self, runner: str, seconds: float, busy: Collection[str]) -> Evaluation | None:
        """Take the oldest one that no server runs, for some seconds; None if there is none.

        Args:
            runner: The server, by an id of its own.
            seconds: When other servers may take it, unless the lease is renewed.
            busy: Tenants to pass over, as this server runs one of theirs.
        """
        self._cached.require()
        at = now()
        with self._catalog.writing() as connection:
            return evaluations.claim(connection, runner, at, at + int(seconds * _SECOND), busy)

    def pending(self, evaluation_id: str) -> dict[int, EvaluationRow]:
        """The rows without an outcome, by number from 0, with their texts."""
        with self._catalog.reading() as connection:
            return evaluations.rows_of(connection, evaluation_id, is_pending=True)

    def record(
        self, evaluation_id: str, runner: str, seconds: float, answered: Mapping[int, EvaluationRow]
    ) -> EvaluationStatus | None:
        """Record outcomes by number from 0, and renew the lease.

        Returns:
            The state; None if this server does not run it any more, and nothing was recorded.
        """
        with self._catalog.writing() as connection:
            until = now() + int(seconds * _SECOND)
            return evaluations.record(connection, evaluation_id, runner, until, answered)

    def finish(
        self,
        evaluation_id: str,
        runner: str,
        status: EvaluationStatus,
        *,
        scores: Mapping[str, object] | None = None,
        failure: str | None = None,
        keeps_texts: bool = False,
    ) -> None:
        """End one that this server runs; no effect if it does not any more."""
        with self._catalog.writing() as connection:
            evaluations.finish(
                connection,
                evaluation_id,
                runner,
                status,
                at=now(),
                scores=scores,
                failure=failure,
                keeps_texts=keeps_texts,
            )

    def release_left(self) -> None:
        """Release what a killed process left. In a catalog that replicas share, the leases have to end first."""
        if not self._catalog.is_shared:
            with self._catalog.writing() as connection:
                evaluations.release(connection, None)

    def release(self, runner: str) -> None:
        """Let other servers take what this one runs: it stops."""
        with self._catalog.writing() as connection:
            evaluations.release(connection, runner)


class TrainingRuns:
    """The training runs of a catalog. Thread-safe; its methods block, and raise what those of ``Evaluations`` do.

    Args:
        catalog: The catalog.
        cached: Its cache.
    """

    def __init__(self, catalog: Catalog, cached: CachedCatalog) -> None:
        self._catalog = catalog
        self._cached = cached

    def put(self, run: TrainingRun) -> bool:
        """Store what is known about a run; returns whether it is new."""
        self._cached.require()
        with self._catalog.writing() as connection:
            return runs.put(connection, run)

    def get(self, run_id: str, owner: str) -> TrainingRun:
        """A run."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return runs.get(connection, run_id, owner)

    def list_all(
        self, owner: str, name: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[TrainingRun], bool]:
        """Runs, latest start first, after the one with the id ``after``; and whether there are more."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return runs.list_all(connection, owner, name, limit, after)

    def changed(self, owner: str, since: float, limit: int = 100) -> list[TrainingRun]:
        """The newest runs that were reported at a Unix time in seconds or later."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return runs.changed(connection, owner, int(since * _SECOND), limit)

    def add_points(self, run_id: str, owner: str, points: Sequence[RunPoint]) -> None:
        """Add metrics, at least one point and at most one a step; a known step gets new numbers beside its others.

        Raises:
            JobsFullError: If the run would have too many points.
        """
        self._cached.require()
        with self._catalog.writing() as connection:
            runs.add_points(connection, run_id, owner, points, now(), is_postgresql=self._catalog.is_shared)

    def truncate(self, run_id: str, owner: str, step: int) -> None:
        """Drop the metrics after a step, from which the training resumes."""
        self._cached.require()
        with self._catalog.writing() as connection:
            runs.truncate(connection, run_id, owner, step)

    def points(self, run_id: str, owner: str, after: int = -1, limit: int = runs.MAX_POINTS) -> list[RunPoint]:
        """The metrics beyond a step, in order."""
        self._cached.require()
        with self._catalog.reading() as connection:
            return runs.points_of(connection, run_id, owner, after, limit)

    def delete(self, run_id: str, owner: str) -> None:
        """Delete what is known about a run."""
        self._cached.require()
        with self._catalog.writing() as connection:
            runs.delete(connection, run_id, owner)


class Jobs:
    """Evaluations and training runs; a part of ``PromptStore``.

    Attributes:
        evaluations: The evaluations.
        runs: The training runs.

    Args:
        catalog: The catalog.
        cached: Its cache.
    """

    def __init__(self, catalog: Catalog, cached: CachedCatalog) -> None:
        self.evaluations = Evaluations(catalog, cached)
        self.runs = TrainingRuns(catalog, cached)
