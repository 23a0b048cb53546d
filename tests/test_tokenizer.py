"""Bytes of single tokens for each byte encoding, refusals of long texts, and chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core
from transformers import PreTrainedTokenizerFast

from server.demo.tour import MODEL_DIRECTORY
from server.errors import ContextLengthError, InvalidRequestError
from server.fair_work import SHORT_CHARS, working_for
from server.tokenizer import Tokenizer

TEXT = "a lamp, café 日本 🙂"


@pytest.fixture
def byte_level() -> Iterator[Tokenizer]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    with closing(Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core))) as tokenizer:
        yield tokenizer


@pytest.fixture
def byte_fallback() -> Iterator[Tokenizer]:
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    core = Core(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a")],
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    with closing(Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core))) as tokenizer:
        yield tokenizer


@pytest.mark.anyio
async def test_byte_level_tokens_add_up_to_the_text(byte_level: Tokenizer) -> None:
    ((*ids,),) = await byte_level.encode([TEXT], add_special_tokens=False)
    assert len(ids) == len(TEXT.encode())
    assert b"".join(map(byte_level.token_bytes, ids)) == TEXT.encode()


@pytest.mark.anyio
async def test_byte_fallback_tokens_add_up_to_the_text_with_its_first_space(byte_fallback: Tokenizer) -> None:
    ((*ids,),) = await byte_fallback.encode(["a a é🙂"], add_special_tokens=False)
    assert b"".join(map(byte_fallback.token_bytes, ids)) == " a a é🙂".encode()


@pytest.mark.anyio
async def test_tokens_of_the_embedded_model_add_up_to_the_text() -> None:
    with closing(Tokenizer.load(str(MODEL_DIRECTORY))) as tokenizer:
        ((*ids,),) = await tokenizer.encode([TEXT], add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == TEXT.encode()
        assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.anyio
async def test_a_text_far_over_the_context_is_refused_from_its_beginning(
    byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    whole = byte_level._tokenizer

    class Counting:
        def __call__(self, texts: str | list[str], **options: bool) -> object:
            encoded.extend(len(text) for text in ([texts] if isinstance(texts, str) else texts))
            return whole(texts, **options)

    monkeypatch.setattr(byte_level, "_tokenizer", Counting())
    with pytest.raises(
        ContextLengthError, match="input: .* first 984 of the text's 1000000 characters alone are 984"
    ):
        await byte_level.encode(["x" * 1_000_000], add_special_tokens=False, most=100, field="input")
    assert encoded == [984]
    # A text that may fit or is barely longer is encoded once; without a limit, all tokens are returned.
    for text, most in (("x" * 100, 100), ("x" * 1900, 100), ("x" * 100_000, None)):
        encoded.clear()
        (tokens,) = await byte_level.encode([text], add_special_tokens=False, most=most)
        assert len(tokens) == len(text)
        assert encoded == [len(text)]


@pytest.mark.anyio
async def test_no_text_is_encoded_after_a_too_long_one(byte_level: Tokenizer) -> None:
    texts = ["x" * 900] * 40
    with (
        working_for("a") as work,
        pytest.raises(ContextLengthError, match="input: .* 100 tokens, and one .* has 900"),
    ):
        await byte_level.encode(texts, add_special_tokens=False, most=100, field="input")
    assert 0 < work.num_tokens <= SHORT_CHARS < 40 * 900
    with working_for("a") as work:
        encoded = await byte_level.encode(texts, add_special_tokens=False, most=900)
    assert [len(tokens) for tokens in encoded] == [900] * 40
    assert work.num_tokens == 40 * 900


@pytest.mark.anyio
async def test_refused_texts_count_as_work(byte_level: Tokenizer) -> None:
    with working_for("a") as work, pytest.raises(ContextLengthError):
        await byte_level.encode(["x" * 100_000], add_special_tokens=False, most=100)
    assert work.num_tokens == 984


@pytest.mark.anyio
async def test_a_long_text_of_few_tokens_is_encoded(byte_fallback: Tokenizer) -> None:
    core = byte_fallback._tokenizer.backend_tokenizer
    core.normalizer = normalizers.Replace(Regex("b+"), "a")
    (tokens,) = await byte_fallback.encode(["a" + "b" * 100_000], add_special_tokens=False, most=100)
    assert len(tokens) == 2


def test_the_reported_configuration_has_no_paths() -> None:
    with closing(Tokenizer.load(str(MODEL_DIRECTORY))) as tokenizer:
        info = tokenizer.info
        assert (info["bos_token"], info["eos_token"], info["pad_token"]) == (None, "<|endoftext|>", "<|pad|>")
        assert "message['content']" in str(info["chat_template"])
        assert str(MODEL_DIRECTORY.parent) not in json.dumps(info)
        assert tokenizer.token_strings([65, 10**6])[1] == ""
        assert all(tokenizer.token_strings([1, 65]))


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TURNS = [{"role": "user", "content": "x"}]


@pytest.mark.anyio
async def test_a_template_with_tools_renders_them(byte_level: Tokenizer) -> None:
    byte_level._tokenizer.chat_template = (
        "{{ messages[0].content }}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    )
    assert await byte_level.render_chat(TURNS, tools=TOOLS, needs_tools=True) == "xweather"
    assert await byte_level.render_chat(TURNS) == "x"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("turns", "tools"),
    [
        ([{"role": "user", "content": "x" * SHORT_CHARS}], []),
        ([*TURNS, {"role": "assistant", "content": "", "reasoning": "x" * SHORT_CHARS}], []),
        ([*TURNS, {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"x" * SHORT_CHARS: [1]}}]}], []),
        (TURNS, [{"type": "function", "function": {"name": "f", "description": "x" * SHORT_CHARS}}]),
    ],
    ids=["content", "reasoning", "arguments", "tools"],
)
async def test_every_part_of_a_conversation_counts_towards_its_size(
    byte_level: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    turns: list[dict[str, object]],
    tools: list[dict[str, object]],
) -> None:
    sizes: list[int] = []
    run = byte_level._threads.run

    async def recording(function: Callable[[], str], *, size: int) -> str:
        sizes.append(size)
        return await run(function, size=size)

    monkeypatch.setattr(byte_level._threads, "run", recording)
    byte_level._tokenizer.chat_template = "{{ messages[0].content }}"
    await byte_level.render_chat(TURNS)
    await byte_level.render_chat(turns, tools=tools)
    assert sizes[0] < 100
    assert sizes[1] > SHORT_CHARS


@pytest.mark.anyio
async def test_a_template_without_tools_is_refused_if_tools_are_needed(byte_level: Tokenizer) -> None:
    byte_level._tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InvalidRequestError, match="does not support tools") as error:
        await byte_level.render_chat(TURNS, tools=TOOLS, needs_tools=True)
    assert error.value.param == "tools"
    assert await byte_level.render_chat(TURNS, tools=TOOLS) == "x"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "refuses them: no system role"),
        ("{{ raise_exception('x' * 1000) }}", "refuses them: xxx"),
        ("{{ raise_exception(messages) }}", "refuses them: "),
        ("{{ messages[0].content + 5 }}", "fails on them: TypeError: can only concatenate str"),
        ("{{ messages[0].absent.deeper }}", "refuses them: 'dict object' has no attribute 'absent'"),
        ("{% for %}", "refuses them: "),
        ("{{ 1 / 0 }}", "fails on them: ZeroDivisionError: division by zero"),
        ("{{ [].pop() }}", "refuses them: "),  # the sandbox's message
        ("{{ ''.nothing() }}", "has no attribute 'nothing'"),
        ("{{ messages[0].content.encode('no such') }}", "fails on them: LookupError: "),
        ("{{ messages[0].content.index('absent') }}", "fails on them: ValueError: substring not found"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on them: RecursionError: "),
        ("{{ 10.0 ** 400 }}", "fails on them: OverflowError: "),
        ("{% for i in range(10**9) %}x{% endfor %}", "fails on them: OverflowError: Range too big"),
        ("{{ 'x' * 10**17 }}", "fails on them: MemoryError: "),
        (r'{{ "\ud800" }}', "fails on them: UnicodeEncodeError: "),
    ],
)
async def test_a_failing_template_is_an_error_of_the_conversation(
    byte_level: Tokenizer, template: str, words: str
) -> None:
    byte_level._tokenizer.chat_template = template
    with pytest.raises(InvalidRequestError) as error:
        await byte_level.render_chat(TURNS, tools=TOOLS)
    assert error.value.param == "messages"
    assert error.value.message.startswith("messages: the chat template ")
    assert words in error.value.message
    assert len(error.value.message) <= 500
    byte_level._tokenizer.chat_template = "{{ messages[0].content }}"
    assert await byte_level.render_chat(TURNS) == "x"
