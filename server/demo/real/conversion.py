"""Convert a GGUF file of the Llama architecture into a directory that transformers loads.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The numbers of a quantised file are computed exactly,
then rounded to float16, which numpy has. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

OnTensor = Callable[[int, int], None]
"""Called after each tensor with the number of converted ones and of all."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of layers, and transformers'."""

_DIGITS = {"smollm"}
"""Pre-tokenizers that split numbers into digits, and otherwise are GPT-2's."""

_CONTROL = 3
"""GGUF's type of a token that is not text."""


class ConversionError(Exception):
    """The file cannot be converted; the message is the reason."""


def convert(path: Path, out: Path, *, on_tensor: OnTensor = lambda _done, _total: None) -> None:
    """Write configuration, tokenizer and weights.

    Args:
        path: The GGUF file.
        out: An empty directory.
        on_tensor: Called after each tensor.

    Raises:
        ConversionError: If it is no such file, or of another architecture or tokenizer.
        OSError: If a file cannot be read or written.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError) as error:
        raise ConversionError(f"{path} is not a GGUF file: {error}") from error
    facts = _Facts(reader)
    _write_json(out / "config.json", _config(facts, [tensor.name for tensor in reader.tensors]))
    ids = {"bos_token_id": facts("tokenizer.ggml.bos_token_id"), "eos_token_id": facts("tokenizer.ggml.eos_token_id")}
    _write_json(out / "generation_config.json", ids)
    _write_tokenizer(facts, out)
    heads = {"attn_q": facts("llama.attention.head_count"), "attn_k": facts("llama.attention.head_count_kv")}
    tensors: dict[str, NDArray[np.float16]] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        name, layer = _renamed(tensor.name)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if layer in heads:
            values = _in_halves(values, heads[layer])
        tensors[name] = np.ascontiguousarray(values, np.float16)
        on_tensor(done, len(reader.tensors))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


class _Facts:
    """The metadata of a file by key."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._fields = reader.fields

    def __call__(self, key: str) -> Any:
        """A value; a ConversionError if it is missing."""
        if key not in self._fields:
            raise ConversionError(
                f"the GGUF file has no {key}: only Llama models with a byte-level BPE are converted"
            )
        return self._fields[key].contents()


def _config(facts: _Facts, names: list[str]) -> dict[str, Any]:
    architecture = facts("general.architecture")
    if architecture != "llama":
        raise ConversionError(f"the GGUF file holds a model of the architecture {architecture}, not llama")
    num_heads, hidden_size = facts("llama.attention.head_count"), facts("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": facts("llama.vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": facts("llama.feed_forward_length"),
        "num_hidden_layers": facts("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": facts("llama.attention.head_count_kv"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": facts("llama.context_length"),
        "rms_norm_eps": round(facts("llama.attention.layer_norm_rms_epsilon"), 12),
        "rope_parameters": {"rope_type": "default", "rope_theta": facts("llama.rope.freq_base")},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": facts("tokenizer.ggml.bos_token_id"),
        "eos_token_id": facts("tokenizer.ggml.eos_token_id"),
        "pad_token_id": facts("tokenizer.ggml.padding_token_id"),
    }


def _write_tokenizer(facts: _Facts, out: Path) -> None:
    kind = facts("tokenizer.ggml.model"), facts("tokenizer.ggml.pre")
    if kind[0] != "gpt2" or kind[1] not in _DIGITS:
        raise ConversionError(f"the GGUF file has the tokenizer {'/'.join(kind)}, not gpt2/{'/'.join(_DIGITS)}")
    tokens, types = facts("tokenizer.ggml.tokens"), facts("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in facts("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(out / "tokenizer.json"))
    named = {
        name: tokens[facts(f"tokenizer.ggml.{key}_token_id")]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
    }
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": facts("llama.context_length"),
            **named,
        },
    )
    (out / "chat_template.jinja").write_text(facts("tokenizer.chat_template"), encoding="utf-8")


def _renamed(name: str) -> tuple[str, str]:
    """Transformers' name of a tensor, and GGUF's name of its layer."""
    *block, layer, kind = name.split(".")
    if layer not in _NAMES or (block and (len(block) != 2 or block[0] != "blk")):
        raise ConversionError(f"the GGUF file has the tensor {name}, which a Llama model does not have")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_NAMES[layer]}.{kind}", layer


def _in_halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows in transformers' order: GGUF interleaves the two halves of each head that RoPE rotates together."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
