"""``/v1/classify``: texts to labels, by a soft prompt's own head or by scoring labels as continuations."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Self

import msgspec
from fastapi import APIRouter, Depends
from msgspec import UNSET, Meta, UnsetType
from pydantic import Field, PlainValidator, model_validator
from starlette.requests import Request
from starlette.responses import Response

from server.api.classification.classification import Inputs, Label, Verdict, check_tokens, prepare, score
from server.api.generation.bodies import Priority, Prompts, ServiceTier, TaskId, Timeout, User
from server.api.generation.known_fields import CLASSIFY, KnownFieldsBody, Refused
from server.api.generation.prompt_text import format_to_apply, texts_in_format
from server.api.generation.routes import tokenize_prompts
from server.api.inference.call import Call
from server.api.inference.ensemble import Combine, EnsembleBody, decide, targets_of
from server.api.inference.entry import is_batch_tier
from server.api.inference.pair import LeasedPair
from server.api.inference.request_record import begin_record
from server.api.inference.responses import Created, MemberName, ModelName, ObjectType, ResponseId, Usage
from server.api.inference.target import Target
from server.api.keys.callers import Scope, caller_of
from server.api.operations import Operation, Quota
from server.api.request_body import check_unicode, require_json
from server.api.services import Services, ServicesDep, require_ready
from server.api.shadowing import Output
from server.api.soft_prompts.head_labels import known_labels
from server.continuations import Context
from server.errors import InvalidRequestError

router = APIRouter(
    prefix="/v1", tags=["classification"], dependencies=[Depends(require_ready), Depends(require_json)]
)

MAX_LABELS = 256
MAX_LABEL_CHARS = 1024


_LabelList = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)]],
    Field(min_length=1, max_length=MAX_LABELS, json_schema_extra={"uniqueItems": True}),
]


def _labels(value: object) -> list[str]:
    if isinstance(value, list) and not 0 < len(value) <= MAX_LABELS:
        raise ValueError(f"should have 1 to {MAX_LABELS} labels, not {len(value)}")
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise ValueError("should be a list of strings")
    if not all(0 < len(label) <= MAX_LABEL_CHARS for label in value):
        raise ValueError(f"should hold strings of 1 to {MAX_LABEL_CHARS} characters")
    if len(set(value)) != len(value):
        raise ValueError("should not contain a label twice")
    check_unicode(value)
    return value


class ClassifyBody(EnsembleBody, KnownFieldsBody):
    """``POST /v1/classify``."""

    unsupported: ClassVar[Mapping[str, Refused]] = CLASSIFY

    task_id: TaskId = None
    input: Annotated[Prompts, Field(description="One or more texts, as strings or token ids.")]
    labels: Annotated[
        list[str] | None,
        PlainValidator(_labels, json_schema_input_type=_LabelList),
        Field(
            description="Labels to choose from. Each is scored as a continuation of the text, so include a leading "
            "space or line end. Not allowed for soft prompts with a head (SEQ_CLS), required for all others."
        ),
    ] = None
    add_special_tokens: bool | None = Field(
        None,
        description="Whether to add the tokenizer's special tokens; default: true, except for a chat template that "
        "`apply_format` applies.",
    )
    apply_format: bool = Field(
        False,
        description="Put each text into the prompt format of the soft prompt, and its separator before each label.",
    )
    priority: Priority = 0
    timeout: Timeout = None
    service_tier: ServiceTier = None
    user: User = None

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.gives_each:
            raise InvalidRequestError('ensemble: should be "vote" or "mean" for a classification', param="ensemble")
        return self


class MemberLabel(msgspec.Struct, kw_only=True):
    """The result of one member of an ensemble for an input."""

    model: MemberName
    label: Annotated[str, Meta(description="The most likely label.")]
    probability: Annotated[float, Meta(description="Probability of the most likely label.")]


class Classified(msgspec.Struct, kw_only=True):
    """The result for one input."""

    index: Annotated[int, Meta(description="Index of the input, from 0.")]
    label: Annotated[str, Meta(description="The most likely label.")]
    probability: Annotated[float, Meta(description="Probability of the most likely label.")]
    num_classes: Annotated[int, Meta(description="Number of labels.")]
    probs: Annotated[list[float], Meta(description="Probabilities in the order of the labels, as vLLM returns them.")]
    probabilities: Annotated[dict[str, float], Meta(description="Probabilities by label.")]
    logprobs: Annotated[
        dict[str, float] | UnsetType,
        Meta(description="Log-probability of each given label after the text; absent with ensembles and heads."),
    ] = UNSET
    logits: Annotated[
        dict[str, float] | UnsetType,
        Meta(description="Output of the classification head per label, if a single head decided."),
    ] = UNSET
    votes: Annotated[
        dict[str, int] | UnsetType, Meta(description="Of an ensemble: number of members that voted for each label.")
    ] = UNSET
    members: Annotated[
        list[MemberLabel] | UnsetType, Meta(description="Of an ensemble: the result of each member.")
    ] = UNSET


class ClassifyReply(msgspec.Struct, kw_only=True):
    """The response of ``/v1/classify``."""

    id: ResponseId
    object: ObjectType = "list"
    created: Created
    model: ModelName
    data: Annotated[list[Classified], Meta(description="One entry per input, in order.")]
    usage: Annotated[Usage, Meta(description="Token counts of the request.")]


@router.post("/classify", response_class=Response)
@Operation(
    scopes={Scope.GENERATE},
    errors=(404, 429, 503),
    quota=Quota.TOKENS,
    work="classify",
    takes_token_ids=True,
    example={"model": "sentiment", "input": ["The strap feels flimsy."], "labels": ["\npositive", "\nnegative"]},
    reply=ClassifyReply,
)
async def classify(body: ClassifyBody, request: Request, services: ServicesDep) -> Response:
    """Classify one or more texts."""
    record = begin_record(request, services, model=body.model_text, text=lambda: body.input)
    targets = targets_of(body, base_name=services.base_name, access=caller_of(request).access)
    call = Call(
        services=services,
        request=request,
        record=record,
        targets=targets,
        texts=body.input,
        text_field="input",
        num_sequences=len(targets) * len(body.input) * len(body.labels or [None]),
        members_per_sequence=1,
        count_field="input",
        min_new_tokens=len(targets) * len(body.input) * len(body.labels or ()),
        timeout=body.timeout,
        priority=body.priority,
        is_batch=is_batch_tier(body.service_tier),
        user=body.user,
    )

    async def answer() -> bytes:
        texts, labels = await _tokenize(services, body, call)
        inputs = Inputs(texts=texts, labels=labels, task_id=body.task_id)
        await prepare(call, inputs)
        names = [body.labels or await _label_names(services, pair) for pair in call.leased]
        _check_same_labels(names, targets)
        verdicts = await score(call, inputs)
        call.outputs = [Output(names[0][verdict.best], None) for verdict in verdicts[0]]
        reply = ClassifyReply(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=body.model_text or services.base_name,
            data=_data(body, names, call, verdicts),
            usage=call.usage,
        )
        return msgspec.json.encode(reply)

    return await call.respond(answer)


def _data(body: ClassifyBody, names: list[list[str]], call: Call, verdicts: list[list[Verdict]]) -> list[Classified]:
    """One entry for each input."""
    of_inputs = list(zip(*verdicts, strict=True))
    if not body.is_ensemble:
        return [
            _classified(index, names[0], verdict, is_by_head=body.labels is None)
            for index, (verdict,) in enumerate(of_inputs)
        ]
    members = [pair.name or call.services.base_name for pair in call.leased]
    return [_combined(index, names, members, own, body.combine) for index, own in enumerate(of_inputs)]


def _check_same_labels(names: list[list[str]], targets: Sequence[Target]) -> None:
    """Check that the heads of an ensemble have the same labels, in any order."""
    for own, target in zip(names, targets, strict=True):
        if set(own) != set(names[0]):
            raise InvalidRequestError(
                f"{target.param}: the heads of the members do not have the same labels", param=target.param
            )


def _combined(
    index: int, names: list[list[str]], members: list[str], verdicts: Sequence[Verdict], how: Combine
) -> Classified:
    """The combined result of an ensemble, with labels in the first member's order."""
    labels = names[0]
    by_label = [
        dict(zip(own, verdict.probabilities, strict=True)) for own, verdict in zip(names, verdicts, strict=True)
    ]
    decision = decide([[probs[label] for label in labels] for probs in by_label], how)
    return Classified(
        index=index,
        label=labels[decision.best],
        probability=decision.probabilities[decision.best],
        num_classes=len(labels),
        probs=decision.probabilities,
        probabilities=dict(zip(labels, decision.probabilities, strict=True)),
        votes=dict(zip(labels, decision.votes, strict=True)),
        members=[
            MemberLabel(model=member, label=own[verdict.best], probability=verdict.probabilities[verdict.best])
            for member, own, verdict in zip(members, names, verdicts, strict=True)
        ],
    )


