"""Chooses the next token of all rows of a step.

A row's parameters are applied in this order: the checkpoint's sequence bias, repetition penalty, frequency and
presence penalty, logit bias, grammar mask, end-of-sequence mask of min_tokens, the checkpoint's masks, temperature,
top-k, top-p, min-p. Where transformers' ``generate`` has the same step, order and arithmetic are the same; the other
penalties are OpenAI's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import torch

from server.engine.attention.transfers import queue_copy, to_device
from server.engine.generation_defaults import NO_RULES, TokenRules
from server.engine.sampling.grammars import TokenMasks
from server.engine.sampling.logprobs import packed_logprobs, unpacked_logprobs
from server.engine.sampling.token_rules import RuleMasks
from server.engine.scheduling.sequence import Sequence
from server.engine.types import Logprobs, SamplingParams

NOT_FINITE = -1
"""Returned instead of a token if a row's logits contain NaN or infinity."""

NO_TOKEN = -2
"""Returned if a row's grammar allows no token: it is complete or has failed, as its matcher says."""

_MIN, _MAX = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max

Largest = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Logits [rows, vocabulary] to each row's largest (NaN if the row has one) and its token: [rows] each."""

Places = SequenceOf[tuple[int, int]]
"""(row, token) pairs."""


def torch_largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``Largest`` by ``torch.max``."""
    best = torch.max(logits, dim=-1)
    return best.values, best.indices


class Sampler:
    """Greedy and random choice, vectorised over the rows of a step.

    Each sequence draws one number in [0, 1) per token from its own generator; the token is where the cumulative
    probability exceeds it (inverse transform sampling). So the tokens of a seed do not depend on the batch, and no
    generator is needed on the device.

    Args:
        eos_token_ids: The model's end-of-sequence tokens, which ``min_tokens`` excludes.
        rules: The checkpoint's rules.
        largest: Returns the largest logits; depends on the device.
    """

    def __init__(
        self, eos_token_ids: SequenceOf[int] = (), rules: TokenRules = NO_RULES, largest: Largest = torch_largest
    ) -> None:
        self._largest = largest
        self._eos_token_ids = tuple(eos_token_ids)
        self._rules = RuleMasks(rules, self._eos_token_ids)
        self._masks = TokenMasks()

    def choose(self, logits: torch.Tensor, seqs: SequenceOf[Sequence]) -> tuple[list[int], list[Logprobs | None]]:
        """Choose one token for each row, with its logprobs if requested; synchronises with the device once.

        Args:
            logits: [rows, vocabulary], any float dtype.
            seqs: The rows' sequences, in order.

        Returns:
            A token id for each row, or NOT_FINITE or NO_TOKEN; and the logprobs of each row, None if they are not
            requested or there is no token. The second list is empty if no row requests logprobs.
        """
        tokens = self._tokens(logits, seqs)
        num_tops = [seq.request.params.logprobs for seq in seqs]
        requested = [(row, num_top) for row, num_top in enumerate(num_tops) if num_top is not None]
        result: list[int]
        if not requested:
            result = tokens.tolist()
            return result, []
        counts = [count for _, count in requested]
        index = to_device([row for row, _ in requested], logits.device)
        packed = packed_logprobs(logits[index], tokens[index].clamp_min(0), counts)
        flat: list[float] = torch.cat([tokens.double(), packed.flatten()]).tolist()
        result = [int(token) for token in flat[: len(seqs)]]
        width = packed.shape[-1]
        parts = [flat[start : start + width] for start in range(len(seqs), len(flat), width)]
        logprobs: list[Logprobs | None] = [None] * len(seqs)
        for (row, _), own in zip(requested, unpacked_logprobs(parts, counts), strict=True):
            if result[row] >= 0:
                logprobs[row] = own
        return result, logprobs

    def _tokens(self, logits: torch.Tensor, seqs: SequenceOf[Sequence]) -> torch.Tensor:
        """A token id for each row, or NOT_FINITE or NO_TOKEN, on the device."""
        best, tokens = self._largest(logits)
        # Rows are grouped by their own parameters only, so that a row's arithmetic, and the tokens of its seed, do
        # not depend on the other rows.
        has_rules = not self._rules.is_empty
        adjusts = [has_rules or seq.adjusts_logits for seq in seqs]
        self._draw(logits, seqs, [row for row in range(len(seqs)) if not adjusts[row]], tokens)
        adjusted = [row for row in range(len(seqs)) if adjusts[row]]
        if adjusted:
            index = to_device(adjusted, logits.device)
            own = [seqs[row] for row in adjusted]
            scores = self._adjust(logits[index].float(), own)
            chosen = scores.argmax(dim=-1)
            self._draw(scores, own, range(len(own)), chosen)
            tokens[index] = torch.where(scores.amax(dim=-1) == float("-inf"), NO_TOKEN, chosen)
        return torch.where(best.isfinite(), tokens, NOT_FINITE)

    def _adjust(self, scores: torch.Tensor, seqs: SequenceOf[Sequence]) -> torch.Tensor:
        """Scores [rows, vocabulary] in float32 after penalties, bias and the masks; ``scores`` is overwritten."""
        every = [seq.request.params for seq in seqs]
        impossible = scores == float("-inf")
        if not self._rules.is_empty:
            self._rules.add_biases(scores, seqs)
        repeating = [row for row, params in enumerate(every) if params.repetition_penalty != 1.0]
        if repeating:
            counts = _counts(scores, [seqs[row].token_ids for row in repeating])
            penalty = _column(scores, [every[row].repetition_penalty for row in repeating])
            index = to_device(repeating, scores.device)
            own = scores[index]
            penalised = torch.where(own < 0, own * penalty, own / penalty)
            scores[index] = torch.where(counts > 0, penalised, own)
        counting = [row for row, params in enumerate(every) if params.presence_penalty or params.frequency_penalty]
        if counting:
            new = [seqs[row].token_ids[seqs[row].num_prompt_tokens :] for row in counting]
            counts = _counts(scores, new)
            presence = _column(scores, [every[row].presence_penalty for row in counting])
            frequency = _column(scores, [every[row].frequency_penalty for row in counting])
            scores[to_device(counting, scores.device)] -= frequency * counts + presence * (counts > 0)
        biased = [(row, token, bias) for row, params in enumerate(every) for token, bias in params.logit_bias.items()]
        if biased:
            rows, tokens, values = zip(*biased, strict=True)
            places = to_device(rows, scores.device), to_device(tokens, scores.device)
            scores[places] += to_device(values, scores.device)
        # An overflow must not force or exclude a token; only the model's own -inf excludes one.
        scores.clamp_(_MIN, _MAX).masked_fill_(impossible, float("-inf"))
        matchers = {row: seq.matcher for row, seq in enumerate(seqs) if seq.matcher is not None}
        if matchers:
            allowed = self._masks.allowed(list(matchers.values()), scores.shape[-1], scores.device)
            constrained = to_device(list(matchers), scores.device)
            scores[constrained] = scores[constrained].masked_fill(~allowed, float("-inf"))
        _forbid(scores, self._excluded_ends(scores, seqs))
        return scores if self._rules.is_empty else self._rules.forbid(scores, seqs)

    def _excluded_ends(self, scores: torch.Tensor, seqs: SequenceOf[Sequence]) -> Places:
        """The end-of-sequence tokens of rows with fewer than ``min_tokens`` new tokens."""
        return [
            (row, token)
            for row, seq in enumerate(seqs)
            if seq.num_new_tokens < seq.request.params.min_tokens
            for token in self._ends(seq.request.params)
            if token < scores.shape[-1]  # some configurations name a token that has no logit
        ]

    def _ends(self, params: SamplingParams) -> tuple[int, ...]:
        return params.stop_token_ids if params.ignore_eos else params.stop_token_ids + self._eos_token_ids

    def _draw(
        self, logits: torch.Tensor, seqs: SequenceOf[Sequence], rows: Iterable[int], tokens: torch.Tensor
    ) -> None:
        """Draw the tokens of the rows in ``rows`` that are not greedy, into ``tokens`` [all rows]."""
        drawn = [row for row in rows if not seqs[row].request.params.is_greedy]
        plain = [row for row in drawn if not _cuts(seqs[row].request.params)]
        cut = [row for row in drawn if _cuts(seqs[row].request.params)]
        if plain:
            probs, draws, index = self._probabilities(logits, seqs, plain)
            tokens[index] = _inverse_transform(probs, draws)
        if cut:
            probs, draws, index = self._probabilities(logits, seqs, cut)
            probs, order = probs.sort(dim=-1, descending=True, stable=True)
            _cut(probs, [seqs[row].request.params for row in cut])
            tokens[index] = order.gather(-1, _inverse_transform(probs, draws)[:, None])[:, 0]

    def _probabilities(
        self, logits: torch.Tensor, seqs: SequenceOf[Sequence], rows: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = logits.device
        index = to_device(rows, device)
        temperatures = to_device([min(seqs[row].request.params.temperature, _MAX) for row in rows], device)
        draws = to_device([seqs[row].draw() for row in rows], device)
        scores = logits[index].float()
        # The maximum is subtracted before the division, because a tiny temperature would overflow float32.
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperatures[:, None]
        return torch.softmax(scores, dim=-1), draws, index


def _forbid(scores: torch.Tensor, places: Places) -> None:
    """Exclude tokens, in place; a row that would have no token left is not changed."""
    if not places:
        return
    rows, tokens = zip(*places, strict=True)
    touched = sorted(set(rows))
    rank = {row: index for index, row in enumerate(touched)}
    index = to_device(touched, scores.device)
    before = scores[index]
    after = before.clone()
    after[to_device([rank[row] for row in rows], scores.device), to_device(tokens, scores.device)] = float("-inf")
    is_empty = after.amax(dim=-1, keepdim=True) == float("-inf")
    scores[index] = torch.where(is_empty, before, after)


def _counts(scores: torch.Tensor, token_ids: SequenceOf[list[int]]) -> torch.Tensor:
    """How often each token occurs in each list: [lists, vocabulary], in the dtype of ``scores``."""
    counts = scores.new_zeros(len(token_ids), scores.shape[-1])
    flat = to_device([token for ids in token_ids for token in ids], scores.device, torch.long)
    # On the host, which knows the length of the result; on the device this would wait.
    lengths = torch.tensor([len(ids) for ids in token_ids])
    index = queue_copy(torch.repeat_interleave(torch.arange(len(token_ids)), lengths), scores.device)
    return counts.index_put_((index, flat), counts.new_ones(()), accumulate=True)


def _column(scores: torch.Tensor, values: list[float]) -> torch.Tensor:
    return to_device(values, scores.device, scores.dtype)[:, None]


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _cut(probs: torch.Tensor, params: SequenceOf[SamplingParams]) -> None:
    """Apply top-k, top-p and min-p in place to probabilities in descending order; the first is always kept."""
    vocabulary = probs.shape[-1]
    limits = to_device([own.top_k or vocabulary for own in params], probs.device)
    # Relative to the largest probability, so it is the same before and after top-k and top-p.
    unlikely = probs < probs[:, :1] * _column(probs, [own.min_p for own in params])
    probs.masked_fill_(torch.arange(vocabulary, device=probs.device) >= limits[:, None], 0.0)
    probs /= probs.sum(dim=-1, keepdim=True)  # top-p applies to the distribution after top-k, as in transformers
    before = probs.cumsum(dim=-1) - probs
    # Rounded sums may reach 1 too early, and a top-p of 1 has to keep all tokens.
    shares = [own.top_p if own.top_p < 1.0 else 2.0 for own in params]
    out = (before >= _column(probs, shares)) | unlikely
    out[:, 0] = False
    probs.masked_fill_(out, 0.0)


def _inverse_transform(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Each row's index where the cumulative probability exceeds draw * total; its probability is above 0."""
    cumulated = probs.cumsum(dim=-1)
    targets = draws[:, None] * cumulated[:, -1:]
    picked = torch.searchsorted(cumulated, targets, right=True).clamp_max(probs.shape[-1] - 1)
    # The target can round up to the total, and a parallel sum need not be monotonic in the last bit.
    has_chance = probs.gather(-1, picked) > 0
    return torch.where(has_chance, picked, probs.argmax(dim=-1, keepdim=True))[:, 0]
