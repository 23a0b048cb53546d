"""Classification of texts: a sequence for each label of each text, or for each text if the soft prompt has a head."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from math import exp

from prompt_store.types import PromptVersion, TaskType
from server.api.inference.call import Call, RunningSequence
from server.api.inference.pair import LeasedPair
from server.api.inference.target import Target
from server.api.inference.token_ids import check_token_ids
from server.api.soft_prompts.engine_source import called, check_task
from server.api.task_group import task_group
from server.engine.types import FinishReason, GenerateRequest, SamplingParams, TokenEvent
from server.errors import ContextLengthError, EngineNotReadyError, InvalidRequestError

MAX_LABEL_TOKENS = 64
MAX_QUOTED_CHARS = 64
"""Maximum length of a label in an error message."""


@dataclass(frozen=True, slots=True)
class Label:
    """A label that is scored as the text's continuation.

    Attributes:
        name: The label in the request.
        token_ids: For each text, the label's tokens after it; at least one.
    """

    name: str
    token_ids: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The tokenised inputs of a request.

    Attributes:
        texts: Tokens of each text.
        labels: The labels to score; None if the soft prompt's own head classifies.
        task_id: The task of a multitask prompt.
    """

    texts: list[list[int]]
    labels: list[Label] | None
    task_id: int | None = None


@dataclass(slots=True)
class Verdict:
    """The result of one soft prompt for one text.

    Attributes:
        scores: For each label, the sum of its tokens' log-probabilities, or the head's logit.
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


async def prepare(call: Call, inputs: Inputs) -> None:
    """Lease the soft prompts of a classification, check that they fit its inputs, and admit it.

    Raises:
        InvalidRequestError: If a text or a label is too long, labels are missing or given to a soft prompt that has
            its own, the task does not exist, or the soft prompts of an ensemble cannot be combined.
        NotFoundError: If a soft prompt does not exist.
        RateLimitError: If the API key has too few tokens left.
    """
    await call.lease()
    model = call.services.engine.model
    _check_heads(call.targets, call.leased)
    for pair in call.leased:
        _check_labels(pair, inputs.labels)
        check_task(next(iter(pair.versions), None), inputs.task_id)
        _check_texts(
            inputs,
            num_virtual_tokens=pair.num_virtual_tokens,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
        )
    num_label_tokens = sum(len(ids) for label in inputs.labels or () for ids in label.token_ids)
    call.admit(inputs.texts, num_scored_tokens=num_label_tokens * len(call.leased))


async def score(call: Call, inputs: Inputs) -> list[list[Verdict]]:
    """Run a prepared classification. If one sequence fails, or the call is cancelled, all others are aborted.

    Returns:
        For each member, the verdict on each text.

    Raises:
        EngineError: If a sequence fails.
    """
    members = [pair.member(inputs.task_id) for pair in call.leased]
    request_id = uuid.uuid4().hex
    labels: Sequence[Label | None] = inputs.labels or [None]
    sequences = [
        call.sequence(
            GenerateRequest(
                request_id=f"{request_id}-{position}-{index}-{rank}",
                prompt_token_ids=text if label is None else text + label.token_ids[index],
                params=_params(text, label),
                soft_prompt=member.soft_prompt,
                adapter=member.adapter,
                salt=call.tenant,
                priority=call.priority,
                is_batch=call.is_batch,
                timeout=call.max_wait,
            ),
            is_first_of_text=rank == 0,
        )
        for position, member in enumerate(members)
        for index, text in enumerate(inputs.texts)
        for rank, label in enumerate(labels)
    ]
    async with task_group() as group:
        tasks = [group.create_task(_run(sequence)) for sequence in sequences]
    events = iter([task.result() for task in tasks])
    return [[_verdict([next(events) for _ in labels], inputs) for _ in inputs.texts] for _ in members]


async def _run(sequence: RunningSequence) -> TokenEvent:
    async with aclosing(sequence.events()) as events:
        event = await anext(events)
    sequence.finish(FinishReason.STOP.value)
    return event


def _params(text: list[int], label: Label | None) -> SamplingParams:
    if label is None:
        return SamplingParams(max_tokens=0, temperature=0.0, classify=True)
    return SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_start=len(text))


def _verdict(events: Sequence[TokenEvent], inputs: Inputs) -> Verdict:
    """The verdict from the event of each label, or from that of the head."""
    if inputs.labels is not None:
        return Verdict([_label_score(event) for event in events])
    (event,) = events
    if event.class_logits is None:
        raise EngineNotReadyError("the engine ended the request without the head's logits")
    return Verdict(event.class_logits)


def _label_score(event: TokenEvent) -> float:
    return sum(entry.logprob for entry in event.prompt_logprobs or () if entry is not None)


def _heads(pair: LeasedPair) -> list[PromptVersion]:
    return [version for version in pair.versions if version.task_type == TaskType.SEQ_CLS]


def _check_heads(targets: Sequence[Target], pairs: Sequence[LeasedPair]) -> None:
    """Reject a pair with two heads, and a mix of heads, which give logits, and members that score labels."""
    heads = [_heads(pair) for pair in pairs]
    for target, own in zip(targets, heads, strict=True):
        if len(own) > 1:
            raise InvalidRequestError(
                f"{target.param}: {called(own[0])} and {called(own[1])} both have a classification head; name one of "
                "them alone",
                param=target.param,
            )
    if any(heads) and not all(heads):
        param = targets[heads.index([])].param
        raise InvalidRequestError(
            f"{param}: the members of an ensemble must all have a head, or none of them",
            param=param,
        )


def _check_labels(pair: LeasedPair, labels: list[Label] | None) -> None:
    heads = _heads(pair)
    if heads and labels is not None:
        raise InvalidRequestError(
            f"labels: {called(heads[0])} has a head with {heads[0].num_labels} labels; leave them out",
            param="labels",
        )
    if not heads and labels is None:
        named = " with ".join(map(called, pair.versions)) or "the base model"
        raise InvalidRequestError(
            f"labels: {named} has no classification head: say which labels to choose from", param="labels"
        )


def check_tokens(texts: Sequence[Sequence[int]], *, vocab_size: int) -> None:
    """Check the tokens of the texts.

    Raises:
        InvalidRequestError: If a text is empty, or a token is not in the vocabulary.
    """
    for text in texts:
        if not text:
            raise InvalidRequestError("input: the text is empty; at least one token is required", param="input")
        check_token_ids(text, vocab_size=vocab_size, param="input")


def _check_texts(inputs: Inputs, *, num_virtual_tokens: int, vocab_size: int, max_model_len: int) -> None:
    longest_label = max((len(ids) for label in inputs.labels or () for ids in label.token_ids), default=0)
    if longest_label > MAX_LABEL_TOKENS:
        raise InvalidRequestError(
            f"labels: one has {longest_label} tokens; at most {MAX_LABEL_TOKENS} are taken", param="labels"
        )
    for label in inputs.labels or ():
        for token_ids in label.token_ids:
            check_token_ids(
                token_ids, vocab_size=vocab_size, param="labels", what=repr(label.name[:MAX_QUOTED_CHARS])
            )
    for text in inputs.texts:
        if num_virtual_tokens + len(text) + longest_label > max_model_len:
            raise ContextLengthError(
                f"input: the model's context is {max_model_len} tokens, and the request takes more: "
                f"{num_virtual_tokens} virtual tokens of the soft prompt, {len(text)} text tokens and "
                f"{longest_label} of the longest label",
                param="input",
            )
