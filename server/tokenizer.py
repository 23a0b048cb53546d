"""The base model's tokenizer and chat template, run in threads; the work is done in Rust, without the GIL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.byte_fallback import ByteFallback
from server.continuations import Context, continuations_of
from server.engine.detokenizer import REPLACEMENT
from server.errors import ContextLengthError, EngineStartError, InvalidRequestError
from server.fair_work import SHORT_CHARS, FairThreads, current_work

_MAX_TEMPLATE_WORDS = 500
"""Maximum length of a template's error message in characters; it may quote the conversation."""


def _byte_alphabet() -> dict[str, int]:
    """The inverse of GPT-2's ``bytes_to_unicode``: the byte of each character in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()

_INFO_KEYS = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces")
"""Reported settings of a tokenizer besides its class, special tokens and template."""

_NUM_THREADS = 2
"""One for long texts, and one reserved for short ones; more would take cores from a CPU engine."""

_CHARS_PER_TOKEN = 6
"""An upper estimate for most texts."""

_TORN_TOKENS = 64
"""How many tokens a truncated prefix may differ by at its end from the same prefix inside the full text."""


class Tokenizer:
    """A transformers tokenizer behind the API's ``Tokenizer`` protocol.

    Args:
        tokenizer: The loaded tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._token_bytes: dict[tuple[int, bool], bytes] = {}
        self._byte_fallback = ByteFallback(tokenizer)
        self._threads = FairThreads(_NUM_THREADS, name="tokenizer")

    @classmethod
    def load(cls, model: str, *, revision: str | None = None) -> Tokenizer:
        """Load the tokenizer of a hub id or a directory; blocks. Code of the model is never run.

        Raises:
            EngineStartError: If the tokenizer cannot be loaded.
        """
        try:
            return cls(AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise EngineStartError(f"the tokenizer of {model!r} cannot be loaded: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self._tokenizer.chat_template)

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, most: int | None = None, field: str = "prompt"
    ) -> list[list[int]]:
        """Encode texts in small batches, so that the work of other requests is not delayed.

        Args:
            texts: The texts.
            add_special_tokens: Whether to add the model's special tokens.
            most: Maximum number of tokens of a text. A much longer text is rejected by its beginning, because
                encoding a megabyte takes a second.
            field: The request field of the texts, for the error message.

        Raises:
            ContextLengthError: If a text is found to have more than ``most`` tokens before all is encoded. The caller
                must check the lengths of the result.
        """
        encoded: list[list[int]] = []
        for batch in _batches(texts):
            if most is not None:
                if any(len(ids) > most for ids in encoded):
                    raise ContextLengthError(
                        f"{field}: the model's context is {most} tokens, and one of the texts has "
                        f"{max(map(len, encoded))}",
                        param=field,
                    )
                for text in batch:
                    await self._refuse_by_beginning(text, most, field)
            found = await self._encode(batch, add_special_tokens=add_special_tokens)
            current_work().num_tokens += sum(map(len, found))
            encoded += found
        return encoded

    async def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        def encode() -> list[list[int]]:
            encoded = self._tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False)
            return [list(ids) for ids in encoded["input_ids"]]

        return await self._threads.run(encode, size=sum(map(len, texts)))

    async def encode_labels(
        self, context: Context, labels: Sequence[str], *, add_special_tokens: bool
    ) -> tuple[list[int], list[list[int]]]:
        """Encode labels as continuations of a text; see ``ContinuationEncoder.encode_labels``.

        Args:
            context: The text.
            labels: The labels.
            add_special_tokens: Whether to add the model's special tokens to the text.

        Returns:
            The tokens of the text, which may have lost trailing spaces to the labels, and the tokens of each label.
        """

        def encode() -> tuple[list[int], list[list[int]]]:
            found, token_ids = continuations_of(self._tokenizer).encode_labels(context, labels)
            if isinstance(found, Context):
                return found.token_ids, token_ids
            shorter = self._tokenizer(found, add_special_tokens=add_special_tokens)["input_ids"]
            return list(shorter), token_ids

        size = len(context.text or "") + sum(map(len, labels))
        text_ids, token_ids = await self._threads.run(encode, size=size)
        current_work().num_tokens += sum(map(len, token_ids))
        return text_ids, token_ids

    async def _refuse_by_beginning(self, text: str, most: int, field: str) -> None:
        """Reject a text that is much too long by encoding only its beginning, in growing parts."""
        length = _CHARS_PER_TOKEN * (most + _TORN_TOKENS)
        while length <= len(text) // 2:
            (ids,) = await self._encode([text[:length]], add_special_tokens=False)
            if len(ids) > most + _TORN_TOKENS:
                current_work().num_tokens += len(ids)
                raise ContextLengthError(
                    f"{field}: the model's context is {most} tokens, and the first {length} of the text's "
                    f"{len(text)} characters alone are {len(ids)}",
                    param=field,
                )
            length *= 2

    async def render_chat(
        self,
        turns: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        needs_tools: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Format a conversation with the model's chat template, by default up to the start of the answer.

        Raises:
            InvalidRequestError: If the template rejects the conversation or fails on it, or ignores tools although
                ``needs_tools`` is set.
        """

        def render(tools: Sequence[Mapping[str, Any]]) -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns],
                    tools=[dict(tool) for tool in tools] or None,
                    tokenize=False,
                    **{"add_generation_prompt": True, **(options or {})},
                )
            )

        def work() -> str:
            try:
                text = render(tools)
                shows_tools = not (tools and needs_tools) or text != render(())
                text.encode()  # a template may produce half of a surrogate pair
            except Exception as error:  # a template is a program and can raise anything
                raise InvalidRequestError(_words_of(error), param="messages") from error
            if not shows_tools:
                raise InvalidRequestError(
                    "tools: this model's chat template does not support tools; "
                    "use tool_choice 'required' or a named function",
                    param="tools",
                )
            return text

        return await self._threads.run(work, size=_num_chars([*turns, *tools]))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Decode token ids.

        Invalid bytes are replaced one by one, as in SentencePiece. The tokenizers library replaces all adjacent bytes
        if one of them is invalid, including those of characters that were already streamed.
        """
        if skip_special_tokens:
            token_ids = [token_id for token_id in token_ids if token_id not in self.special_tokens]
        # Cleaning up spaces would change text that was already streamed.
        text = self._tokenizer.decode(
            self._byte_fallback.repaired(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return str(text)

    def token_bytes(self, token_id: int, *, begins_text: bool = False) -> bytes:
        """The bytes that a token adds to a text, maybe part of a character. Special tokens are included.

        Args:
            token_id: The token.
            begins_text: Whether it is the first token. Many decoders remove the space at the beginning of a text.
        """
        key = token_id, begins_text
        known = self._token_bytes.get(key)
        if known is None:
            known = self._token_bytes[key] = self._find_bytes(token_id, begins_text=begins_text)
        return known

    def _find_bytes(self, token_id: int, *, begins_text: bool) -> bytes:
        text = self.decode([token_id], skip_special_tokens=False)
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):  # a logit without a token
            return text.encode()
        if REPLACEMENT in text:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
            if byte:
                return bytes.fromhex(byte[1])
            if all(char in _BYTE_OF for char in piece):
                return bytes(_BYTE_OF[char] for char in piece)
        if not begins_text and self._word is not None:
            before = self.decode([self._word], skip_special_tokens=False)
            text = self.decode([self._word, token_id], skip_special_tokens=False).removeprefix(before)
        return text.encode()

    @cached_property
    def _word(self) -> int | None:
        """A token of letters or digits, to decode other tokens after it."""
        for token_id in range(len(self._tokenizer)):
            if token_id not in self.special_tokens:
                text = self.decode([token_id], skip_special_tokens=False)
                if text.isascii() and text.isalnum():
                    return token_id
        return None

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """The text of each token that ``skip_special_tokens`` leaves out."""
        added = self._tokenizer.added_tokens_decoder
        special = {token_id: token.content for token_id, token in added.items() if token.special}
        return special | dict(zip(self._tokenizer.all_special_ids, self._tokenizer.all_special_tokens, strict=True))

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The entry of each token in the vocabulary; empty for ids without a token."""
        return [text or "" for text in self._tokenizer.convert_ids_to_tokens(list(token_ids))]

    @property
    def info(self) -> dict[str, object]:
        """The part of the tokenizer's configuration that clients need; no paths of this machine."""
        tokenizer = self._tokenizer
        kept = {key: tokenizer.init_kwargs[key] for key in _INFO_KEYS if key in tokenizer.init_kwargs}
        special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        template = tokenizer.chat_template
        return {
            **kept,
            **special,
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            # Some models have several named templates; the default is the one that requests use.
            "chat_template": template.get("default") if isinstance(template, dict) else template,
        }

    def close(self) -> None:
        """Stop the threads."""
        self._threads.close()


def _num_chars(value: object) -> int:
    """Number of characters of all strings in a JSON value; a template may use any of them."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(key)) + _num_chars(item) for key, item in value.items())
    if isinstance(value, Sequence):
        return sum(map(_num_chars, value))
    return 0


def _words_of(error: Exception) -> str:
    """The error for a conversation that the template rejects or fails on, with the template's message."""
    is_refusal = isinstance(error, TemplateError)
    words = str(error) if is_refusal else f"{type(error).__name__}: {error}"
    return f"messages: the chat template {'refuses them' if is_refusal else 'fails on them'}: {words}"[
        :_MAX_TEMPLATE_WORDS
    ]


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Group texts, in order, into batches that are short work; a long text is a batch of its own."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > SHORT_CHARS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch
