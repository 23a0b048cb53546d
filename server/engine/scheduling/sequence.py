"""One text being continued, as scheduler, block manager and sampler share it. Plain data: no torch, no HTTP.

An *ensemble* continues one text behind several soft prompts. It has one sequence per soft prompt; all have the same
tokens, and the next token is drawn from the mean of their distributions. The first sequence, the leader, represents
all: they wait, run, are preempted and end together, and the leader's parameters choose the tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

from server.engine.constraints import TokenMatcher
from server.engine.scheduling.ngrams import NgramIndex
from server.engine.types import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    ErrorCode,
    FinishReason,
    GenerateRequest,
    Logprobs,
    Member,
    SoftPromptSource,
)

BATCH_URGENCY = MAX_PRIORITY - MIN_PRIORITY + 1
"""Added to the priority of the service tier ``batch``: all of it is less urgent than any other."""


class Sequence:
    """One text being continued: its tokens, its blocks, and how far its keys and values reach.

    Positions count virtual tokens first: token ``token_ids[i]`` is at position ``num_virtual_tokens + i``.

    Args:
        request: The request. Its ``others`` become ``followers``.
        arrival: When the request arrived, in seconds of the engine's clock.

    Attributes:
        request: The request; a follower's has a separate id, soft prompt and adapter.
        token_ids: The prompt's tokens, then the new ones. The members of an ensemble share one list.
        num_prompt_tokens: Tokens of the prompt.
        num_virtual_tokens: Positions that the soft prompt takes.
        urgency: The request's priority, until the sequence has waited long enough to be promoted to the most urgent
            class.
        arrival: When the request arrived.
        deadline: When it ends if it has not started to run, in seconds of the engine's clock; None is never.
        turn: Number of sequences that had their first turn before this one; None before its own first turn.
        first_run: When it first got blocks, in seconds of the engine's clock; None before.
        block_table: Block ids by position // block_size; the first ones may be shared with other sequences. A list
            only grows: when blocks are released, the sequence gets a new one.
        block_hashes: Chain hash of each full block of ``block_table`` that is registered or was matched.
        num_computed: Positions whose keys and values are in the cache, or are written in the current step.
        num_cached_tokens: Prompt tokens found in the prefix cache at the first admission.
        end_reason: Why the sequence ended; None while it has not.
        stop_token_id: The token that ended it, if one did.
        rng: The random numbers of this sequence.
        drawn: The number of new tokens when a random number was last drawn, and that number; None before.
        kept_draw: The number that ``draw`` returns next, kept from a step that raised.
        matcher: Its position in the grammar of its constraint, once compiled. It has consumed exactly the new tokens,
            so preemption does not affect it.
        adjusts_logits: ``request.params.adjusts_logits``, cached because every step reads it.
        ngrams: N-grams of the text, once a rule of the checkpoint needs them.
        flat_until: Number of new tokens before which the sampler sorts the vocabulary, because many were likely.
        prompt_logprobs: Logprobs of the prompt from ``prompt_logprobs_start``, as far as computed. The first is None
            if no position precedes the token. They survive preemption.
        followers: The other members of the ensemble that it leads. Queueing, turns, ends, parameters and the
            constraint belong to the leader; each member has its own blocks.
        is_follower: Whether another sequence leads it.

    Raises:
        ValueError: If the prompt is empty, or the priority is out of range.
    """

    __slots__ = (
        "adjusts_logits",
        "arrival",
        "block_hashes",
        "block_table",
        "deadline",
        "drawn",
        "end_reason",
        "first_run",
        "flat_until",
        "followers",
        "is_follower",
        "kept_draw",
        "matcher",
        "ngrams",
        "num_cached_tokens",
        "num_computed",
        "num_prompt_tokens",
        "num_virtual_tokens",
        "prompt_logprobs",
        "request",
        "rng",
        "stop_token_id",
        "token_ids",
        "turn",
        "urgency",
    )

    def __init__(self, request: GenerateRequest, *, arrival: float = 0.0) -> None:
        if not request.prompt_token_ids:
            raise ValueError("a sequence needs at least one text token")
        if not MIN_PRIORITY <= request.priority <= MAX_PRIORITY:
            raise ValueError(f"priority {request.priority} is not in {MIN_PRIORITY}..{MAX_PRIORITY}")
        self.request = request
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_virtual_tokens = request.soft_prompt.num_virtual_tokens if request.soft_prompt else 0
        self.urgency = request.priority + (BATCH_URGENCY if request.is_batch else 0)
        self.arrival = arrival
        self.deadline = None if request.timeout is None else arrival + request.timeout
        self.turn: int | None = None
        self.first_run: float | None = None
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_computed = 0
        self.num_cached_tokens = 0
        self.end_reason: FinishReason | ErrorCode | None = None
        self.stop_token_id: int | None = None
        seed = request.params.seed
        # Python seeds with the absolute value; each 64-bit seed must give different numbers.
        seed = seed if seed is None or seed >= 0 else seed + 2**64
        self.rng = random.Random(seed)  # noqa: S311 - sampling, not secrets
        self.drawn: tuple[int, float] | None = None
        self.kept_draw: float | None = None
        self.matcher: TokenMatcher | None = None
        self.adjusts_logits = request.params.adjusts_logits
        self.ngrams: NgramIndex | None = None
        self.flat_until = 0
        self.prompt_logprobs: list[Logprobs | None] = []
        self.is_follower = False
        self.followers = [self._follower(number, other) for number, other in enumerate(request.others, start=1)]

    def _follower(self, number: int, member: Member) -> Sequence:
        request = msgspec.structs.replace(
            self.request,
            request_id=f"{self.request_id}/{number}",
            soft_prompt=member.soft_prompt,
            adapter=member.adapter,
            others=(),
        )
        follower = Sequence(request, arrival=self.arrival)
        follower.token_ids = self.token_ids  # one list: every new token is appended once, for all members
        follower.is_follower = True
        return follower

    def draw(self) -> float:
        """The random number in [0, 1) that chooses the next token."""
        number = self.rng.random() if self.kept_draw is None else self.kept_draw
        self.kept_draw = None
        self.drawn = self.num_new_tokens, number
        return number

    def keep_draw(self) -> None:
        """Reuse the number drawn in a step that raised, if one was.

        A seed then gives the same tokens when the step is computed again.
        """
        if self.drawn is not None and self.drawn[0] == self.num_new_tokens:
            self.kept_draw = self.drawn[1]

    def unknown_token_id(self, vocab_size: int) -> int | None:
        """A token id of the request that is not in the vocabulary; None if there is none.

        A lookup beyond the end of a table fails the whole step, and on a GPU the process. So the engine checks, even
        if the caller has checked before.
        """
        params = self.request.params
        for token_ids in (self.token_ids, params.logit_bias, params.stop_token_ids):
            for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
                if not 0 <= token_id < vocab_size:
                    return token_id
        return None

    @property
    def request_id(self) -> str:
        """The request's id; a follower has a separate one."""
        return self.request.request_id

    @property
    def is_batch(self) -> bool:
        """Whether it is of the service tier ``batch``."""
        return self.request.is_batch

    @property
    def members(self) -> tuple[Sequence, ...]:
        """The sequences of its ensemble, itself first; only itself if it leads none."""
        return (self, *self.followers)

    @property
    def num_positions(self) -> int:
        """Virtual tokens and text together."""
        return self.num_virtual_tokens + len(self.token_ids)

    @property
    def cost(self) -> int:
        """Tokens charged to the tenant's turn: the prompt and ``max_tokens``, for all members."""
        return (self.num_prompt_tokens + self.request.params.max_tokens) * (1 + len(self.followers))

    @property
    def flow(self) -> str:
        """The soft prompt's identity, then a plus sign and the adapter's if there is one; empty for the bare base.

        It is the unit that takes turns within a tenant, and a part of the text's identity in the prefix cache.
        """
        soft_prompt, adapter = self.request.soft_prompt, self.request.adapter
        before = soft_prompt.identity if soft_prompt else ""
        return f"{before}+{adapter.identity}" if adapter else before

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def next_scored(self) -> int:
        """Index of the next prompt token whose logprob is computed, if they are requested."""
        return self.request.params.prompt_logprobs_start + len(self.prompt_logprobs)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some prompt logprobs are still to be computed."""
        return self.request.params.prompt_logprobs is not None and self.next_scored < self.num_prompt_tokens

    @property
    def num_skippable(self) -> int:
        """Positions that are not computed if their keys and values are cached, because no logits are needed."""
        if self.wants_prompt_logprobs:  # the logits at a position score the token after it
            return self.num_virtual_tokens + self.next_scored - 1
        return self.num_positions - 1


def check_fits(
    seq: Sequence,
    blocks_to_finish: Callable[[SoftPromptSource | None, int], int],
    *,
    num_blocks: int,
    max_num_seqs: int,
    max_model_len: int,
) -> None:
    """Check that a sequence, with its followers, can run alone to its maximum length.

    Args:
        seq: The sequence.
        blocks_to_finish: Blocks for a soft prompt and a number of positions.
        num_blocks: Blocks in all.
        max_num_seqs: Maximum number of running sequences.
        max_model_len: Maximum number of positions of one sequence.

    Raises:
        ValueError: If it cannot.
    """
    members, max_tokens = seq.members, seq.request.params.max_tokens
    if len(members) > max_num_seqs:
        raise ValueError(
            f"an ensemble of {len(members)} is more than the {max_num_seqs} sequences that may run at once"
        )
    for member in members:
        if member.num_positions + max_tokens > max_model_len:
            raise ValueError(
                f"{member.num_virtual_tokens} virtual tokens, {seq.num_prompt_tokens} text tokens and "
                f"{max_tokens} new ones are more than the {max_model_len} positions of the context"
            )
    needed = sum(_blocks_to_finish(member, blocks_to_finish) for member in members)
    if needed > num_blocks:
        what = f"the {len(members)} sequences of the ensemble need" if seq.followers else "the sequence needs"
        raise ValueError(f"{what} {needed} key/value blocks; the cache has {num_blocks} in all")


def _blocks_to_finish(seq: Sequence, blocks_to_finish: Callable[[SoftPromptSource | None, int], int]) -> int:
    """Blocks of one sequence, or one member of an ensemble, at its maximum length."""
    # The last new token is not fed back, so it needs no slot.
    longest = max(seq.num_positions, seq.num_positions + seq.request.params.max_tokens - 1)
    return blocks_to_finish(seq.request.soft_prompt, longest)
