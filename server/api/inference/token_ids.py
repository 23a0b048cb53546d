"""Check of token ids, for every list that reaches the engine or the decoder."""

from __future__ import annotations

from collections.abc import Collection

from server.errors import InvalidRequestError


def check_token_ids(token_ids: Collection[int], *, vocab_size: int, param: str, what: str | None = None) -> None:
    """Reject ids without an embedding.

    Ids come from clients, and from the tokenizer too: one that was given more tokens than the model has rows turns a
    text into such ids.

    Args:
        token_ids: What to look at.
        vocab_size: The model's rows; ids are below it.
        param: The request's field that they are from.
        what: What in that field has them, where it has several things.

    Raises:
        InvalidRequestError: Naming the field and such an id.
    """
    lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        of = "" if what is None else f"{what}: "
        raise InvalidRequestError(
            f"{param}: {of}token id {wrong} is not in the vocabulary of {vocab_size} tokens", param=param
        )
