"""The life of a classification: a sequence for each label of each input, or for each input where there is a head."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from math import exp

from prompt_store.types import LeasedPrompt, PromptVersion, TaskType
from server.api.admission import Permits
from server.api.inference.ensemble import leases_of, name_of
from server.api.inference.entry import Entry
from server.api.inference.request_record import RequestRecord
from server.api.inference.responses import PromptTokensDetails, Usage
from server.api.inference.target import Target
from server.api.inference.token_ids import check_token_ids
from server.api.services import Services
from server.api.soft_prompts.engine_source import check_task, soft_prompt_source
from server.engine.types import FinishReason, GenerateRequest, SamplingParams, TokenEvent
from server.errors import ContextLengthError, EngineNotReadyError, InvalidRequestError, WaitTimeoutError

MAX_LABEL_TOKENS = 64
MAX_QUOTED_CHARS = 64
"""Of a label, in an error about it."""


@dataclass(frozen=True, slots=True)
class Label:
    """A label that is scored as the text's continuation.

    Attributes:
        name: As the request wrote it.
        token_ids: Its tokens behind each input, at least one.
    """

    name: str
    token_ids: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a request asks for, tokenised.

    Attributes:
        inputs: Text tokens of each input.
        labels: What to score; None where the soft prompt's own head decides.
        task_id: The task of a multitask prompt.
        priority: Lower is more urgent.
        timeout: Seconds in which each sequence has to begin to run; None is without limit.
    """

    inputs: list[list[int]]
    labels: list[Label] | None
    task_id: int | None = None
    priority: int = 0
    timeout: float | None = None

    @property
    def num_tokens(self) -> int:
        """What it counts against limits: each text once, and every label after each."""
        of_labels = sum(len(ids) for label in self.labels or () for ids in label.token_ids)
        return sum(map(len, self.inputs)) + of_labels


@dataclass(slots=True)
class Verdict:
    """What one soft prompt found about one input.

    Attributes:
        scores: Of each label: the sum of its tokens' log-probabilities, or the head's logit.
    """

    scores: list[float]

    @property
    def probabilities(self) -> list[float]:
        """The softmax of the scores."""
        best = max(self.scores)
        weights = [exp(score - best) for score in self.scores]
        total = sum(weights)
        return [weight / total for weight in weights]

    @property
    def best(self) -> int:
        """Index of the likeliest label; the first of equals."""
        return self.scores.index(max(self.scores))


@dataclass(slots=True, kw_only=True)
class Classification:
    """One admitted request.

    Attributes:
        leased: The soft prompts, of which there are several in an ensemble; None for the bare base.
        wanted: What was asked for.
        verdicts: Of each soft prompt one for each input, when it has run.
        record: The request's log record.
        usage: Tokens of the inputs' texts, each once for each soft prompt; labels are not counted.
    """

    services: Services
    wanted: Wanted
    leased: list[LeasedPrompt | None]
    permits: Permits
    tenant: str
    record: RequestRecord
    verdicts: list[list[Verdict]] = field(default_factory=list)
    num_cached_tokens: int = 0

    @property
    def usage(self) -> Usage:
        """Text tokens, the virtual ones before them, and what was cached already."""
        num_virtual = sum(leased.version.num_virtual_tokens for leased in self.leased if leased)
        num_text = sum(map(len, self.wanted.inputs)) * len(self.leased)
        details = PromptTokensDetails(self.num_cached_tokens, num_virtual * len(self.wanted.inputs))
        return Usage(num_text, 0, num_text, details)

    def end_record(self, outcome: str) -> None:
        """Complete the request's record."""
        self.record.end(outcome, self.usage)
        names = [leased.version.name for leased in self.leased if leased]
        if len(self.leased) > 1:
            self.record.prompt = self.served_by
        elif names:
            (self.record.prompt,) = names
            self.record.version = next(leased.version.version for leased in self.leased if leased)

    @property
    def served_by(self) -> str | None:
        """``NAME@VERSION`` of all soft prompts, with commas between; None where there is none."""
        return ",".join(name for leased in self.leased if (name := name_of(leased))) or None

    async def run(self) -> None:
        """Compute the verdicts. Cancelled, or failed, it aborts every sequence that still runs.

        Raises:
            EngineError: If one sequence fails.
        """
        sources = [soft_prompt_source(leased, self.wanted.task_id) if leased else None for leased in self.leased]
        request_id = uuid.uuid4().hex
        labels: Sequence[Label | None] = self.wanted.labels or [None]
        requests = [
            GenerateRequest(
                request_id=f"{request_id}-{member}-{index}-{rank}",
                prompt_token_ids=text if label is None else text + label.token_ids[index],
                params=_params(text, label),
                soft_prompt=source,
                salt=self.tenant,
                priority=self.wanted.priority,
                timeout=self.wanted.timeout,
            )
            for member, source in enumerate(sources)
            for index, text in enumerate(self.wanted.inputs)
            for rank, label in enumerate(labels)
        ]
        tasks = [asyncio.create_task(self._score(request)) for request in requests]
        try:
            events = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        found = []
        for start in range(0, len(events), len(labels)):
            of_input = events[start : start + len(labels)]
            self.num_cached_tokens += of_input[0].num_cached_tokens
            if self.wanted.labels is None:
                found.append(Verdict(_head_scores(of_input[0])))
            else:
                found.append(Verdict([_label_score(event) for event in of_input]))
        num_inputs = len(self.wanted.inputs)
        self.verdicts = [found[start : start + num_inputs] for start in range(0, len(found), num_inputs)]

    async def _score(self, request: GenerateRequest) -> TokenEvent:
        has_begun = False
        try:
            async with aclosing(self.services.engine.generate(request)) as events:
                async for event in events:
                    has_begun = True
                    self.permits.begin()
                    if event.finish_reason is FinishReason.ABORT:
                        raise EngineNotReadyError("the server is shutting down and ended the request")
                    if event.queue_seconds is not None and event.prefill_seconds is not None:
                        self.services.metrics.observe_phases(event.queue_seconds, event.prefill_seconds)
                        if self.record.queue_seconds is None:
                            self.record.first_output = time.monotonic()
                            self.record.queue_seconds = event.queue_seconds
                            self.record.prefill_seconds = event.prefill_seconds
                    return event
            raise EngineNotReadyError("the engine ended the request without a reason")
        except WaitTimeoutError as error:
            error.retry_after = self.permits.retry_after
            raise
        finally:
            self.permits.release(has_begun=has_begun)


