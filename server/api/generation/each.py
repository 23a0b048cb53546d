"""``"ensemble": "each"``: one text for several members in one request, each with choices of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from server.api.errors import describe
from server.api.generation.bodies import MembersBody
from server.api.generation.generation import Delta, Generation, check_echo, check_generates, check_tokens
from server.api.generation.merging import merged
from server.api.inference.call import Call
from server.api.inference.member_faults import FAULTS, MemberFaults
from server.api.inference.pair import LeasedPair
from server.api.inference.responses import ChoiceError
from server.api.soft_prompts.engine_source import check_task
from server.errors import InvalidRequestError, UnsupportedByEngineError

Tokenize = Callable[[LeasedPair], Awaitable[list[list[int]]]]
"""Returns the text tokens of each prompt, as a member is asked."""


class EachGeneration:
    """The choices of all members; those of the first member come first.

    After the first delta of a stream, a member that fails ends its own choices alone.

    Attributes:
        num_choices: Number of texts to generate.

    Args:
        call: The request, admitted.
        generations: The generation of each member.
        models: The name of each member.
        is_stream: Whether the response is a stream.
    """

    def __init__(
        self, call: Call, generations: Sequence[Generation], models: Sequence[str], *, is_stream: bool
    ) -> None:
        self.num_choices = sum(generation.num_choices for generation in generations)
        self._call = call
        self._generations = generations
        self._models = models
        self._is_stream = is_stream

    def prompt_of(self, index: int) -> list[int]:
        """The text tokens that a choice continues."""
        return self._generations[self._member_of(index)].prompt_of(index)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of all choices as they arrive. Closing it early aborts all running sequences.

        Raises:
            EngineError: If a member fails before the first delta, or the response is no stream; the others are
                aborted.
        """
        choices = [self._generations[self._member_of(index)].choice(index) for index in range(self.num_choices)]
        recover = self._recover if self._is_stream else None
        async with aclosing(merged(choices, recover=recover)) as deltas:
            async for delta in deltas:
                yield delta

    def _member_of(self, index: int) -> int:
        return index * len(self._generations) // self.num_choices

    def _recover(self, index: int, error: Exception) -> Delta:
        call = self._call
        reply = describe(error, request_id=call.record.request_id)
        call.services.metrics.count_error(reply.code)
        call.record.error = reply.code
        fault = ChoiceError(code=reply.code, message=reply.message)
        return Delta(index, "", [], "error", model=self._models[self._member_of(index)], error=fault)


async def prepare_each(
    call: Call, body: MembersBody, tokenize: Tokenize, faults: MemberFaults, *, default_max_tokens: int | None
) -> EachGeneration:
    """Lease all members, check each of them with its text, and admit them together or not at all.

    Args:
        call: The request, entered.
        body: Its fields.
        tokenize: Returns the text tokens of each prompt for a member.
        faults: What is wrong with members already.
        default_max_tokens: New tokens if the request sets no limit; None is the rest of the context.

    Raises:
        ServerError: If a member does not exist or cannot answer; ``details`` lists all of them.
        RateLimitError: If the API key has too few tokens left.
    """
    await call.lease(faults)
    good = [index for index in range(len(call.targets)) if index not in faults]
    num_choices = len(call.texts) * body.n
    generations: list[Generation] = []
    models = [pair.name or call.services.base_name for pair in call.leased]
    seen: set[tuple[str, int | None]] = set()
    for index, pair, model in zip(good, call.leased, models, strict=True):
        task = body.tasks[index]
        try:
            if (model, task) in seen:
                raise InvalidRequestError(f"{faults.param}: {model} is named twice", param=faults.param)
            seen.add((model, task))
            for version in pair.versions:
                check_generates(version, call.targets[index])
            check_task(next(iter(pair.versions), None), task)
            prompts = await tokenize(pair)
            check_tokens(prompts, body, vocab_size=call.services.engine.model.vocab_size)
            generation = Generation(
                call,
                body,
                prompts,
                [pair],
                task_id=task,
                default_max_tokens=default_max_tokens,
                first_index=index * num_choices,
                model=model,
            )
            _check_supported(call, generation, index * num_choices)
        except FAULTS as error:
            faults.add(index, error)
        else:
            generations.append(generation)
    faults.raise_if_any()
    texts = [prompt for generation in generations for prompt in generation.prompts]
    check_echo(texts, body)
    num_new = sum(generation.max_new_tokens for generation in generations)
    call.admit(texts, num_new_tokens=num_new, num_readers=1)
    return EachGeneration(call, generations, models, is_stream=body.stream)


def _check_supported(call: Call, generation: Generation, index: int) -> None:
    model = call.services.engine.model
    missing = model.missing(generation.request(index))
    if missing is not None:
        raise UnsupportedByEngineError(model.refusal(missing))
