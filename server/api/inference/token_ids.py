"""The check of token ids, for each list that reaches the engine or the decoder."""

from __future__ import annotations

from collections.abc import Collection

from server.errors import InvalidRequestError


def check_token_ids(token_ids: Collection[int], *, vocab_size: int, param: str, what: str | None = None) -> None:
    """Reject ids without an embedding.

    Not only clients send them: a tokenizer may have more tokens than the model has rows.

    Args:
        token_ids: The ids.
        vocab_size: Number of rows of the model's embedding; valid ids are below it.
        param: The request field that they are from.
        what: The part of that field that they are from, if it has several.

    Raises:
        InvalidRequestError: If an id is not in the vocabulary; the message names the field and the id.
    """
    lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        of = "" if what is None else f"{what}: "
        raise InvalidRequestError(
            f"{param}: {of}token id {wrong} is not in the vocabulary of {vocab_size} tokens", param=param
        )
