"""Text generation for one request: sequences become choices, and their tokens become text."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b

from prompt_store.types import LeasedPrompt, PromptVersion, TaskType
from server.api.generation.answer_text import AnswerText
from server.api.generation.bodies import MAX_ECHOED_LOGPROBS, GenerationBody
from server.api.generation.sampling_defaults import shorter_default, with_defaults
from server.api.inference.call import Call
from server.api.inference.logprobs import ScoredToken
from server.api.inference.target import Target
from server.api.inference.token_ids import check_token_ids
from server.api.soft_prompts.engine_source import check_task, soft_prompt_source
from server.engine.types import FinishReason, GenerateRequest, SamplingParams
from server.errors import ConstraintError, ContextLengthError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class Delta:
    """The new part of one choice.

    Attributes:
        index: Which choice.
        text: New text that no stop string can take back; may be empty.
        token_ids: New tokens, including those that show no text.
        finish_reason: ``stop`` or ``length`` in the choice's last delta, else None.
        scored: Logprobs of ``token_ids``, after those of an echoed prompt; None if the request has no logprobs.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    scored: list[ScoredToken] | None = None


async def prepare(
    call: Call, body: GenerationBody, prompts: list[list[int]], *, default_max_tokens: int | None, votes: bool = False
) -> list[Generation]:
    """Check a request's tokens, lease its soft prompts and admit it.

    Args:
        call: The request, entered.
        body: Its fields.
        prompts: Text tokens of each prompt.
        default_max_tokens: New tokens if the request sets no limit; None is the rest of the context.
        votes: Whether each member of an ensemble generates a separate text.

    Returns:
        One generation, or one for each member if ``votes``.

    Raises:
        InvalidRequestError: If the tokens are empty, not in the vocabulary or too long, a soft prompt is not for
            generation, the task does not exist, or an ensemble has a version twice or too many members.
        NotFoundError: If a soft prompt does not exist.
        RateLimitError: If the API key has too few tokens left.
    """
    _check_tokens(prompts, body, vocab_size=call.services.engine.model.vocab_size)
    _check_echo(prompts, body)
    await call.lease()
    for target, leased in zip(call.targets, call.leased, strict=True):
        if leased is not None:
            _check_generates(leased.version, target)
        check_task(leased.version if leased else None, body.task_id)
    groups = [[leased] for leased in call.leased] if votes else [call.leased]
    generations = [
        Generation(call, body, prompts, members, default_max_tokens=default_max_tokens) for members in groups
    ]
    call.admit(prompts, num_new_tokens=sum(generation.max_new_tokens for generation in generations))
    return generations


