"""Checks before any work is done: a key's limits, permits, and the size of the request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.admission import Permits
from server.api.http.http_middleware import HttpMiddleware
from server.api.inference.request_record import record_of
from server.api.keys.callers import Caller, caller_of
from server.api.keys.limits import Allowance
from server.api.operations import Quota, matched
from server.api.services import Services
from server.errors import ContextLengthError, PayloadTooLargeError, RateLimitError
from server.fair_work import Work, current_work, working_for
from server.metrics import Metrics

MOST_CHARS_PER_TOKEN = 128
"""Limit for one text: the longest tokens of known vocabularies are runs of this many spaces."""

CHARS_PER_TOKEN = 8
"""Limit for all texts of a request; more than usual texts have."""

_LIKELY_CHARS_PER_TOKEN = 6

_REFUSALS_OF_OURS = frozenset({429, 503})


class LimitsMiddleware(HttpMiddleware):
    """Enforces the limits of keys before a body is read, and attributes the work to the tenant.

    Args:
        app: The rest of the application.
        metrics: Where errors are counted.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        super().__init__(app)
        self._metrics = metrics

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit one request."""
        request, operation = Request(scope), matched(scope).operation
        caller = caller_of(request)
        with ExitStack() as stack:
            work = stack.enter_context(working_for(caller.tenant))
            if operation is not None and operation.quota is not None:
                takes_tokens = operation.quota is Quota.TOKENS
                try:
                    allowance = stack.enter_context(caller.limiter.admitted(takes_tokens=takes_tokens))
                except RateLimitError as error:
                    # Not raised: the response needs the headers that ``send`` adds.
                    await record_of(request).fail(error, self._metrics).response()(scope, receive, send)
                    return
                stack.callback(lambda: allowance.settle(work.num_tokens))
                scope["state"]["allowance"] = allowance
                send = _noting_refusals(allowance, work, send)
            await self.app(scope, receive, send)


def _noting_refusals(allowance: Allowance, work: Work, send: Send) -> Send:
    """Do not count a request that the server rejected for lack of capacity, before any work."""

    async def noting_send(message: Message) -> None:
        if (
            message["type"] == "http.response.start"
            and message["status"] in _REFUSALS_OF_OURS
            and not work.num_tokens
        ):
            allowance.forget_request()
        await send(message)

    return noting_send


def allowance_of(request: Request) -> Allowance:
    """The allowance of a request within its key's limits."""
    allowance = request.state.allowance
    if not isinstance(allowance, Allowance):
        raise TypeError("the state of a request holds something else than its allowance")
    return allowance


@dataclass(frozen=True, slots=True)
class Entry:
    """The resources held by an accepted request.

    Attributes:
        caller: Whose it is.
        allowance: What it takes of its key's limits.
        permits: Its places, one for each sequence.
    """

    caller: Caller
    allowance: Allowance
    permits: Permits

    def reserve(self, num_tokens: int) -> None:
        """Reserve the maximum number of tokens, once it is known.

        Raises:
            RateLimitError: If the key has too few tokens left; the tokenised tokens still count.
        """
        self.allowance.reserve(num_tokens, done=current_work().num_tokens)


@contextmanager
def entered(
    services: Services,
    request: Request,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    field: str,
    count: int,
    count_field: str,
    num_members: int,
    num_new_tokens: int,
    timeout: float | None,
    priority: int,
) -> Iterator[Entry]:
    """Accept or reject a request for the model before its texts are tokenised; held until the block ends.

    Args:
        services: The server.
        request: The request.
        prompts: Its texts, or their tokens.
        field: The field that they are from.
        count: Sequences that it asks for.
        count_field: The request field that sets the number of sequences.
        num_members: Number of ensemble members, each of which reads every text.
        num_new_tokens: New tokens that all sequences may come to at least.
        timeout: Seconds in which it has to begin; None is no limit.
        priority: Negative is more urgent.

    Raises:
        ContextLengthError: If a text is longer than any that fits the context.
        PayloadTooLargeError: If all texts together are.
        RateLimitError: If the caller's key does not have as many tokens as it needs at least, or likely.
        InvalidRequestError: If it asks for more sequences than the server ever takes.
        OverloadedError: If the server is full.
        WaitTimeoutError: If its turn would come too late.
    """
    caller = caller_of(request)
    admission = services.admission
    admission.check(caller.tenant, timeout, priority=priority)
    check_size(services, prompts, field=field)
    allowance = allowance_of(request)
    least = sum(1 if isinstance(prompt, str) else len(prompt) for prompt in prompts)
    likely = sum(
        len(prompt) // _LIKELY_CHARS_PER_TOKEN if isinstance(prompt, str) else len(prompt) for prompt in prompts
    )
    allowance.require(least * num_members + num_new_tokens, likely * num_members + num_new_tokens)
    with admission.permits(count, tenant=caller.tenant, param=count_field) as permits:
        try:
            yield Entry(caller, allowance, permits)
        finally:
            allowance.settle(current_work().num_tokens)


@contextmanager
def entered_for_text(services: Services, request: Request, num_chars: int, *, num_tokens: int = 0) -> Iterator[None]:
    """Accept a request that only tokenises or detokenises.

    Args:
        services: The server.
        request: The request.
        num_chars: Of its texts together.
        num_tokens: Of its tokens.

    Raises:
        RateLimitError: If the caller's key likely does not have the tokens.
        OverloadedError: If the server is full.
    """
    allowance = allowance_of(request)
    allowance.require(num_tokens, num_tokens + num_chars // _LIKELY_CHARS_PER_TOKEN)
    with services.admission.permits(1, tenant=caller_of(request).tenant, waits=False):
        try:
            yield
        finally:
            allowance.settle(max(num_tokens, current_work().num_tokens))


def check_size(services: Services, prompts: Sequence[str] | Sequence[list[int]], *, field: str) -> None:
    """Limit the texts of a request before any of them is tokenised.

    Raises:
        ContextLengthError: If a text is longer than any that fits the context.
        PayloadTooLargeError: If all texts together are longer than those of as many sequences as run at once.
    """
    context = services.engine.model.max_model_len
    most = MOST_CHARS_PER_TOKEN * context
    sizes = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
    if max(sizes, default=0) > most:
        raise ContextLengthError(
            f"{field}: the model's context is {context} tokens, and a text of {max(sizes)} characters is longer; "
            f"at most {most} characters are allowed",
            param=field,
        )
    most_in_all = max(most, CHARS_PER_TOKEN * context * services.settings.engine.max_num_seqs)
    if sum(sizes) > most_in_all:
        raise PayloadTooLargeError(
            f"{field}: the texts have {sum(sizes)} characters together, and at most {most_in_all} are allowed: "
            "send several requests",
            param=field,
        )
