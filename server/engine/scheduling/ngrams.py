"""The n-grams of a text, for ``no_repeat_ngram_size``."""

from __future__ import annotations

from collections.abc import Sequence

_NONE: frozenset[int] = frozenset()


class NgramIndex:
    """The n-grams of one text, indexed incrementally, so that the cost of a step depends on its new tokens only.

    Args:
        size: Tokens of an n-gram, at least 1.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._followers: dict[tuple[int, ...], set[int]] = {}
        self._num_read = 0

    def completing(self, token_ids: Sequence[int]) -> set[int] | frozenset[int]:
        """Tokens that would repeat an n-gram of the text.

        Args:
            token_ids: The whole text, which extends the text of the last call.
        """
        new = token_ids[max(0, self._num_read - self.size + 1) :]
        for ngram in zip(*(new[start:] for start in range(self.size)), strict=False):
            self._followers.setdefault(ngram[:-1], set()).add(ngram[-1])
        self._num_read = len(token_ids)
        if len(token_ids) < self.size:
            return _NONE
        return self._followers.get(tuple(token_ids[len(token_ids) - self.size + 1 :]), _NONE)