class Generation:
    """The choices of one request, all with the same soft prompts.

    Choice j of prompt i is sequence ``i * n + j``. With several soft prompts each sequence is an ensemble, which
    draws its tokens from the mean of the members' distributions.

    Attributes:
        prompts: Text tokens of each prompt.
        num_choices: Number of texts to generate.
        max_new_tokens: Maximum number of new tokens, of all choices.

    Args:
        call: The request, with leases.
        body: Its fields.
        prompts: Text tokens of each prompt.
        members: The soft prompts; None for the bare base.
        default_max_tokens: New tokens if the request sets no limit; None is the rest of the context.

    Raises:
        InvalidRequestError: If a prompt or ``min_tokens`` does not fit, or there are too many members.
    """

    def __init__(
        self,
        call: Call,
        body: GenerationBody,
        prompts: list[list[int]],
        members: Sequence[LeasedPrompt | None],
        *,
        default_max_tokens: int | None,
    ) -> None:
        services = call.services
        defaults, max_model_len = services.engine.model.generation_defaults, services.engine.model.max_model_len
        num_virtual_tokens = max(leased.version.num_virtual_tokens if leased else 0 for leased in members)
        self._max_tokens = [
            _fit(
                len(prompt),
                num_virtual_tokens=num_virtual_tokens,
                requested=body.token_limit,
                default=shorter_default(default_max_tokens, defaults),
                max_model_len=max_model_len,
            )
            for prompt in prompts
        ]
        shortest = min(self._max_tokens)
        body = with_defaults(body, defaults, room=shortest)
        if body.min_tokens > shortest:
            raise InvalidRequestError(
                f"min_tokens: {body.min_tokens} is more than the maximum of {shortest} new tokens", param="min_tokens"
            )
        most = services.settings.engine.max_num_seqs
        if len(members) > most:
            param = call.targets[0].param
            raise InvalidRequestError(
                f"{param}: an ensemble of {len(members)} is more than the {most} sequences that run at once here",
                param=param,
            )
        self.prompts = prompts
        self.num_choices = len(prompts) * body.n
        self.max_new_tokens = sum(self._max_tokens) * body.n
        self._call = call
        self._body = body
        self._soft_prompts = [soft_prompt_source(leased, body.task_id) if leased else None for leased in members]
        self._id = uuid.uuid4().hex

    def prompt_of(self, index: int) -> list[int]:
        """The text tokens that a choice continues."""
        return self.prompts[index // self._body.n]

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of all choices as they arrive. Closing it early aborts all running sequences.

        Raises:
            EngineError: If one sequence fails; the others are aborted.
        """
        if self.num_choices == 1:
            async with aclosing(self._choice(0)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        # No TaskGroup: it would cancel the reader while this generator is suspended at a yield (PEP 789).
        tasks = [asyncio.create_task(self._pump(index, queue)) for index in range(self.num_choices)]
        try:
            num_running = len(tasks)
            while num_running:
                item = await queue.get()
                if item is None:
                    num_running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, queue: asyncio.Queue[Delta | Exception | None]) -> None:
        try:
            async with aclosing(self._choice(index)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
        except Exception as error:  # raised again by the reader of the queue
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    async def _choice(self, index: int) -> AsyncGenerator[Delta, None]:
        body = self._body
        answer = AnswerText(self._call.services.tokenizer, body, self.prompt_of(index))
        sequence = self._call.sequence(self._request(index), is_first_of_text=index % body.n == 0)
        is_first = True
        try:
            async with aclosing(sequence.events()) as events:
                async for event in events:
                    text_ids = event.token_ids
                    if event.stop_token_id is not None and not body.include_stop_str_in_output:
                        text_ids = text_ids[:-1]
                    text = answer.detokenizer.append(text_ids)
                    reason = None if event.finish_reason is None else event.finish_reason.value
                    if reason is not None:
                        text += answer.detokenizer.finish()
                    if answer.detokenizer.stopped:
                        reason = FinishReason.STOP.value
                    scored: list[ScoredToken] | None = None if body.num_top_logprobs is None else []
                    if is_first and body.echoes:
                        echo, of_prompt = await answer.echo(event.prompt_logprobs)
                        text = echo + text
                        if scored is not None:
                            scored += of_prompt
                    if scored is not None and event.logprobs is not None:
                        scored += answer.scorer.append(event.token_ids, event.logprobs)
                    is_first = False
                    if reason is not None:
                        sequence.finish(reason)
                    yield Delta(index, text, event.token_ids, reason, scored)
                    if reason is not None:
                        return
        except ConstraintError as error:
            field = body.constraint_field
            raise ConstraintError(f"{field}: {error.message}", param=field) from error

    def _request(self, index: int) -> GenerateRequest:
        body = self._body
        prompt, choice = divmod(index, body.n)
        params = SamplingParams(
            max_tokens=self._max_tokens[prompt],
            min_tokens=body.min_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=body.logit_bias,
            logprobs=body.num_top_logprobs,
            prompt_logprobs=body.num_top_logprobs if body.echoes else None,
            seed=_seed_of(body.seed, choice),
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            constraint=body.constraint,
        )
        soft_prompt, *others = self._soft_prompts
        return GenerateRequest(
            request_id=f"{self._id}-{index}",
            prompt_token_ids=self.prompts[prompt],
            params=params,
            soft_prompt=soft_prompt,
            others=tuple(others),
            salt=self._call.tenant,
            priority=body.priority,
            timeout=self._call.max_wait,
        )


def _seed_of(seed: int | None, choice: int) -> int | None:
    """A seed per choice of a prompt; the first choice uses the request's seed."""
    if seed is None or choice == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed}:{choice}".encode(), digest_size=7).digest(), "big")


def _check_tokens(prompts: list[list[int]], body: GenerationBody, *, vocab_size: int) -> None:
    for prompt in prompts:
        if not prompt:
            raise InvalidRequestError(
                f"{body.text_field}: the text is empty; at least one token is required", param=body.text_field
            )
        check_token_ids(prompt, vocab_size=vocab_size, param=body.text_field)
    check_token_ids(body.stop_token_ids, vocab_size=vocab_size, param="stop_token_ids")
    check_token_ids(body.logit_bias, vocab_size=vocab_size, param="logit_bias")


def _check_echo(prompts: list[list[int]], body: GenerationBody) -> None:
    if body.echoes and body.num_top_logprobs is not None:
        count = sum(map(len, prompts)) * body.n * (1 + body.num_top_logprobs)
        if count > MAX_ECHOED_LOGPROBS:
            raise InvalidRequestError(
                f"logprobs: echo would return {count} of them; the limit is {MAX_ECHOED_LOGPROBS}", param="logprobs"
            )


def _check_generates(version: PromptVersion, target: Target) -> None:
    if version.task_type != TaskType.CAUSAL_LM:
        raise InvalidRequestError(
            f"{target.param}: the soft prompt {version.name}@{version.version} was trained for {version.task_type}, "
            f"not for generation ({TaskType.CAUSAL_LM})",
            param=target.param,
        )


def _fit(
    num_text_tokens: int, *, num_virtual_tokens: int, requested: int | None, default: int | None, max_model_len: int
) -> int:
    """Maximum number of new tokens: the requested number, or the default limited by the context.

    Raises:
        ContextLengthError: If the requested number does not fit, or there is no room for any.
    """
    room = max_model_len - num_virtual_tokens - num_text_tokens
    if requested is None and room >= 1:
        return room if default is None else min(default, room)
    if requested is not None and requested <= room:
        return requested
    need = "at least 1 new token" if requested is None else f"max_tokens of {requested}"
    raise ContextLengthError(
        f"the model's context is {max_model_len} tokens, and the request takes more: {num_virtual_tokens} virtual "
        f"tokens of the soft prompt, {num_text_tokens} text tokens and {need}",
        param="max_tokens" if room >= 1 else "prompt",
    )
