"""A GGUF file becomes a model and a tokenizer that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from server.demo.real import model as real
from server.errors import ConfigurationError

gguf = pytest.importorskip("gguf", reason="the extra real is not installed")

from server.demo.real.conversion import ConversionError, convert  # noqa: E402 - it needs gguf

BYTES = [chr(code) for code in range(33, 127)]
"""Characters that stand for their own byte in a byte-level BPE."""

SPECIAL = ["<|unk|>", "<|start|>", "<|end|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "12"]
CONTROL, NORMAL = 3, 1
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}

CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
    tie_word_embeddings=True,
)

MakeFile = Callable[..., tuple[Path, LlamaForCausalLM]]


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    """A file with a random model in Q8_0, and this model with the numbers that the file holds."""

    def make(
        architecture: str = "llama", pre: str = "smollm", extra: str | None = None
    ) -> tuple[Path, LlamaForCausalLM]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG)
        path = tmp_path / real.WEIGHTS
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(2)
        writer.add_context_length(128)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
        writer.add_rope_freq_base(1234.0)
        writer.add_vocab_size(len(TOKENS))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([CONTROL] * len(SPECIAL) + [NORMAL] * (len(TOKENS) - len(SPECIAL)))
        writer.add_token_merges(["a b", "1 2"])
        for number, add in enumerate([writer.add_unk_token_id, writer.add_bos_token_id, writer.add_eos_token_id]):
            add(number)
        writer.add_pad_token_id(2)
        writer.add_chat_template("{{ messages[0]['content'] }}")
        for name, parameter in model.named_parameters():
            _add(writer, name, parameter)
        if extra is not None:
            writer.add_tensor(extra, np.zeros(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, model

    return make


def _add(writer: Any, name: str, parameter: torch.nn.Parameter) -> None:
    """Write a parameter under GGUF's name, rounded as Q8_0 does if it is a matrix; it gets the rounded numbers."""
    values = parameter.detach().numpy()
    if values.ndim == 2:
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        parameter.data = torch.from_numpy(values.copy())
    *_, number, module, kind, suffix = ["", "", "", *name.split(".")]
    layer = f"{module}.{kind}" if f"{module}.{kind}" in NAMES else kind
    if layer in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = 4 if layer == "self_attn.q_proj" else 2
        rows, columns = values.shape
        values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    if layer in NAMES:
        number = number if "." in layer else module
        target = f"blk.{number}.{NAMES[layer]}.{suffix}"
    else:
        target = {"embed_tokens": "token_embd", "norm": "output_norm"}[kind] + f".{suffix}"
    if values.ndim == 2:
        packed = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(target, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(target, values)


def test_the_converted_model_computes_the_same(make_file: MakeFile, tmp_path: Path) -> None:
    path, model = make_file()
    out = tmp_path / "out"
    out.mkdir()
    progress: list[tuple[int, int]] = []
    convert(path, out, on_tensor=lambda done, total: progress.append((done, total)))
    answer: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    loaded, info = answer
    assert not any(info.values())
    assert progress == [(number, 20) for number in range(1, 21)]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want, got = model(ids).logits, loaded(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)  # the file on the disk is float16
    assert loaded.generation_config.eos_token_id == 2
    assert AutoModelForCausalLM.from_pretrained(out).dtype is torch.bfloat16


def test_the_tokenizer_splits_numbers_and_keeps_control_tokens(make_file: MakeFile, tmp_path: Path) -> None:
    path, _ = make_file()
    out = tmp_path / "out"
    out.mkdir()
    convert(path, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("ab 12<|end|>") == ["ab", "Ġ", "1", "2", "<|end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<|end|>", "<|end|>")
    assert tokenizer.decode(tokenizer("é ab 12").input_ids) == "é ab 12"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "architecture gpt2, not llama"),
        ({"pre": "qwen2"}, "tokenizer gpt2/qwen2, not gpt2/smollm"),
        ({"extra": "blk.0.attn_sinks.weight"}, "the tensor blk.0.attn_sinks.weight"),
    ],
)
def test_another_model_is_an_error(
    make_file: MakeFile, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    path, _ = make_file(**changes)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ConversionError, match=message):
        convert(path, out)
    with pytest.raises(ConfigurationError, match=message):
        real.converted(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_that_is_no_gguf_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / real.WEIGHTS
    path.write_bytes(b"no such file" * 10)
    with pytest.raises(ConfigurationError, match="is not a GGUF file"):
        real.converted(path, tmp_path / "cache")


def test_a_model_is_converted_once(make_file: MakeFile, tmp_path: Path) -> None:
    path, _ = make_file()
    calls: list[int] = []
    first = real.converted(path, tmp_path / "cache", on_tensor=lambda done, _: calls.append(done))
    num_calls = len(calls)
    assert real.converted(path, tmp_path / "cache", on_tensor=lambda done, _: calls.append(done)) == first
    assert (num_calls, len(calls)) == (20, 20)
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [first.name]


def test_two_processes_may_convert_at_once(make_file: MakeFile, tmp_path: Path) -> None:
    path, _ = make_file()
    inner: list[Path] = []

    def meanwhile(done: int, total: int) -> None:
        if done == total and not inner:
            inner.append(tmp_path)
            inner[0] = real.converted(path, tmp_path / "cache", on_tensor=meanwhile)

    assert real.converted(path, tmp_path / "cache", on_tensor=meanwhile) == inner[0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_an_error(make_file: MakeFile, tmp_path: Path) -> None:
    path, _ = make_file()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="XDG_CACHE_HOME"):
        real.converted(path, tmp_path / "file" / "cache")
