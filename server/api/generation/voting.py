"""A completion by vote: each member of an ensemble writes its own text in one batch, and the most frequent text wins.

By ``mean`` an ensemble writes one text, as one ``Generation``.
"""

from __future__ import annotations

from dataclasses import replace

from server.api.generation.bodies import DEFAULT_COMPLETION_TOKENS, CompletionBody
from server.api.generation.generation import prepare
from server.api.generation.writers import ChoiceText, CompletionWriter, collect
from server.api.inference.call import Call
from server.api.inference.ensemble import elect
from server.api.inference.responses import Completion, MemberText
from server.api.task_group import task_group


async def vote(call: Call, body: CompletionBody, prompts: list[list[int]], writer: CompletionWriter) -> Completion:
    """Let every member complete every prompt. If one fails, or the vote is cancelled, all others are aborted.

    Raises:
        ServerError: As for one member alone.
    """
    # Logprobs are always needed: among texts with equally many votes the likeliest wins.
    member_body = body if body.logprobs is not None else body.model_copy(update={"logprobs": 0})
    generations = await prepare(call, member_body, prompts, default_max_tokens=DEFAULT_COMPLETION_TOKENS, votes=True)
    async with task_group() as group:
        tasks = [group.create_task(collect(generation)) for generation in generations]
    members = [pair.name or call.services.base_name for pair in call.leased]
    winners, found = [], []
    for choices in zip(*(task.result() for task in tasks), strict=True):
        texts = ["".join(choice.pieces) for choice in choices]
        likelihoods = [_likelihood(choice) for choice in choices]
        index, votes = elect(texts, likelihoods)
        winners.append(choices[index] if body.logprobs is not None else replace(choices[index], scored=None))
        of_members = [
            MemberText(model=member, text=text, logprob=likelihood)
            for member, text, likelihood in zip(members, texts, likelihoods, strict=True)
        ]
        found.append((dict(votes), of_members))
    completion = writer.answer(winners, call.usage)
    for choice, (votes_by_text, of_members) in zip(completion.choices, found, strict=True):
        choice.votes, choice.members = votes_by_text, of_members
    return completion


def _likelihood(choice: ChoiceText) -> float:
    """Mean log-probability of a text's tokens."""
    scores = [token.logprobs.logprob for token in choice.scored or () if token.logprobs is not None]
    return sum(scores) / len(scores) if scores else 0.0
