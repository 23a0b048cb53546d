"""Ensembles: the soft prompts, adapters and pairs named by a request, and the combination of their answers.

Prompt ensembling is from Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning": soft prompts
trained on the same task vote, with one model in memory and one batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from prompt_store.types import Access
from server.api.inference.member_faults import FAULTS, MemberFaults
from server.api.inference.pair import LeasedPair
from server.api.inference.target import ADAPTER_FIELD, Target, resolve
from server.api.request_body import RequestBody, check_unicode
from server.errors import InvalidRequestError

MAX_MEMBERS = 16

Combine = Literal["vote", "mean"]
EnsembleMode = Literal["vote", "mean", "each"]

PromptIdField = Annotated[
    str | None,
    Field(
        description="A soft prompt or an adapter, or one of each with `+` between, if `model` is the base model or "
        "absent."
    ),
]
AdapterIdField = Annotated[
    str | None, Field(description="An adapter, alone or beside the soft prompt that `model` or `prompt_id` names.")
]

_NameList = Annotated[list[str], Field(min_length=2, max_length=MAX_MEMBERS)]


def _names(value: object) -> list[str]:
    if isinstance(value, list) and not 2 <= len(value) <= MAX_MEMBERS:
        raise ValueError(f"should name 2 to {MAX_MEMBERS} members, not {len(value)}")
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("should be a list of strings")
    check_unicode(value)
    return value


def _model(value: object) -> str | list[str]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("should be a string, or a list of strings for an ensemble")
    return _names(value)


class EnsembleBody(RequestBody):
    """Fields of requests that one soft prompt or an ensemble can answer."""

    model: Annotated[
        str | list[str] | None,
        PlainValidator(_model, json_schema_input_type=str | _NameList),
        Field(
            description="The base model, a soft prompt or an adapter (NAME, NAME@VERSION, NAME@ALIAS or "
            "BASE:NAME[@...]), or one of each with `+` between; a list is an ensemble."
        ),
    ] = None
    prompt_id: PromptIdField = None
    adapter_id: AdapterIdField = None
    prompt_ids: Annotated[
        list[str] | None,
        PlainValidator(_names, json_schema_input_type=_NameList),
        Field(
            description="The members of an ensemble, each as in `prompt_id`, if `model` is the base model or absent."
        ),
    ] = None
    ensemble: EnsembleMode | None = Field(
        None,
        description="How to combine an ensemble's answers; default: `vote`. `each`: not at all, every member answers "
        "in choices of its own.",
    )

    @model_validator(mode="after")
    def _check_members(self) -> Self:
        several = [name for name in ("model", "prompt_ids") if isinstance(getattr(self, name), list)]
        if len(several) == 2:
            raise InvalidRequestError("prompt_ids: cannot be combined with a list in model", param="prompt_ids")
        if several and self.prompt_id is not None:
            raise InvalidRequestError(f"prompt_id: cannot be combined with {several[0]}", param="prompt_id")
        if several and self.adapter_id is not None:
            raise InvalidRequestError(
                f"{ADAPTER_FIELD}: cannot be combined with an ensemble: name pairs in {several[0]}, as NAME+ADAPTER",
                param=ADAPTER_FIELD,
            )
        names = self.member_names
        if len(set(names)) != len(names) and not self.may_repeat:
            raise InvalidRequestError(f"{several[0]}: should not name a member twice", param=several[0])
        if self.ensemble is not None and not several:
            raise InvalidRequestError(
                "ensemble: requires several members: give a list in model, or prompt_ids",
                param="ensemble",
            )
        return self

    @property
    def member_names(self) -> list[str]:
        """The members as the request names them; empty if it names no ensemble."""
        return self.model if isinstance(self.model, list) else self.prompt_ids or []

    @property
    def member_field(self) -> str:
        """The field that lists the members."""
        return "model" if self.prompt_ids is None else "prompt_ids"

    @property
    def may_repeat(self) -> bool:
        """Whether a name may stand there twice."""
        return False

    @property
    def is_ensemble(self) -> bool:
        """Whether the request names an ensemble."""
        return isinstance(self.model, list) or self.prompt_ids is not None

    @property
    def combine(self) -> Combine:
        """How the answers are combined, unless each is given."""
        return "mean" if self.ensemble == "mean" else "vote"

    @property
    def gives_each(self) -> bool:
        """Whether every member answers in choices of its own."""
        return self.ensemble == "each"

    @property
    def model_text(self) -> str | None:
        """The field ``model`` in one text, several names with commas between."""
        return ",".join(self.model) if isinstance(self.model, list) else self.model


def targets_of(body: EnsembleBody, *, base_name: str, access: Access) -> list[Target]:
    """The target of a request, or each member of its ensemble.

    Raises:
        ModelNotFoundError: If a name in ``model`` is not valid.
        InvalidRequestError: If an id is not well formed, or the fields do not go together.
    """
    if isinstance(body.model, list):
        return [resolve(name, None, base_name=base_name, access=access) for name in body.model]
    if body.prompt_ids is None:
        return [resolve(body.model, body.prompt_id, body.adapter_id, base_name=base_name, access=access)]
    return [
        resolve(body.model, name, base_name=base_name, access=access, param="prompt_ids") for name in body.prompt_ids
    ]


def targets_of_each(body: EnsembleBody, *, base_name: str, access: Access, faults: MemberFaults) -> list[Target]:
    """The targets of all members; that of a name which is not valid is the base, with a fault."""
    model, param = (None, "model") if body.prompt_ids is None else (body.model_text, "prompt_ids")
    targets = []
    for index, name in enumerate(body.member_names):
        try:
            given = (name, None) if body.prompt_ids is None else (model, name)
            targets.append(resolve(*given, base_name=base_name, access=access, param=param))
        except FAULTS as error:
            faults.add(index, error)
            targets.append(Target(base_name, access))
    return targets


def check_different(targets: Sequence[Target], leased: Sequence[LeasedPair]) -> None:
    """Reject an ensemble with the same versions twice, under any names.

    Raises:
        InvalidRequestError: If there is one; the message names the field and the version.
    """
    names = [pair.name for pair in leased]
    for target, name in zip(targets, names, strict=True):
        if names.count(name) > 1:
            what = "the base model" if name is None else name
            raise InvalidRequestError(f"{target.param}: {what} is named twice", param=target.param)


@dataclass(frozen=True, slots=True)
class Decision:
    """The combined answer of an ensemble to one input.

    Attributes:
        best: Index of the label.
        probabilities: Of each label, the mean of the members' probabilities.
        votes: For each label, the number of members that find it the most likely.
    """

    best: int
    probabilities: list[float]
    votes: list[int]


def decide(probabilities: Sequence[Sequence[float]], how: Combine) -> Decision:
    """Combine the members' probabilities of the same labels in the same order.

    By ``mean`` the label with the highest mean probability wins; of equals the first. By ``vote`` each member votes
    for its most likely label, of equals the first, and the label with most votes wins; the mean breaks a tie.
    """
    count = len(probabilities[0])
    means = [sum(column) / len(probabilities) for column in zip(*probabilities, strict=True)]
    votes = [0] * count
    for row in probabilities:
        votes[max(range(count), key=row.__getitem__)] += 1
    if how == "mean":
        best = max(range(count), key=means.__getitem__)
    else:
        best = max(range(count), key=lambda index: (votes[index], means[index]))
    return Decision(best, means, votes)


def elect(texts: Sequence[str], likelihoods: Sequence[float]) -> tuple[int, Counter[str]]:
    """The first member with the most frequent text.

    Args:
        texts: The text of each member.
        likelihoods: For each member, the mean log-probability of its tokens.

    Returns:
        Index of the first member with the winning text, and the votes by text. If texts have equally many votes, the
        one whose members have the highest mean likelihood wins; of equals the first.
    """
    votes = Counter(texts)

    def rank(text: str) -> tuple[int, float]:
        own = [likelihood for given, likelihood in zip(texts, likelihoods, strict=True) if given == text]
        return votes[text], sum(own) / len(own)

    return texts.index(max(votes, key=rank)), votes