def _params(text: list[int], label: Label | None) -> SamplingParams:
    if label is None:
        return SamplingParams(max_tokens=0, temperature=0.0, classify=True)
    return SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_start=len(text))


def _head_scores(event: TokenEvent) -> list[float]:
    if event.class_logits is None:
        raise EngineNotReadyError("the engine ended the request without the head's logits")
    return event.class_logits


def _label_score(event: TokenEvent) -> float:
    return sum(entry.logprob for entry in event.prompt_logprobs or () if entry is not None)


@asynccontextmanager
async def classifying(
    services: Services,
    targets: Sequence[Target],
    wanted: Wanted,
    *,
    entry: Entry,
    arrival: float,
    record: RequestRecord,
) -> AsyncIterator[Classification]:
    """Check and lease for a classification that was let in; everything is given back when the block ends.

    Raises:
        InvalidRequestError: If the texts or labels cannot be taken, labels are missing
            or given to a soft prompt that has its own, the task is not one of its tasks, or the soft prompts of an
            ensemble do not go together.
        NotFoundError: If there is no such soft prompt.
        RateLimitError: If the caller's key does not have the tokens.
    """
    async with leases_of(services, targets) as leased:
        versions = [prompt.version if prompt else None for prompt in leased]
        _check_kinds(targets, versions)
        for version in versions:
            _check_labels(version, wanted.labels)
            check_task(version, wanted.task_id)
            _check_texts(
                wanted,
                num_virtual_tokens=version.num_virtual_tokens if version else 0,
                vocab_size=services.engine.model.vocab_size,
                max_model_len=services.engine.model.max_model_len,
            )
        num_tokens = wanted.num_tokens * len(leased)
        entry.reserve(num_tokens)
        entry.allowance.used += num_tokens
        outcome = "error"
        classification = Classification(
            services=services,
            wanted=wanted,
            leased=leased,
            permits=entry.permits,
            tenant=entry.caller.tenant,
            record=record,
        )
        try:
            yield classification
            outcome = "stop"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "abort"
            raise
        finally:
            classification.end_record(outcome)
            for version in versions:
                services.metrics.count_request(version.name if version else None, outcome)
            if outcome == "stop":
                services.metrics.observe_request(time.monotonic() - arrival)


def _has_head(version: PromptVersion | None) -> bool:
    return version is not None and version.task_type == TaskType.SEQ_CLS


def _check_kinds(targets: Sequence[Target], versions: Sequence[PromptVersion | None]) -> None:
    """Heads give logits and others score texts: their probabilities are not of the same kind."""
    heads = [_has_head(version) for version in versions]
    if any(heads) and not all(heads):
        param = targets[heads.index(False)].param
        raise InvalidRequestError(
            f"{param}: the soft prompts of an ensemble must all have a head, or none of them",
            param=param,
        )


def _check_labels(version: PromptVersion | None, labels: list[Label] | None) -> None:
    has_head = _has_head(version)
    if version is not None and has_head and labels is not None:
        raise InvalidRequestError(
            f"labels: the soft prompt {version.name}@{version.version} has a head with "
            f"{version.num_labels} labels; leave them out",
            param="labels",
        )
    if not has_head and labels is None:
        named = "the base model" if version is None else f"the soft prompt {version.name}@{version.version}"
        raise InvalidRequestError(
            f"labels: {named} has no classification head: say which labels to choose from", param="labels"
        )


def check_inputs(inputs: Sequence[Sequence[int]], *, vocab_size: int) -> None:
    """See whether there are texts, of tokens that there are.

    Raises:
        InvalidRequestError: If not.
    """
    for text in inputs:
        if not text:
            raise InvalidRequestError("input: the text is empty; at least one token is required", param="input")
        check_token_ids(text, vocab_size=vocab_size, param="input")


def _check_texts(wanted: Wanted, *, num_virtual_tokens: int, vocab_size: int, max_model_len: int) -> None:
    longest_label = max((len(ids) for label in wanted.labels or () for ids in label.token_ids), default=0)
    if longest_label > MAX_LABEL_TOKENS:
        raise InvalidRequestError(
            f"labels: one has {longest_label} tokens; at most {MAX_LABEL_TOKENS} are taken", param="labels"
        )
    for label in wanted.labels or ():
        for token_ids in label.token_ids:
            check_token_ids(
                token_ids, vocab_size=vocab_size, param="labels", what=repr(label.name[:MAX_QUOTED_CHARS])
            )
    for text in wanted.inputs:
        if num_virtual_tokens + len(text) + longest_label > max_model_len:
            raise ContextLengthError(
                f"input: the model's context is {max_model_len} tokens, and the request takes more: "
                f"{num_virtual_tokens} virtual tokens of the soft prompt, {len(text)} text tokens and "
                f"{longest_label} of the longest label",
                param="input",
            )
