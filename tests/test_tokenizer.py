"""What one token shows by itself, for the kinds of tokenizers that write bytes differently."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.demo.tour import MODEL_DIRECTORY
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
async def test_byte_level(byte_level: Tokenizer) -> None:
    ((*ids,),) = await byte_level.encode([TEXT], add_special_tokens=False)
    assert len(ids) == len(TEXT.encode())
    assert b"".join(map(byte_level.token_bytes, ids)) == TEXT.encode()


@pytest.mark.anyio
async def test_byte_fallback_and_the_space_before_a_word(byte_fallback: Tokenizer) -> None:
    ((*ids,),) = await byte_fallback.encode(["a a é🙂"], add_special_tokens=False)
    assert b"".join(map(byte_fallback.token_bytes, ids)) == " a a é🙂".encode()


@pytest.mark.anyio
async def test_the_embedded_model() -> None:
    with closing(Tokenizer.load(str(MODEL_DIRECTORY))) as tokenizer:
        ((*ids,),) = await tokenizer.encode([TEXT], add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == TEXT.encode()
        assert tokenizer.token_bytes(10**6) == b""


def test_what_clients_are_told_is_the_configuration_without_its_paths() -> None:
    with closing(Tokenizer.load(str(MODEL_DIRECTORY))) as tokenizer:
        info = tokenizer.info
        assert (info["bos_token"], info["eos_token"], info["pad_token"]) == (None, "<|endoftext|>", "<|pad|>")
        assert "message['content']" in info["chat_template"]
        assert str(MODEL_DIRECTORY.parent) not in json.dumps(info)
        assert tokenizer.token_strings([65, 10**6])[1] == ""
        assert all(tokenizer.token_strings([1, 65]))
