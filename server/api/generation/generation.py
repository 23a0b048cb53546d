"""Text generation for one request: sequences become choices, and their tokens become text."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b

from prompt_store.formats import SamplingDefaults
from prompt_store.types import PromptVersion, TaskType
from server.api.generation.answer_text import AnswerText
from server.api.generation.bodies import MAX_ECHOED_LOGPROBS, GenerationBody
from server.api.generation.merging import merged
from server.api.generation.prompt_text import format_of
from server.api.generation.sampling_defaults import shorter_default, under, with_defaults
from server.api.inference.call import Call
from server.api.inference.logprobs import ScoredToken
from server.api.inference.pair import LeasedPair
from server.api.inference.responses import ChoiceError, Timings
from server.api.inference.target import Target
from server.api.inference.token_ids import check_token_ids
from server.api.soft_prompts.engine_source import called, check_task
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
        model: The member that generates the choice, if each member has choices of its own.
        step: The engine's step that computed the newest of ``token_ids``.
        timings: The times of the choice, in its last delta.
        error: Why the choice failed, if ``finish_reason`` is ``error``.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    scored: list[ScoredToken] | None = None
    model: str | None = None
    step: int | None = None
    timings: Timings | None = None
    error: ChoiceError | None = None


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
    check_tokens(prompts, body, vocab_size=call.services.engine.model.vocab_size)
    check_echo(prompts, body)
    await call.lease()
    for target, leased in zip(call.targets, call.leased, strict=True):
        for version in leased.versions:
            check_generates(version, target)
        check_task(next(iter(leased.versions), None), body.single_task)
    groups = [[leased] for leased in call.leased] if votes else [call.leased]
    generations = [
        Generation(call, body, prompts, members, task_id=body.single_task, default_max_tokens=default_max_tokens)
        for members in groups
    ]
    call.admit(prompts, num_new_tokens=sum(generation.max_new_tokens for generation in generations))
    return generations


class Generation:
    """The choices of one request, all with the same members.

    Choice j of prompt i is sequence ``i * n + j``. With several members each sequence is an ensemble, which
    draws its tokens from the mean of the members' distributions.

    Attributes:
        prompts: Text tokens of each prompt.
        num_choices: Number of texts to generate.
        max_new_tokens: Maximum number of new tokens, of all choices.

    Args:
        call: The request, with leases.
        body: Its fields.
        prompts: Text tokens of each prompt.
        members: The soft prompt, adapter or pair of each.
        task_id: The task of all members.
        default_max_tokens: New tokens if the request sets no limit; None is the rest of the context.
        first_index: Index of the first choice.
        model: The member's name, to be repeated in each delta; None for none.

    Raises:
        InvalidRequestError: If a prompt or ``min_tokens`` does not fit, or there are too many members.
    """

    def __init__(
        self,
        call: Call,
        body: GenerationBody,
        prompts: list[list[int]],
        members: Sequence[LeasedPair],
        *,
        task_id: int | None,
        default_max_tokens: int | None,
        first_index: int = 0,
        model: str | None = None,
    ) -> None:
        services = call.services
        engine_model = services.engine.model
        sampling = _sampling_of(members, applies_format=body.applies_format)
        defaults, max_model_len = under(sampling, engine_model.generation_defaults), engine_model.max_model_len
        num_virtual_tokens = max(pair.num_virtual_tokens for pair in members)
        self._max_tokens = [
            _fit(
                len(prompt),
                num_virtual_tokens=num_virtual_tokens,
                requested=body.token_limit,
                default=sampling.max_tokens or shorter_default(default_max_tokens, defaults),
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
        self._pair = members[0] if len(members) == 1 else None
        self._members = [pair.member(task_id) for pair in members]
        self._first_index = first_index
        self._model = model
        self._id = uuid.uuid4().hex

    def prompt_of(self, index: int) -> list[int]:
        """The text tokens that a choice continues."""
        return self.prompts[(index - self._first_index) // self._body.n]

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of all choices as they arrive. Closing it early aborts all running sequences.

        Raises:
            EngineError: If one sequence fails; the others are aborted.
        """
        choices = [self.choice(self._first_index + index) for index in range(self.num_choices)]
        async with aclosing(merged(choices)) as deltas:
            async for delta in deltas:
                yield delta

    async def choice(self, index: int) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of one choice. Closing it early aborts its sequence.

        Raises:
            EngineError: If the sequence fails.
        """
        body = self._body
        answer = AnswerText(self._call.services.tokenizer, body, self.prompt_of(index))
        is_first_of_text = (index - self._first_index) % body.n == 0
        sequence = self._call.sequence(self.request(index), is_first_of_text=is_first_of_text, pair=self._pair)
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
                    timings = sequence.timings if reason is not None and body.return_timings else None
                    yield Delta(index, text, event.token_ids, reason, scored, self._model, event.step, timings)
                    if reason is not None:
                        return
        except Exception as error:
            sequence.fail()
            if not isinstance(error, ConstraintError):
                raise
            field = body.constraint_field
            raise ConstraintError(f"{field}: {error.message}", param=field) from error

    def request(self, index: int) -> GenerateRequest:
        """The engine's request for a choice."""
        body = self._body
        prompt, choice = divmod(index - self._first_index, body.n)
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
            logprobs=_logprobs_for(self._call, body),
            prompt_logprobs=body.num_top_logprobs if body.echoes else None,
            seed=_seed_of(body.seed, choice),
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            constraint=body.constraint,
        )
        first, *others = self._members
        return GenerateRequest(
            request_id=f"{self._id}-{index}",
            prompt_token_ids=self.prompts[prompt],
            params=params,
            soft_prompt=first.soft_prompt,
            adapter=first.adapter,
            others=tuple(others),
            salt=self._call.tenant,
            priority=body.priority,
            is_batch=self._call.is_batch,
            timeout=self._call.max_wait,
        )


