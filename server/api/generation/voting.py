"""A completion by vote: each soft prompt of an ensemble writes its own in one batch; the most frequent text wins.

By ``mean`` an ensemble writes one text, as one generation: see ``generation``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from math import inf

from server.api.generation.bodies import DEFAULT_COMPLETION_TOKENS, CompletionBody
from server.api.generation.call import Generation, admitted
from server.api.generation.writers import ChoiceText, CompletionWriter
from server.api.inference.ensemble import check_different, elect
from server.api.inference.entry import Entry
from server.api.inference.request_record import RequestRecord
from server.api.inference.responses import Completion, MemberText, PromptTokensDetails, Usage
from server.api.inference.target import Target
from server.api.services import Services


async def vote(
    services: Services,
    targets: Sequence[Target],
    body: CompletionBody,
    prompts: list[list[int]],
    *,
    writer: CompletionWriter,
    entry: Entry,
    arrival: float,
    record: RequestRecord,
) -> tuple[Completion, str]:
    """Let every member complete every prompt. Cancelled, or failed, it aborts all that still run.

    Returns:
        The answer, and what answered: ``NAME@VERSION`` of each member that is no bare base, with commas between.

    Raises:
        ServerError: As for one member alone; everything is given back.
    """
    # Between texts with as many votes their likelihood decides, so it is always asked for.
    member_body = body if body.logprobs is not None else body.model_copy(update={"logprobs": 0})
    records = [replace(record) for _ in targets]
    async with AsyncExitStack() as stack:
        generations: list[Generation] = []
        for target, own in zip(targets, records, strict=True):
            generation = await stack.enter_async_context(
                admitted(
                    services,
                    [target],
                    member_body,
                    prompts,
                    default_max_tokens=DEFAULT_COMPLETION_TOKENS,
                    entry=entry,
                    arrival=arrival,
                    record=own,
                )
            )
            generations.append(generation)
        check_different(targets, [own for generation in generations for own in generation.leased])
        stack.callback(_end_record, record, records, generations)
        answers = await _gather(generations)
    usage = _sum([generation.usage for generation in generations])
    members = [generation.served_by or services.base_name for generation in generations]
    served_by = ",".join(generation.served_by for generation in generations if generation.served_by)
    winners, found = [], []
    for choices in zip(*answers, strict=True):
        texts = ["".join(choice.pieces) for choice in choices]
        likelihoods = [_likelihood(choice) for choice in choices]
        index, votes = elect(texts, likelihoods)
        winners.append(choices[index] if body.logprobs is not None else replace(choices[index], scored=None))
        told = [
            MemberText(model=member, text=text, logprob=likelihood)
            for member, text, likelihood in zip(members, texts, likelihoods, strict=True)
        ]
        found.append((dict(votes), told))
    completion = writer.answer(winners, usage)
    for choice, (votes_by_text, told) in zip(completion.choices, found, strict=True):
        choice.votes, choice.members = votes_by_text, told
    return completion, served_by


def _end_record(record: RequestRecord, records: Sequence[RequestRecord], generations: Sequence[Generation]) -> None:
    """Complete the request's record with the results of all members."""
    outcomes = [generation.outcome for generation in generations]
    outcome = next((name for name in ("abort", "length") if name in outcomes), "stop")
    record.end(outcome, _sum([generation.usage for generation in generations]))
    record.prompt = ",".join(name for generation in generations if (name := generation.served_by))
    first = min(records, key=lambda own: inf if own.first_output is None else own.first_output)
    for name in ("first_output", "first_token_seconds", "queue_seconds", "prefill_seconds"):
        setattr(record, name, getattr(first, name))


async def _gather(generations: Sequence[Generation]) -> list[list[ChoiceText]]:
    """All members' choices; the first failure ends the others."""
    tasks = [asyncio.create_task(_collect(generation)) for generation in generations]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _collect(generation: Generation) -> list[ChoiceText]:
    choices = [ChoiceText(generation.prompt_of(index)) for index in range(generation.num_choices)]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            choices[delta.index].add(delta)
    return choices


def _likelihood(choice: ChoiceText) -> float:
    """Mean log-probability of a text's tokens."""
    scores = [token.logprobs.logprob for token in choice.scored or () if token.logprobs is not None]
    return sum(scores) / len(scores) if scores else 0.0


def _sum(usages: Sequence[Usage]) -> Usage:
    """What all members used together."""
    details = PromptTokensDetails(
        sum(usage.prompt_tokens_details.cached_tokens for usage in usages),
        sum(usage.prompt_tokens_details.virtual_tokens for usage in usages),
    )
    num_prompt, num_new = (
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
    )
    return Usage(num_prompt, num_new, num_prompt + num_new, details)
