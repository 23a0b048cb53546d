from __future__ import annotations

from collections.abc import Sequence

import pytest

from prompt_store.formats import FormatType, PromptFormat, SamplingDefaults
from server.datasets import Conversation, Example, LabelledText, Message, PromptCompletion
from server.training.encoding import Encoded
from server.training.recorded_format import recorded_format

ENCODED = [Encoded([1], [2, 3]), Encoded([1], [2, 3, 4])]


def conversation(*systems: str) -> Conversation:
    turns = [Message("system", text) for text in systems]
    return Conversation((*turns, Message("user", "hi"), Message("assistant", "hello")))


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ([PromptCompletion("a", "b")], PromptFormat(FormatType.RAW)),
        (
            [LabelledText("a", "x"), LabelledText("b", "yy")],
            PromptFormat(FormatType.RAW, separator="\n", sampling=SamplingDefaults(max_tokens=3, temperature=0.0)),
        ),
        ([conversation(), conversation()], PromptFormat(FormatType.CHAT)),
        ([conversation("be kind")] * 2, PromptFormat(FormatType.CHAT, system="be kind")),
        ([conversation("be kind"), conversation("be short")], PromptFormat(FormatType.CHAT)),
        ([conversation("be kind"), conversation()], PromptFormat(FormatType.CHAT)),
        ([conversation("x" * 9000)], PromptFormat(FormatType.CHAT)),
    ],
)
def test_the_format_follows_from_the_form_of_the_data(examples: Sequence[Example], expected: PromptFormat) -> None:
    assert recorded_format(examples, ENCODED, "\n") == expected
