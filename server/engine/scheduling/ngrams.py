"""Runs of tokens that a text has had: what ``no_repeat_ngram_size`` forbids next."""

from __future__ import annotations

from collections.abc import Sequence

_NONE: frozenset[int] = frozenset()


class NgramIndex:
    """The n-grams of one text, read as it grows, so that a step costs what its new tokens cost.

    Args:
        size: Tokens of an n-gram, at least 1.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._followers: dict[tuple[int, ...], set[int]] = {}
        self._num_read = 0

    def completing(self, token_ids: Sequence[int]) -> set[int] | frozenset[int]:
        """Tokens that would make the text's last n-gram one that it has had already.

        Args:
            token_ids: The whole text: what it was at the last call, and what has come since.
        """
        new = token_ids[max(0, self._num_read - self.size + 1) :]
        for ngram in zip(*(new[start:] for start in range(self.size)), strict=False):
            self._followers.setdefault(ngram[:-1], set()).add(ngram[-1])
        self._num_read = len(token_ids)
        if len(token_ids) < self.size:
            return _NONE
        return self._followers.get(tuple(token_ids[len(token_ids) - self.size + 1 :]), _NONE)
