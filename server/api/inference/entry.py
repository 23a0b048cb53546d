"""Checks before any work is done: a key's limits, and the size of the request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.http.http_middleware import HttpMiddleware
from server.api.inference.request_record import record_of
from server.api.keys.callers import caller_of
from server.api.keys.limits import Allowance
from server.api.operations import Quota, matched
from server.api.services import Services
from server.errors import ContextLengthError, PayloadTooLargeError, RateLimitError
from server.fair_work import Work, current_work, working_for
from server.metrics.metrics import Metrics

MOST_CHARS_PER_TOKEN = 128
"""Limit for one text: the longest tokens of known vocabularies are runs of this many spaces."""

CHARS_PER_TOKEN = 8
"""Limit for all texts of a request together; more than usual texts have."""

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
    """A request's part of its key's limits."""
    allowance = request.state.allowance
    if not isinstance(allowance, Allowance):
        raise TypeError("the state of a request holds something else than its allowance")
    return allowance


def check_entry(
    services: Services,
    allowance: Allowance,
    texts: Sequence[str] | Sequence[list[int]],
    *,
    field: str,
    num_members: int,
    min_new_tokens: int,
) -> None:
    """Check the size of a request's texts, and that its key has tokens for them, before any text is tokenised.

    Args:
        services: The server.
        allowance: The request's part of its key's limits.
        texts: The texts, or their tokens.
        field: The request field that they are from.
        num_members: Number of ensemble members, each of which reads every text.
        min_new_tokens: Minimum number of new tokens, of all sequences.

    Raises:
        ContextLengthError: If a text is longer than any that fits the context.
        PayloadTooLargeError: If all texts together are too long.
        RateLimitError: If the key has fewer tokens than the request needs at least, or is likely to need.
    """
    check_size(services, texts, field=field)
    least = sum(1 if isinstance(text, str) else len(text) for text in texts)
    likely = sum(len(text) // _LIKELY_CHARS_PER_TOKEN if isinstance(text, str) else len(text) for text in texts)
    allowance.require(least * num_members + min_new_tokens, likely * num_members + min_new_tokens)


@contextmanager
def entered_for_text(services: Services, request: Request, num_chars: int, *, num_tokens: int = 0) -> Iterator[None]:
    """Accept a request that only tokenises or detokenises.

    Args:
        services: The server.
        request: The request.
        num_chars: Characters of all texts.
        num_tokens: Tokens, if the request has tokens.

    Raises:
        RateLimitError: If the key has fewer tokens than the request is likely to need.
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
    """Check the size of a request's texts before any of them is tokenised.

    Raises:
        ContextLengthError: If a text is longer than any that fits the context.
        PayloadTooLargeError: If all texts together are longer than the texts of ``max_num_seqs`` sequences may be.
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


def is_batch_tier(service_tier: str | None) -> bool:
    """Whether a request's ``service_tier`` is ``batch``; OpenAI's ``flex`` is the same. Others are interactive."""
    return service_tier in ("batch", "flex")