def _classified(index: int, names: list[str], verdict: Verdict, *, is_by_head: bool) -> Classified:
    probs = verdict.probabilities
    scores = dict(zip(names, verdict.scores, strict=True))
    return Classified(
        index=index,
        label=names[verdict.best],
        probability=probs[verdict.best],
        num_classes=len(names),
        probs=probs,
        probabilities=dict(zip(names, probs, strict=True)),
        logprobs=UNSET if is_by_head else scores,
        logits=scores if is_by_head else UNSET,
    )


async def _tokenize(services: Services, body: ClassifyBody, call: Call) -> tuple[list[list[int]], list[Label] | None]:
    """The tokens of the inputs, and those of the labels after each input."""
    tokenizer, names, sources, separator = services.tokenizer, body.labels, body.input, ""
    adds = body.add_special_tokens is not False
    if body.apply_format:
        await call.lease()
        prompt_format = format_to_apply(call.leased, services.base_name)
        formatted = await texts_in_format(services, prompt_format, body.input, field="input")
        sources, separator = [one.text for one in formatted], prompt_format.separator
        if body.add_special_tokens is None:
            adds = formatted[0].add_special_tokens
    inputs = await tokenize_prompts(services, sources, add_special_tokens=adds, field="input")
    check_tokens(inputs, vocab_size=services.engine.model.vocab_size)
    if names is None:
        return inputs, None
    labels = [Label(name, []) for name in names]
    continuations = [separator + name for name in names]
    for index, (text, token_ids) in enumerate(zip(sources, inputs, strict=True)):
        context = Context(token_ids, text if isinstance(text, str) else None)
        inputs[index], found = await tokenizer.encode_labels(context, continuations, add_special_tokens=adds)
        _check_different(names, found)
        for label, own in zip(labels, found, strict=True):
            label.token_ids.append(own)
    return inputs, labels


def _check_different(names: Sequence[str], found: Sequence[Sequence[int]]) -> None:
    known: dict[tuple[int, ...], str] = {}
    for name, token_ids in zip(names, found, strict=True):
        if not token_ids:
            raise InvalidRequestError(f"labels: {name[:64]!r} has no tokens", param="labels")
        other = known.setdefault(tuple(token_ids), name)
        if other != name:
            raise InvalidRequestError(f"labels: {other[:64]!r} and {name[:64]!r} are the same tokens", param="labels")


async def _label_names(services: Services, pair: LeasedPair) -> list[str]:
    """The names of a head's labels."""
    leased = pair.with_head
    if leased is None or leased.version.num_labels is None:
        raise TypeError("only a soft prompt or an adapter with a head has labels")
    names = await known_labels(services.store, leased.version)
    return names or [f"LABEL_{index}" for index in range(leased.version.num_labels)]
