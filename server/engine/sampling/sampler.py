"""Chooses the next token of all rows of a step.

A row's parameters are applied in this order: the checkpoint's sequence bias, repetition penalty, frequency and
presence penalty, logit bias, grammar mask, end-of-sequence mask of min_tokens, the checkpoint's masks, temperature,
top-k, top-p, min-p. Where transformers' ``generate`` has the same step, order and arithmetic are the same; the other
penalties are OpenAI's.

Rows are processed in slices (``slices``), so that a step of many rows does not take much memory. No result depends on
the slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from server.engine.attention.transfers import queue_copy, queue_to_host, to_device
from server.engine.generation_defaults import NO_RULES, TokenRules
from server.engine.sampling.grammars import TokenMasks
from server.engine.sampling.logprobs import packed_logprobs, unpacked_logprobs
from server.engine.sampling.slices import row_slices
from server.engine.sampling.token_rules import RuleMasks
from server.engine.sampling.truncation import NOT_COVERED, draw_truncated, num_candidates, truncates
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

Choice = tuple[list[int], list[Logprobs | None]]
"""The tokens and logprobs of all rows, as ``Sampler.choose`` returns them."""

FLAT_TOKENS = 8
"""Number of tokens for which a sequence is assumed to stay flat, once its candidates did not suffice. Drawing from
candidates in vain costs time and a second synchronisation; sorting the vocabulary in vain costs more time."""

_SORT_DIVISOR = 4
"""Divides the size of slices that are sorted, which take 64 bits more per token."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a step, with what is computed once for each.

    Attributes:
        seqs: The sequence of each row.
        adjusted: The rows whose logits are adjusted before the temperature.
        draws: The random number of each row that is not greedy.
        masks: The tokens [vocabulary] that a grammar allows, by row.
        sorts: Whether all rows sort the vocabulary, because candidates did not suffice.
    """

    seqs: SequenceOf[Sequence]
    adjusted: SequenceOf[int]
    draws: dict[int, float]
    masks: dict[int, torch.Tensor]
    sorts: bool = False

    def select(self, rows: SequenceOf[int], *, sorts: bool) -> _Rows:
        """Some of the rows, in this order."""
        adjusted = set(self.adjusted)
        return _Rows(
            [self.seqs[row] for row in rows],
            [index for index, row in enumerate(rows) if row in adjusted],
            {index: self.draws[row] for index, row in enumerate(rows) if row in self.draws},
            {index: self.masks[row] for index, row in enumerate(rows) if row in self.masks},
            sorts,
        )


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

    def choose(self, logits: torch.Tensor, seqs: SequenceOf[Sequence]) -> Choice:
        """Choose one token for each row, with its logprobs if requested: ``launch``, and wait for the device.

        Args:
            logits: [rows, vocabulary], any float dtype.
            seqs: The rows' sequences, in order.

        Returns:
            A token id for each row, or NOT_FINITE or NO_TOKEN; and the logprobs of each row, None if they are not
            requested or there is no token. The second list is empty if no row requests logprobs.
        """
        return self.launch(logits, seqs)()

    def launch(self, logits: torch.Tensor, seqs: SequenceOf[Sequence]) -> Callable[[], Choice]:
        """Queue the choice of one token for each row; does not wait for the device.

        Args:
            logits: As for ``choose``; not to be overwritten before the result is taken.
            seqs: The rows' sequences, in order, which stay as they are until then.

        Returns:
            A function that waits for the result of all rows, and returns it. It waits once more, also for all rows,
            if the result says that a row with top-p or min-p keeps more tokens than were selected from the
            vocabulary: these rows are then chosen again, from the sorted vocabulary.
        """
        rows = self._rows(logits, seqs)
        attempt = self._attempt(logits, rows)

        def choice() -> Choice:
            tokens, logprobs = attempt()
            if NOT_COVERED in tokens:
                missed = [row for row, token in enumerate(tokens) if token == NOT_COVERED]
                again = self._attempt(logits[to_device(missed, logits.device)], rows.select(missed, sorts=True))()
                for index, row in enumerate(missed):
                    seqs[row].flat_until = seqs[row].num_new_tokens + 1 + FLAT_TOKENS
                    tokens[row] = again[0][index]
                    if again[1]:
                        logprobs[row] = again[1][index]
            return tokens, logprobs

        return choice

    def _rows(self, logits: torch.Tensor, seqs: SequenceOf[Sequence]) -> _Rows:
        has_rules = not self._rules.is_empty
        adjusted = [row for row, seq in enumerate(seqs) if has_rules or seq.adjusts_logits]
        draws = {row: seq.draw() for row, seq in enumerate(seqs) if not seq.request.params.is_greedy}
        matchers = {row: matcher for row in adjusted if (matcher := seqs[row].matcher) is not None}
        if not matchers:
            return _Rows(seqs, adjusted, draws, {})
        # For all rows at once, because the masks of a step are computed in parallel.
        allowed = self._masks.allowed(list(matchers.values()), logits.shape[-1], logits.device)
        return _Rows(seqs, adjusted, draws, dict(zip(matchers, allowed, strict=True)))

    def _attempt(self, logits: torch.Tensor, rows: _Rows) -> Callable[[], Choice]:
        """As ``launch``, but a row may have NOT_COVERED instead of a token, and the function waits once."""
        num_tops = [seq.request.params.logprobs for seq in rows.seqs]
        if all(count is None for count in num_tops):
            tokens = queue_to_host(self._tokens(logits, rows))
            return lambda: (tokens().tolist(), [])
        packed = queue_to_host(self._packed(logits, rows))
        return lambda: self._unpacked(packed().tolist(), num_tops)

    @staticmethod
    def _unpacked(flat: list[float], num_tops: SequenceOf[int | None]) -> Choice:
        """The numbers of ``_packed`` as tokens and logprobs."""
        counts = [count for count in num_tops if count is not None]
        result = [int(token) for token in flat[: len(num_tops)]]
        width = (len(flat) - len(num_tops)) // len(counts)
        parts = [flat[start : start + width] for start in range(len(num_tops), len(flat), width)]
        entries = iter(unpacked_logprobs(parts, counts))
        own = [None if count is None else next(entries) for count in num_tops]
        return result, [entry if token >= 0 else None for token, entry in zip(result, own, strict=True)]

    def _packed(self, logits: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """All tokens, then the ``packed_logprobs`` of the rows that request them: one float64 tensor [numbers]."""
        tokens = self._tokens(logits, rows)
        counts = {
            row: count for row, seq in enumerate(rows.seqs) if (count := seq.request.params.logprobs) is not None
        }
        num_top = max(counts.values())
        parts = [tokens.double()]
        for part in row_slices(list(counts), logits.shape[-1]):
            index = to_device(part, logits.device)
            parts.append(packed_logprobs(logits[index], tokens[index].clamp_min(0), num_top).flatten())
        return torch.cat(parts)

    def _tokens(self, logits: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """A token id for each row, or NOT_FINITE, NO_TOKEN or NOT_COVERED, on the device; does not synchronise."""
        best, tokens = self._largest(logits)
        adjusted = set(rows.adjusted)
        self._draw(logits, rows, [row for row in rows.draws if row not in adjusted], tokens)
        for part in row_slices(rows.adjusted, logits.shape[-1]):
            index = to_device(part, logits.device)
            tokens[index] = self._adjusted_tokens(logits[index].float(), rows.select(part, sorts=rows.sorts))
        return torch.where(best.isfinite(), tokens, NOT_FINITE)

    def _adjusted_tokens(self, scores: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """The tokens of rows whose scores have to be adjusted: [rows]; ``scores`` is overwritten."""
        scores = self._adjust(scores, rows.seqs, rows.masks)
        tokens = scores.argmax(dim=-1)
        self._draw(scores, rows, rows.draws, tokens)
        return torch.where(scores.amax(dim=-1) == float("-inf"), NO_TOKEN, tokens)

    def _adjust(
        self, scores: torch.Tensor, seqs: SequenceOf[Sequence], masks: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """Scores [rows, vocabulary] in float32 after penalties, bias and the masks; ``scores`` is overwritten."""
        every = [seq.request.params for seq in seqs]
        impossible = scores == float("-inf")
        if not self._rules.is_empty:
            self._rules.add_biases(scores, seqs)
        _penalise_repetition(scores, seqs)
        _penalise_counts(scores, seqs)
        biased = [(row, token, bias) for row, params in enumerate(every) for token, bias in params.logit_bias.items()]
        if biased:
            in_rows, tokens, values = zip(*biased, strict=True)
            places = to_device(in_rows, scores.device), to_device(tokens, scores.device)
            scores[places] += to_device(values, scores.device)
        # An overflow must not force or exclude a token; only the model's own -inf excludes one.
        scores.clamp_(_MIN, _MAX).masked_fill_(impossible, float("-inf"))
        if masks:
            forbidden = ~torch.stack(list(masks.values()))
            constrained = to_device(list(masks), scores.device)
            scores[constrained] = scores[constrained].masked_fill_(forbidden, float("-inf"))
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

    def _draw(self, logits: torch.Tensor, rows: _Rows, own: Iterable[int], tokens: torch.Tensor) -> None:
        """Draw the tokens of the rows in ``own``, which are not greedy, into ``tokens`` [all rows]."""
        vocabulary = logits.shape[-1]
        # Rows are grouped by their own parameters only, so that a row's arithmetic, and the tokens of its seed, do
        # not depend on the other rows.
        groups: dict[int, list[int]] = {}
        for row in own:
            seq = rows.seqs[row]
            params = seq.request.params
            is_flat = rows.sorts or seq.num_new_tokens < seq.flat_until
            count = num_candidates(params, vocabulary, is_flat=is_flat) if truncates(params) else 0
            groups.setdefault(count, []).append(row)
        for count, members in groups.items():
            for part in row_slices(members, vocabulary, divisor=_SORT_DIVISOR if count == vocabulary else 1):
                index = to_device(part, logits.device)
                tokens[index] = _drawn(logits[index].float(), rows.select(part, sorts=rows.sorts), count)


def _drawn(scores: torch.Tensor, rows: _Rows, count: int) -> torch.Tensor:
    """Draw a token for each row from ``count`` candidates, or without truncation if it is 0: [rows].

    ``scores`` [rows, vocabulary] in float32 is overwritten.
    """
    params = [seq.request.params for seq in rows.seqs]
    draws = to_device(list(rows.draws.values()), scores.device)
    probs = _probabilities(scores, params)
    return draw_truncated(probs, params, draws, count) if count else _inverse_transform(probs, draws)


def _probabilities(scores: torch.Tensor, params: SequenceOf[SamplingParams]) -> torch.Tensor:
    """Probabilities [rows, vocabulary] of scores in float32 after the temperature; ``scores`` is overwritten."""
    temperatures = to_device([min(own.temperature, _MAX) for own in params], scores.device)
    # The maximum is subtracted before the division, because a tiny temperature would overflow float32.
    scores -= scores.amax(dim=-1, keepdim=True)
    scores /= temperatures[:, None]
    return torch.softmax(scores, dim=-1)


def _penalise_repetition(scores: torch.Tensor, seqs: SequenceOf[Sequence]) -> None:
    """Apply ``repetition_penalty``, in place."""
    rows = [row for row, seq in enumerate(seqs) if seq.request.params.repetition_penalty != 1.0]
    if not rows:
        return
    counts = _counts(scores, [seqs[row].token_ids for row in rows])
    penalty = _column(scores, [seqs[row].request.params.repetition_penalty for row in rows])
    index = to_device(rows, scores.device)
    own = scores[index]
    penalised = torch.where(own < 0, own * penalty, own / penalty)
    scores[index] = torch.where(counts > 0, penalised, own)


def _penalise_counts(scores: torch.Tensor, seqs: SequenceOf[Sequence]) -> None:
    """Apply ``presence_penalty`` and ``frequency_penalty``, in place."""
    every = [seq.request.params for seq in seqs]
    rows = [row for row, params in enumerate(every) if params.presence_penalty or params.frequency_penalty]
    if not rows:
        return
    counts = _counts(scores, [seqs[row].token_ids[seqs[row].num_prompt_tokens :] for row in rows])
    presence = _column(scores, [every[row].presence_penalty for row in rows])
    frequency = _column(scores, [every[row].frequency_penalty for row in rows])
    scores[to_device(rows, scores.device)] -= frequency * counts + presence * (counts > 0)


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


def _inverse_transform(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Each row's index where the cumulative probability exceeds draw * total; its probability is above 0."""
    cumulated = probs.cumsum(dim=-1)
    targets = draws[:, None] * cumulated[:, -1:]
    picked = torch.searchsorted(cumulated, targets, right=True).clamp_max(probs.shape[-1] - 1)
    # The target can round up to the total, and a parallel sum need not be monotonic in the last bit.
    has_chance = probs.gather(-1, picked) > 0
    return torch.where(has_chance, picked, probs.argmax(dim=-1, keepdim=True))[:, 0]
