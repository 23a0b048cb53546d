"""Byte-fallback tokens of SentencePiece tokenizers: bytes of characters that are not in the vocabulary."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import groupby
from typing import cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_REPLACEMENT = "\ufffd".encode()

_ERRORS = "prelude.each-byte"


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_ERRORS, _replace_each)


class ByteFallback:
    """The tokens ``<0x00>`` to ``<0xFF>`` of a tokenizer whose decoder joins them to characters.

    Other tokenizers have none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._byte_of: dict[int, int] = {}
        if isinstance(tokenizer, PreTrainedTokenizerFast) and _joins_bytes(tokenizer):
            for byte in range(256):
                token_id: int | None = tokenizer.backend_tokenizer.token_to_id(f"<0x{byte:02X}>")
                if token_id is not None:
                    self._byte_of[token_id] = byte
        self._token_of = {byte: token_id for token_id, byte in self._byte_of.items()}
        if any(byte not in self._token_of for byte in _REPLACEMENT):
            self._byte_of = {}

    def repaired(self, token_ids: Sequence[int]) -> list[int]:
        """Replace each byte that is part of no valid character by U+FFFD."""
        if not any(token_id in self._byte_of for token_id in token_ids):
            return list(token_ids)
        # Decoders skip ids without a token, so the bytes before and after such an id are adjacent.
        pieces = cast("list[str | None]", self._tokenizer.convert_ids_to_tokens(list(token_ids)))
        known = [token_id for token_id, piece in zip(token_ids, pieces, strict=True) if piece is not None]
        repaired: list[int] = []
        for is_byte, run in groupby(known, self._byte_of.__contains__):
            if not is_byte:
                repaired += run
                continue
            token_run = list(run)
            data = bytes(self._byte_of[token_id] for token_id in token_run)
            text = data.decode(errors=_ERRORS)
            repaired += token_run if text.encode() == data else [self._token_of[byte] for byte in text.encode()]
        return repaired


def _joins_bytes(tokenizer: PreTrainedTokenizerFast) -> bool:
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
