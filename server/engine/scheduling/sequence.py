"""One text being continued, as scheduler, block manager and sampler share it. Plain data: no torch, no HTTP.

An *ensemble* continues one text behind several soft prompts: a sequence for each, all with the same tokens, whose
next token is drawn from the mean of their distributions. The first of them, the leader, stands for all: they wait,
run, are preempted and end as one, and its parameters choose the tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from server.engine.constraints import TokenMatcher
from server.engine.scheduling.ngrams import NgramIndex
from server.engine.types import MAX_PRIORITY, MIN_PRIORITY, FinishReason, Logprobs, SamplingParams, SoftPromptSource


class Sequence:
    """One text being continued: its tokens, its blocks, and how far its keys and values reach.

    Positions count virtual tokens first: token ``token_ids[i]`` stands at position ``num_virtual_tokens + i``.

    Attributes:
        request_id: The caller's name for it.
        token_ids: The prompt's text tokens, then the new ones.
        num_prompt_tokens: How many of them came with the request.
        params: How to sample.
        soft_prompt: What stands before the text, or None.
        salt: The tenant: keeps its cached texts apart from others', and takes turns with them.
        priority: What the request asked for; lower is more urgent.
        urgency: The same until it has waited so long that it is promoted to the most urgent class.
        arrival: When it came, in seconds of the engine's clock.
        deadline: When it ends unless it has begun to run, in seconds of that clock; None is never.
        turn: How many others had their first turn before it; None until it has had its own.
        first_run: When it was first given blocks, in seconds of that clock; None until then.
        block_table: Block ids by position // block_size; the first may be shared with others.
        block_hashes: Chain hash of each full block of ``block_table`` that has been registered or matched.
        num_computed: Positions whose keys and values are in the cache or are written in the step under way.
        num_cached_tokens: Text tokens that a cached prefix saved, at first admission.
        finish_reason: Set once, when the sequence has ended.
        stop_token_id: The token that ended it, when one did.
        rng: This sequence's random numbers.
        drawn: How many new tokens there were when a number was last drawn, and the number; None before.
        kept_draw: What ``draw`` gives next, where that is kept from a step that raised.
        matcher: Where it stands in the grammar of its constraint, once that is compiled; it has taken exactly the new
            tokens, so that preemption leaves it as it is.
        adjusts_logits: ``params.adjusts_logits``, which every step asks.
        ngrams: The text's n-grams, once a rule of the checkpoint asks for them.
        prompt_logprobs: Of the text's tokens from ``params.prompt_logprobs_start``, as far as they are computed; the
            text's first is None where no row of the model stands before it. They survive preemption.
        followers: The other members of its ensemble, in order, where it leads one. What is said above of queues and
            turns, of ends, parameters and the constraint is the leader's alone; blocks are each member's own.
        is_follower: Whether another sequence leads it.
    """

    __slots__ = (
        "adjusts_logits",
        "arrival",
        "block_hashes",
        "block_table",
        "deadline",
        "drawn",
        "finish_reason",
        "first_run",
        "followers",
        "is_follower",
        "kept_draw",
        "matcher",
        "ngrams",
        "num_cached_tokens",
        "num_computed",
        "num_prompt_tokens",
        "num_virtual_tokens",
        "params",
        "priority",
        "prompt_logprobs",
        "request_id",
        "rng",
        "salt",
        "soft_prompt",
        "stop_token_id",
        "token_ids",
        "turn",
        "urgency",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        soft_prompt: SoftPromptSource | None = None,
        salt: str = "",
        *,
        priority: int = 0,
        arrival: float = 0.0,
        timeout: float | None = None,
    ) -> None:
        if not prompt_token_ids:
            raise ValueError("a sequence needs at least one text token")
        if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
            raise ValueError(f"priority {priority} is not in {MIN_PRIORITY}..{MAX_PRIORITY}")
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params = params
        self.soft_prompt = soft_prompt
        self.num_virtual_tokens = soft_prompt.num_virtual_tokens if soft_prompt else 0
        self.salt = salt
        self.priority = self.urgency = priority
        self.arrival = arrival
        self.deadline = None if timeout is None else arrival + timeout
        self.turn: int | None = None
        self.first_run: float | None = None
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_computed = 0
        self.num_cached_tokens: int | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None
        # Python takes the absolute value of a seed; each of the 64-bit ones has to give numbers of its own.
        seed = params.seed if params.seed is None or params.seed >= 0 else params.seed + 2**64
        self.rng = random.Random(seed)  # noqa: S311 - sampling, not secrets
        self.drawn: tuple[int, float] | None = None
        self.kept_draw: float | None = None
        self.matcher: TokenMatcher | None = None
        self.adjusts_logits = params.adjusts_logits
        self.ngrams: NgramIndex | None = None
        self.prompt_logprobs: list[Logprobs | None] = []
        self.followers: list[Sequence] = []
        self.is_follower = False

    def lead(self, soft_prompts: Iterable[SoftPromptSource | None]) -> None:
        """Make an ensemble of this new sequence and one more for each of these soft prompts."""
        for soft_prompt in soft_prompts:
            name = f"{self.request_id}/{len(self.followers) + 1}"
            follower = Sequence(name, self.token_ids, self.params, soft_prompt, self.salt)
            follower.token_ids = self.token_ids  # one list: a token that is appended is appended for all
            follower.is_follower = True
            self.followers.append(follower)

    def draw(self) -> float:
        """The random number in [0, 1) that chooses the next token."""
        number = self.rng.random() if self.kept_draw is None else self.kept_draw
        self.kept_draw = None
        self.drawn = self.num_new_tokens, number
        return number

    def keep_draw(self) -> None:
        """Have the next token chosen by the number that was drawn for it in a step that raised, if one was.

        So a step can be computed again, and a seed still gives the same tokens.
        """
        if self.drawn is not None and self.drawn[0] == self.num_new_tokens:
            self.kept_draw = self.drawn[1]

    @property
    def members(self) -> tuple[Sequence, ...]:
        """The sequences of its ensemble, itself first; alone where it leads none."""
        return (self, *self.followers)

    @property
    def num_positions(self) -> int:
        """Virtual tokens and text together."""
        return self.num_virtual_tokens + len(self.token_ids)

    @property
    def cost(self) -> int:
        """What a turn of its tenant is charged: text tokens and the new ones asked for, of all members."""
        return (self.num_prompt_tokens + self.params.max_tokens) * (1 + len(self.followers))

    @property
    def flow(self) -> str:
        """What it takes turns with inside its tenant: its soft prompt's identity, empty for the bare base."""
        return self.soft_prompt.identity if self.soft_prompt else ""

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def next_scored(self) -> int:
        """Index of the text token whose logprob is to be computed next, where they are wanted."""
        return self.params.prompt_logprobs_start + len(self.prompt_logprobs)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some of the text's logprobs are still to be computed."""
        return self.params.prompt_logprobs is not None and self.next_scored < self.num_prompt_tokens

    @property
    def num_skippable(self) -> int:
        """Positions that need not be computed where their keys and values are cached: nobody wants their logits."""
        if self.wants_prompt_logprobs:  # the logits at a position tell of the token after it
            return self.num_virtual_tokens + self.next_scored - 1
        return self.num_positions - 1
