"""The base model's tokenizer and chat template. The work is done in Rust, outside the GIL, and off the event loop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.engine.detokenizer import REPLACEMENT
from server.errors import ContextLengthError, EngineStartError, InvalidRequestError

T = TypeVar("T")

_MAX_TEMPLATE_WORDS = 500
"""Characters of what a template says when it fails; it may quote the conversation."""


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as (GPT-2's ``bytes_to_unicode``), and their bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()

_INFO_KEYS = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces")
"""What is told of a tokenizer's configuration besides its class, special tokens and template."""

_NUM_THREADS = 2
"""Enough that one long text does not stand before all others; more would take cores from a CPU engine."""


_CHARS_PER_TOKEN = 6
"""More than most texts have."""

_TORN_TOKENS = 64
"""So many tokens fewer may the end of a text's beginning have where the text goes on."""


class Tokenizer:
    """A transformers tokenizer behind the API's ``Tokenizer`` protocol.

    Args:
        tokenizer: The loaded tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._token_bytes: dict[int, bytes] = {}
        self._executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenizer")

    @classmethod
    def load(cls, model: str, *, revision: str | None = None) -> Tokenizer:
        """Load the tokenizer of a hub id or a directory; blocks. Code that came with the model is never run.

        Raises:
            EngineStartError: If there is none that can be loaded.
        """
        try:
            return cls(AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise EngineStartError(f"the tokenizer of {model!r} cannot be loaded: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether the model came with a chat template."""
        return bool(self._tokenizer.chat_template)

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, most: int | None = None, field: str = "prompt"
    ) -> list[list[int]]:
        """Texts to token ids.

        Args:
            texts: What to encode.
            add_special_tokens: Whether to add what the model expects around a text.
            most: Tokens that a text may have. A much longer one is refused by its beginning, for a megabyte takes a
                second.
            field: The request's field that the texts are from.

        Raises:
            ContextLengthError: If a text has more than ``most`` tokens, and so many characters that this was found
                before it was encoded as a whole. The caller still has to look at the rest.
        """

        def encode() -> list[list[int]]:
            if most is not None:
                for text in texts:
                    self._refuse_by_beginning(text, most, field)
            encoded = self._tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False)
            return [list(ids) for ids in encoded["input_ids"]]

        return await self._run(encode)

    def _refuse_by_beginning(self, text: str, most: int, field: str) -> None:
        """Encode more and more of a text for as long as that is little beside the whole."""
        length = _CHARS_PER_TOKEN * (most + _TORN_TOKENS)
        while length <= len(text) // 4:
            count = len(self._tokenizer(text[:length], add_special_tokens=False)["input_ids"])
            if count > most + _TORN_TOKENS:
                raise ContextLengthError(
                    f"{field}: the model's context is {most} tokens, and the first {length} of the text's "
                    f"{len(text)} characters alone are {count}",
                    param=field,
                )
            length *= 2

    async def render_chat(
        self,
        turns: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        needs_tools: bool = False,
    ) -> str:
        """A conversation as the model's own template writes it, ready for the assistant's answer.

        Raises:
            InvalidRequestError: If the template refuses the conversation or fails on it, or does not show tools that
                it has to.
        """

        def render(tools: Sequence[Mapping[str, Any]]) -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns],
                    tools=[dict(tool) for tool in tools] or None,
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )

        def work() -> str:
            try:
                text = render(tools)
                shows_tools = not (tools and needs_tools) or text != render(())
                text.encode()  # a template can write what is no text, and no tokenizer takes that
            except Exception as error:  # a template is a program, and raises whatever programs raise
                raise InvalidRequestError(_words_of(error), param="messages") from error
            if not shows_tools:
                raise InvalidRequestError(
                    "tools: this model's chat template does not show tools, so the model would not know of them; "
                    "only tool_choice 'required' or a named function work without that",
                    param="tools",
                )
            return text

        return await self._run(work)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""
        # No clean-up of spaces: it changes text that was shown already, when the next token comes.
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token shows by itself, special tokens included; it may be a part of a character."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        text = self.decode([token_id], skip_special_tokens=False)
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):  # a row of the logits that no token has
            return text.encode()
        if REPLACEMENT in text:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
            if byte:
                return bytes.fromhex(byte[1])
            if all(char in _BYTE_OF for char in piece):
                return bytes(_BYTE_OF[char] for char in piece)
        # Decoders strip the space before a text's first word; by itself every token is the first.
        if piece.startswith("\u2581") and not text.startswith(" "):
            text = " " + text
        return text.encode()

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's own text of each token; empty for ids that no token has."""
        return [text or "" for text in self._tokenizer.convert_ids_to_tokens(list(token_ids))]

    @property
    def info(self) -> dict[str, object]:
        """The tokenizer's configuration, as far as it matters to who writes its text; no path of this machine."""
        tokenizer = self._tokenizer
        kept = {key: tokenizer.init_kwargs[key] for key in _INFO_KEYS if key in tokenizer.init_kwargs}
        special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        template = tokenizer.chat_template
        return {
            **kept,
            **special,
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            # Some models come with several by name; the one that is used without a choice is the default.
            "chat_template": template.get("default") if isinstance(template, dict) else template,
        }

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=True)

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)


def _words_of(error: Exception) -> str:
    """What a client is told whose conversation a template refuses, or fails on: the template's own words."""
    is_refusal = isinstance(error, TemplateError)
    words = str(error) if is_refusal else f"{type(error).__name__}: {error}"
    return f"messages: the chat template {'refuses them' if is_refusal else 'fails on them'}: {words}"[
        :_MAX_TEMPLATE_WORDS
    ]
