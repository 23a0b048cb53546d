"""Encode examples as the server will encode requests.

The prompt (a text, or messages formatted by the chat template) is tokenised alone, as the server does. The completion
is tokenised as its continuation, as ``/v1/classify`` does for labels. So the prompt ends exactly where generation
starts, even if the tokenizer would merge tokens across this border.
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
        prompt_ids: Tokens of the prompt; no loss is computed on them.
        completion_ids: Tokens to learn, with the end-of-sequence token if the model has one.
        task_id: The task of a multitask prompt.
        class_id: Index of the label that a classification head has to give; None without a head.
        line: Line of the example in its file, from 1.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    task_id: int | None = None
    class_id: int | None = None
    line: int = 0

    @property
    def token_ids(self) -> list[int]:
        """Prompt and completion."""
        return self.prompt_ids + self.completion_ids


@dataclass(frozen=True, slots=True)
class Encoder:
    """Tokenises as the server does.

    Attributes:
        tokenizer: The base model's tokenizer (transformers).
        eos_token_ids: Tokens that end a generation.
        separator: Text between a text and its label.
        labels: The labels of a classification head, in its order; empty if completions are learnt.
    """

    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    separator: str
    labels: tuple[str, ...] = ()

    def prompt_of(self, example: Example) -> str:
        """The text that the server tokenises: the prompt, or the messages as formatted by the chat template.

        Raises:
            TemplateError, ValueError: If the chat template rejects the messages.
        """
        if isinstance(example, Conversation):
            return self._render(example, with_answer=False)
        return example.text if isinstance(example, LabelledText) else example.prompt

    def completion_of(self, example: Example) -> str:
        """The text to learn, without the end-of-sequence token."""
        if isinstance(example, Conversation):
            return example.messages[-1].content
        return self.separator + example.label if isinstance(example, LabelledText) else example.completion

    def encode(self, example: Example) -> Encoded:
        """Encode one example.

        Raises:
            TemplateError, ValueError: If the chat template rejects the messages.
        """
        prompt, completion = self.prompt_of(example), self.completion_of(example)
        is_chat = isinstance(example, Conversation)
        prompt_ids = self._ids(prompt, add_special_tokens=not is_chat)
        if self.labels and isinstance(example, LabelledText):
            class_id = self.labels.index(example.label)
            return Encoded(prompt_ids, [], example.task_id, class_id, line=example.line)
        (completion_ids,) = continuations_of(self.tokenizer).encode(Context(prompt_ids, prompt), [completion])
        completion_ids += self._end(example, prompt)
        return Encoded(prompt_ids, completion_ids, example.task_id, line=example.line)

    def encode_all(
        self, path: Path, examples: Sequence[Example], *, max_tokens: int, num_virtual_tokens: int
    ) -> list[Encoded]:
        """Encode all examples of a file.

        Args:
            path: The file, for the error message.
            examples: Its rows.
            max_tokens: Length of the model's context.
            num_virtual_tokens: Length of the soft prompt, which is part of the context.

        Raises:
            DatasetError: With every row that does not fit the context, or that the chat template rejects.
        """
        encoded: list[Encoded] = []
        faults: list[tuple[int, str]] = []
        room = max_tokens - num_virtual_tokens
        for example in examples:
            try:
                one = self.encode(example)
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                faults.append((example.line, f"rejected by the chat template: {error}"))
                continue
            if (count := len(one.token_ids)) > room:
                faults.append(
                    (
                        example.line,
                        f"{count} tokens, but at most {room} fit: the context has {max_tokens} tokens, "
                        f"{num_virtual_tokens} of them virtual",
                    )
                )
            encoded.append(one)
        if faults:
            raise DatasetError(path, faults[:MAX_FAULTS], len(faults))
        return encoded

    def _end(self, example: Example, prompt: str) -> list[int]:
        """The end-of-sequence token of an example: the chat template's, or the tokenizer's."""
        if isinstance(example, Conversation):
            full = self._render(example, with_answer=True)
            answered = prompt + example.messages[-1].content
            if full.startswith(answered):
                rest = self._ids(full.removeprefix(answered), add_special_tokens=False)
                if rest and rest[0] in self.eos_token_ids:
                    return rest[:1]
        own = self.tokenizer.eos_token_id
        if own in self.eos_token_ids or not self.eos_token_ids:
            return [] if own is None else [own]
        return [self.eos_token_ids[0]]

    def _render(self, conversation: Conversation, *, with_answer: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError("the model has no chat template")
        messages = conversation.messages if with_answer else conversation.messages[:-1]
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not with_answer))

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
