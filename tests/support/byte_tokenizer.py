"""A tokenizer whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.continuations import Context
from server.errors import InvalidRequestError
from server.fair_work import current_work

BOS, EOS = 256, 257


class ByteTokenizer:
    """Token ids are bytes; 256 is the beginning of a text and 257 the end."""

    has_chat_template = True

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, most: int | None = None, field: str = "prompt"
    ) -> list[list[int]]:
        encoded = [[BOS] * add_special_tokens + list(text.encode()) for text in texts]
        current_work().num_tokens += sum(map(len, encoded))
        return encoded

    async def encode_labels(
        self, context: Context, labels: Sequence[str], *, add_special_tokens: bool
    ) -> tuple[list[int], list[list[int]]]:
        return context.token_ids, await self.encode(labels, add_special_tokens=False)

    shows_tools = True

    def __init__(self) -> None:
        self.turns: list[Any] = []
        self.tools: list[Any] = []
        self.special_tokens = {BOS: "<s>", EOS: "</s>"}

    async def render_chat(
        self, turns: Sequence[Any], *, tools: Sequence[Any] = (), needs_tools: bool = False, options: Any = None
    ) -> str:
        if turns[0]["role"] == "assistant":
            raise InvalidRequestError("messages: the assistant cannot begin", param="messages")
        if tools and needs_tools and not self.shows_tools:
            raise InvalidRequestError("tools: the chat template does not show them", param="tools")
        self.turns, self.tools, self.options = list(turns), list(tools), options
        names = ",".join(tool["function"]["name"] for tool in tools if self.shows_tools)
        text = "".join(f"[{turn['role']}]{turn['content']}" for turn in turns)
        return (f"[tools]{names}" if names else "") + text + "[assistant]"

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text = b""
        for token_id in token_ids:
            if token_id < 256:
                text += bytes([token_id])
            elif not skip_special_tokens:
                text += self.special_tokens[token_id].encode()
        return text.decode(errors="replace")

    def token_bytes(self, token_id: int, *, begins_text: bool = False) -> bytes:
        return bytes([token_id]) if token_id < 256 else self.special_tokens[token_id].encode()

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        return [self.decode([token_id], skip_special_tokens=False) for token_id in token_ids]

    @property
    def info(self) -> dict[str, object]:
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "unk_token": None}
        return {"tokenizer_class": "ByteTokenizer", "chat_template": "{{ messages }}", "vocab_size": 258, **special}

    def close(self) -> None:
        pass
