"""Runs evaluations: each row becomes a request of its creator, in the service tier ``batch``.

Evaluations of one tenant run one after another, those of different tenants beside each other. The catalog knows which
server runs which, by a lease: if one stops, another goes on with the rows that are left, or the same one when it
starts again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from starlette.types import ASGIApp

from prompt_store.errors import PromptStoreError, StoreUnavailableError
from prompt_store.jobs.types import Evaluation, EvaluationRow, EvaluationStatus
from server.api.evaluations.asking import Asker, scores_of
from server.api.keys.callers import ANYBODY, Caller
from server.api.keys.in_process import post_until_answered
from server.api.keys.keys import ApiKeys
from server.api.soft_prompts.async_store import AsyncPromptStore
from server.api.task_group import task_group
from server.datasets import Example, parse_examples
from server.evaluation.examples import expected_of

logger = logging.getLogger(__name__)

_MAX_CONCURRENCY = 64
"""Requests of one evaluation at once."""

_LEASE_SECONDS = 60.0
_RECORD_SECONDS = 0.5
"""Outcomes are recorded this often, and cancellations noticed."""

_POLL_SECONDS = 15.0
"""How often a server looks for evaluations that another one has left."""

_FATAL = (401, 403, 404)
"""Statuses that every row would get."""


class _FailedError(Exception):
    """The evaluation cannot go on; the message is for its creator."""


class _LostError(Exception):
    """It was deleted, or another server runs it."""


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    row: EvaluationRow
    example: Example


class EvaluationRunner:
    """Runs the evaluations of a server.

    Args:
        store: The store with the evaluations.
        caller_named: The caller with a key of this name; None if there is none any more.
        concurrency: Requests of one evaluation at once.
    """

    def __init__(
        self, store: AsyncPromptStore, *, caller_named: Callable[[str | None], Caller | None], concurrency: int
    ) -> None:
        self._store = store
        self._caller_named = caller_named
        self._concurrency = concurrency
        self._id = secrets.token_hex(16)
        self._app: ASGIApp | None = None
        self._news = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """By tenant."""

    @asynccontextmanager
    async def running(self, app: ASGIApp) -> AsyncIterator[None]:
        """Run evaluations until the block ends.

        Args:
            app: The application that answers the requests.
        """
        self._app = app
        evaluations = self._store.evaluations
        with suppress(StoreUnavailableError):
            await self._store.call(evaluations.release_left)
        polling = asyncio.create_task(self._poll(), name="evaluations")
        try:
            yield
        finally:
            tasks = [polling, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(PromptStoreError):
                await self._store.call(evaluations.release, self._id)

    def notify(self) -> None:
        """Look for new evaluations now."""
        self._news.set()

    async def _poll(self) -> None:
        while True:
            self._news.clear()
            try:
                await self._claim_all()
            except StoreUnavailableError:
                logger.warning("evaluations wait for the catalog")
            except Exception:
                logger.exception("evaluations cannot be started")
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS):
                    await self._news.wait()

    async def _claim_all(self) -> None:
        evaluations = self._store.evaluations
        while found := await self._store.call(evaluations.claim, self._id, _LEASE_SECONDS, list(self._tasks)):
            task = asyncio.create_task(self._run(found), name=f"run {found.id}")
            self._tasks[found.owner] = task
            task.add_done_callback(lambda _, owner=found.owner: self._forget(owner))  # type: ignore[misc]

    def _forget(self, owner: str) -> None:
        self._tasks.pop(owner, None)
        self._news.set()

    async def _run(self, evaluation: Evaluation) -> None:
        status, failure, scores = EvaluationStatus.COMPLETED, None, None
        keeps_texts = bool(evaluation.settings["keep_texts"])
        evaluations = self._store.evaluations
        try:
            if evaluation.status is EvaluationStatus.CANCELLING:  # the server that ran it has stopped
                status = EvaluationStatus.CANCELLED
            else:
                status = await self._answer_all(evaluation)
            if status is EvaluationStatus.COMPLETED:
                rows = await self._store.call(evaluations.outcomes, evaluation.id, evaluation.owner)
                scores = await self._store.call(scores_of, rows, evaluation.metric)
        except _LostError:
            return
        except _FailedError as error:
            status, failure = EvaluationStatus.FAILED, str(error)
        except StoreUnavailableError:
            logger.warning("the evaluation %s waits for the catalog", evaluation.id)
            return  # its lease ends
        except Exception:
            logger.exception("the evaluation %s failed", evaluation.id)
            status, failure = EvaluationStatus.FAILED, "the server could not run the evaluation"
        await self._store.call(
            evaluations.finish,
            evaluation.id,
            self._id,
            status,
            scores=scores,
            failure=failure,
            keeps_texts=keeps_texts,
        )

    async def _answer_all(self, evaluation: Evaluation) -> EvaluationStatus:
        """Answer the rows that are left; the state that the evaluation ends in."""
        evaluations = self._store.evaluations
        all_rows = await self._store.call(evaluations.outcomes, evaluation.id, evaluation.owner)
        pending = await self._store.call(evaluations.pending, evaluation.id)
        if not pending:
            return EvaluationStatus.COMPLETED
        has_labels = evaluation.metric == "accuracy"
        labels = sorted({row.expected for row in all_rows if row.expected is not None}) if has_labels else []
        left = await self._store.call(_parsed, pending)
        asker = Asker(evaluation, labels)
        answered: dict[int, EvaluationRow] = {}
        rows = iter(left)
        status = EvaluationStatus.IN_PROGRESS
        async with task_group() as group:
            asking = [
                group.create_task(self._answer_some(evaluation, asker, rows, answered))
                for _ in range(min(self._concurrency, len(left)))
            ]
            is_done = False
            while not is_done:
                done, waiting = await asyncio.wait(asking, timeout=_RECORD_SECONDS)
                is_done = not waiting
                for task in done:
                    task.result()
                status = await self._record(evaluation, answered, must=is_done)
                if status is EvaluationStatus.CANCELLING:
                    for task in asking:
                        task.cancel()
                    is_done = True
        return EvaluationStatus.CANCELLED if status is EvaluationStatus.CANCELLING else EvaluationStatus.COMPLETED

    async def _record(
        self, evaluation: Evaluation, answered: dict[int, EvaluationRow], *, must: bool
    ) -> EvaluationStatus:
        new = dict(answered)
        try:
            status = await self._store.call(
                self._store.evaluations.record, evaluation.id, self._id, _LEASE_SECONDS, new
            )
        except StoreUnavailableError:
            if must:
                raise
            return EvaluationStatus.IN_PROGRESS  # they are recorded next time
        if status is None:
            raise _LostError
        for number in new:
            del answered[number]
        return status

    async def _answer_some(
        self, evaluation: Evaluation, asker: Asker, left: Iterator[_Row], answered: dict[int, EvaluationRow]
    ) -> None:
        for one in left:
            caller = self._caller_named(evaluation.key)
            if caller is None or caller.tenant != evaluation.owner:
                raise _FailedError("the API key of the evaluation is not valid any more")
            path, body = asker.request(one.example)
            if self._app is None:
                raise RuntimeError("the runner was not started")
            reply = await post_until_answered(self._app, path, body, caller)
            row = asker.outcome(one.row, one.example, expected_of(one.example), reply)
            if reply.status in _FATAL:
                raise _FailedError(row.error or "the model cannot be asked")
            if (fault := asker.head_fault(one.example, reply)) is not None:
                raise _FailedError(fault)
            answered[one.number] = row


def _parsed(pending: dict[int, EvaluationRow]) -> list[_Row]:
    """Rows with their examples; they were valid when they were stored."""
    examples = parse_examples(b"\n".join((row.text or "").encode() for row in pending.values()), "data")
    return [_Row(number, row, example) for (number, row), example in zip(pending.items(), examples, strict=True)]


def make_evaluation_runner(store: AsyncPromptStore, keys: ApiKeys | None, max_num_seqs: int) -> EvaluationRunner:
    """The runner of a server."""
    return EvaluationRunner(
        store,
        caller_named=(lambda _: ANYBODY) if keys is None else keys.named,
        concurrency=max(1, min(_MAX_CONCURRENCY, max_num_seqs)),
    )