def _logprobs_for(call: Call, body: GenerationBody) -> int | None:
    """The number of top log-probabilities to ask for; an answer that is compared with a shadow's needs its own."""
    if body.num_top_logprobs is None and call.shadow is not None:
        return 0
    return body.num_top_logprobs


def _seed_of(seed: int | None, choice: int) -> int | None:
    """A seed per choice of a prompt; the first choice uses the request's seed."""
    if seed is None or choice == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed}:{choice}".encode(), digest_size=7).digest(), "big")


def check_tokens(prompts: list[list[int]], body: GenerationBody, *, vocab_size: int) -> None:
    """Check that the prompts are not empty, and that all token ids of a request exist; InvalidRequestError if not."""
    for prompt in prompts:
        if not prompt:
            raise InvalidRequestError(
                f"{body.text_field}: the text is empty; at least one token is required", param=body.text_field
            )
        check_token_ids(prompt, vocab_size=vocab_size, param=body.text_field)
    check_token_ids(body.stop_token_ids, vocab_size=vocab_size, param="stop_token_ids")
    check_token_ids(body.logit_bias, vocab_size=vocab_size, param="logit_bias")


def check_echo(prompts: list[list[int]], body: GenerationBody) -> None:
    """Check that the prompts of all members have not too many logprobs to echo; InvalidRequestError if they have."""
    if body.echoes and body.num_top_logprobs is not None:
        count = sum(map(len, prompts)) * body.n * (1 + body.num_top_logprobs)
        if count > MAX_ECHOED_LOGPROBS:
            raise InvalidRequestError(
                f"logprobs: echo would return {count} of them; the limit is {MAX_ECHOED_LOGPROBS}", param="logprobs"
            )


def check_generates(version: PromptVersion, target: Target) -> None:
    """Check that a version was trained to generate; InvalidRequestError if not."""
    if version.task_type != TaskType.CAUSAL_LM:
        raise InvalidRequestError(
            f"{target.param}: {called(version)} was trained for {version.task_type}, not for generation "
            f"({TaskType.CAUSAL_LM})",
            param=target.param,
        )


def _sampling_of(members: Sequence[LeasedPair], *, applies_format: bool) -> SamplingDefaults:
    """The sampling defaults of the version's format; those of an ensemble are the same."""
    known = format_of(members[0].versions) if applies_format else None
    return SamplingDefaults() if known is None else known.sampling


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
