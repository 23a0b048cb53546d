"""Examples to token ids, so that training sees what the server will see.

What a client sends as ``prompt`` (or as messages, through the chat template) is tokenised as the server does it, by
itself; the completion's tokens follow as that text's continuation, as ``/v1/classify`` takes labels. So a text ends
exactly where generation begins, whatever the tokenizer would merge across that border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from server.continuations import Context, continuations_of
from server.datasets import MAX_FAULTS, Conversation, DatasetError, Example, LabelledText


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids.

    Attributes:
        prompt_ids: What is given.
        completion_ids: What is learned, with the end-of-sequence token where the model has one.
        task_id: The task of a multitask prompt.
        line: Where it stands in its file.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    task_id: int | None = None
    line: int = 0

    @property
    def token_ids(self) -> list[int]:
        """All of it."""
        return self.prompt_ids + self.completion_ids


@dataclass(frozen=True, slots=True)
class Encoder:
    """Tokenises as the server does.

    Attributes:
        tokenizer: The base model's (transformers).
        eos_token_ids: The tokens that end a generation.
        separator: Stands between a text and its label.
    """

    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    separator: str

    def prompt_of(self, example: Example) -> str:
        """The text that the server tokenises: with special tokens, or as the chat template wrote it.

        Raises:
            TemplateError, ValueError: If the chat template refuses the messages.
        """
        if isinstance(example, Conversation):
            return self._rendered(example, is_whole=False)
        return example.text if isinstance(example, LabelledText) else example.prompt

    def completion_of(self, example: Example) -> str:
        """What is to be generated."""
        if isinstance(example, Conversation):
            return example.messages[-1].content
        return self.separator + example.label if isinstance(example, LabelledText) else example.completion

    def encode(self, example: Example) -> Encoded:
        """One example.

        Raises:
            TemplateError, ValueError: If the chat template refuses the messages.
        """
        prompt, completion = self.prompt_of(example), self.completion_of(example)
        is_chat = isinstance(example, Conversation)
        prompt_ids = self._ids(prompt, add_special_tokens=not is_chat)
        (completion_ids,) = continuations_of(self.tokenizer).encode(Context(prompt_ids, prompt), [completion])
        return Encoded(prompt_ids, completion_ids + self._end(example, prompt), example.task_id, example.line)

    def encode_all(
        self, path: Path, examples: Sequence[Example], *, max_tokens: int, num_virtual_tokens: int
    ) -> list[Encoded]:
        """All examples of a file.

        Args:
            path: The file, for the error.
            examples: Its rows.
            max_tokens: Positions of the model's context.
            num_virtual_tokens: How many of these the soft prompt takes.

        Raises:
            DatasetError: With every row that does not fit the context, or that the chat template refuses.
        """
        encoded: list[Encoded] = []
        faults: list[tuple[int, str]] = []
        room = max_tokens - num_virtual_tokens
        for example in examples:
            try:
                one = self.encode(example)
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                faults.append((example.line, f"the chat template refuses it: {error}"))
                continue
            if (count := len(one.token_ids)) > room:
                faults.append(
                    (
                        example.line,
                        f"{count} tokens, where the context of {max_tokens} has room for {room} beside "
                        f"{num_virtual_tokens} virtual ones",
                    )
                )
            encoded.append(one)
        if faults:
            raise DatasetError(path, faults[:MAX_FAULTS], len(faults))
        return encoded

    def _end(self, example: Example, prompt: str) -> list[int]:
        """The token after the completion: the one that the chat template writes, or the tokenizer's own."""
        if isinstance(example, Conversation):
            whole = self._rendered(example, is_whole=True)
            answered = prompt + example.messages[-1].content
            if whole.startswith(answered):
                rest = self._ids(whole.removeprefix(answered), add_special_tokens=False)
                if rest and rest[0] in self.eos_token_ids:
                    return rest[:1]
        own = self.tokenizer.eos_token_id
        if own in self.eos_token_ids or not self.eos_token_ids:
            return [] if own is None else [own]
        return [self.eos_token_ids[0]]

    def _rendered(self, conversation: Conversation, *, is_whole: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError("the model has none")
        messages = conversation.messages if is_whole else conversation.messages[:-1]
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not is_whole))

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
