"""The startup check: what it measures of a model, and which models it refuses, with a message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    CTRLConfig,
    DynamicCache,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from server.config import EngineSettings
from server.engine import llm_engine
from server.engine.attention.kv_cache import KVCache
from server.engine.llm_engine import LLMEngine
from server.engine.model.exactness import ExactnessCheck, Span
from server.engine.model.model_shape import KeyValueShape, config_value, key_value_shape, num_embeddings
from server.engine.model.paged_model import PagedModel
from server.errors import EngineStartError
from tests.support.engine.families import UNTIED
from tests.support.engine.harness import (
    CONFIGS,
    CONTEXT,
    PEFT_CONFIGS,
    SHAPE,
    VOCABULARY,
    Family,
    add,
    check_logprobs,
    greedy,
    make_family,
    run,
    tokens,
)

PER_LAYER: dict[str, Any] = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
FOUR_LAYERS: dict[str, Any] = {**UNTIED, "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 11}
FOUR_LAYERS["layer_types"] = ["sliding_attention", "full_attention"] * 2


def gemma3n(num_shared: int) -> Gemma3nTextConfig:
    sparsity: dict[str, Any] = {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2}
    return Gemma3nTextConfig(**FOUR_LAYERS, **PER_LAYER, **sparsity, num_kv_shared_layers=num_shared)


def gemma4(**more: Any) -> Gemma4TextConfig:
    return Gemma4TextConfig(**FOUR_LAYERS, **{"hidden_size_per_layer_input": 0, "global_head_dim": 16, **more})


def save_model(config: PreTrainedConfig, path: Path) -> None:
    """A random model without zero weights, because zeros hide what is computed from them."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.std() == 0 or parameter.abs().max() == 0:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(path)


def start(path: Path, **settings: Any) -> LLMEngine:
    return LLMEngine(EngineSettings(model=str(path), dtype="float32", kv_cache_memory=2**22, **settings))


@pytest.mark.parametrize(
    ("make_config", "reason"),
    [
        (
            lambda: gemma3n(0),
            "It looks something up by id besides the embeddings, and a soft prompt's rows have no ids",
        ),
        (lambda: gemma3n(2), "2 of its 4 layers have no keys and values of their own"),
        (lambda: gemma4(**PER_LAYER), "it takes no soft prompt"),
        (lambda: gemma4(global_head_dim=32), r"of several shapes \(heads, width\): \(2, 16\), \(2, 32\)"),
    ],
    ids=["ids beside embeddings", "shared keys and values", "per-layer inputs", "two widths"],
)
def test_models_that_take_no_soft_prompt_are_refused(
    make_config: Callable[[], PreTrainedConfig], reason: str, tmp_path: Path
) -> None:
    save_model(make_config(), tmp_path)
    with pytest.raises(EngineStartError, match=f"cannot be served: .*({reason})"):
        start(tmp_path)


def llama_check(max_model_len: int = 256, *, head_rows: int = VOCABULARY) -> ExactnessCheck:
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    if head_rows != VOCABULARY:
        model.lm_head = nn.Linear(config.hidden_size, head_rows, bias=False).requires_grad_(False)
    return ExactnessCheck(model, config, max_model_len, has_experts=False)


def test_the_shape_and_the_vocabulary_are_measured() -> None:
    check = llama_check()
    assert check.shape == KeyValueShape(num_layers=3, num_kv_heads=2, head_dim=12)
    assert check.vocab_size == VOCABULARY
    # Embeddings without a logit cannot be scored, nor penalised.
    assert llama_check(head_rows=VOCABULARY - 7).vocab_size == VOCABULARY - 7


def test_tokens_without_an_embedding_are_refused() -> None:
    with pytest.raises(EngineStartError, match=f"among {VOCABULARY + 3} tokens and has embeddings for {VOCABULARY}"):
        llama_check(head_rows=VOCABULARY + 3)


def test_wrong_keys_and_values_of_soft_prompts_are_found(llama: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = KVCache.fill

    def fill_backwards(cache: KVCache, blocks: list[int], rows: torch.Tensor) -> None:
        fill(cache, blocks, rows.flip(-1))

    monkeypatch.setattr(KVCache, "fill", fill_backwards)
    with pytest.raises(EngineStartError, match="logits behind a soft prompt of keys and values differ from its own"):
        start(llama.path)


@pytest.mark.parametrize(
    ("first_row", "num_rows", "what"),
    [
        (0, 8, "a bare text's logits beside soft prompts"),
        (8, 13, "logits behind a soft prompt of embeddings"),
        (21, 8, "logits behind a soft prompt of keys and values"),
    ],
)
def test_each_kind_in_the_mixed_batch_is_compared(
    first_row: int, num_rows: int, what: str, llama: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PagedModel.forward

    def spoil(model: PagedModel, spans: Sequence[Span], inputs: dict[str, torch.Tensor], rows: range) -> torch.Tensor:
        logits = forward(model, spans, inputs, rows)
        if "inputs_embeds" in inputs:
            logits[first_row : first_row + num_rows] *= 1.2
        return logits

    monkeypatch.setattr(PagedModel, "forward", spoil)
    with pytest.raises(EngineStartError, match=f"{what} differ from its own"):
        start(llama.path)


@pytest.mark.parametrize("max_model_len", range(3, 9))
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_short_contexts_start(max_model_len: int, block_size: int, llama: Family) -> None:
    memory = 2 * 3 * block_size * 2 * 12 * 4 * (-(-max_model_len // block_size) + 1)
    engine = LLMEngine(
        EngineSettings(
            model=str(llama.path),
            dtype="float32",
            kv_cache_memory=memory,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=1,
        )
    )
    add(engine, "r", [5], greedy(1))
    assert tokens(run(engine)["r"]) == llama.expected(None, [5], 1)
    engine.close()


def test_an_unknown_type_of_model_says_which_engine_may_serve_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "newest", "architectures": ["NewestForCausalLM"]}')
    with pytest.raises(EngineStartError, match=r"has no model of the type 'newest': a newer release .*--engine vllm"):
        LLMEngine(EngineSettings(model=str(tmp_path)))


@pytest.mark.parametrize("kind", ["t5", "bart", "headless"])
def test_other_models_than_causal_language_models_are_refused(kind: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 16}
    if kind == "t5":
        T5ForConditionalGeneration(T5Config(**small, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
            tmp_path
        )
        reason = "no causal language model of the type 't5'"
    elif kind == "bart":
        layers: dict[str, Any] = {
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        }
        BartForConditionalGeneration(
            BartConfig(**small, **layers, encoder_ffn_dim=16, decoder_ffn_dim=16)
        ).save_pretrained(tmp_path)
        reason = "an encoder beside their decoder"
    else:
        LlamaModel(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
        reason = "has no weights for lm_head.weight"
    with pytest.raises(EngineStartError, match=reason) as raised:
        start(tmp_path)
    assert len(raised.value.message) < 600


def test_an_unexpected_error_is_reported_in_words(llama: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("heads")

    monkeypatch.setattr(llm_engine, "ModelRunner", fail)
    with pytest.raises(EngineStartError, match=r"cannot be served \(ZeroDivisionError: heads\)"):
        start(llama.path)


def cache_of(*shapes: tuple[int, int, int]) -> DynamicCache:
    """Layers of (heads, width of keys, width of values)."""
    cache = DynamicCache()
    for layer, (heads, width, values_width) in enumerate(shapes):
        cache.update(torch.zeros(1, heads, 3, width), torch.zeros(1, heads, 3, values_width), layer)
    return cache


@pytest.mark.parametrize(
    ("cache", "num_layers", "reason"),
    [
        (None, 2, "it keeps no keys and values"),
        (SimpleNamespace(layers=[SimpleNamespace(conv_states=1)]), 1, "it keeps no keys and values"),
        (cache_of((2, 8, 8)), 3, "2 of its 3 layers have no keys and values of their own"),
        (cache_of((2, 8, 4), (2, 8, 4)), 2, r"keys are \(2, 8\) and its values \(2, 4\)"),
        (cache_of((2, 8, 8), (4, 8, 8)), 2, r"\(2, 8\), \(4, 8\)"),
    ],
)
def test_shapes_that_are_not_paged(cache: object, num_layers: int, reason: str) -> None:
    with pytest.raises(EngineStartError, match=f"Tiny cannot be served: .*{reason}"):
        key_value_shape("Tiny", cache, num_layers)


def test_the_number_of_layers_may_be_missing_in_the_configuration() -> None:
    assert key_value_shape("Tiny", cache_of((2, 8, 8), (2, 8, 8)), None) == KeyValueShape(2, 2, 8)


def test_values_that_differ_between_layers_are_none() -> None:
    config = gemma4(global_head_dim=32)
    assert config_value(config, "head_dim") is None
    assert config_value(config, "hidden_size") == 48
    assert config_value(config, "no_such_thing") is None


def test_the_number_of_embeddings_is_found() -> None:
    config = LlamaConfig(vocab_size=5)
    assert num_embeddings(nn.Embedding(7, 2), config) == 7
    assert num_embeddings(nn.Identity(), config) == 5
    with pytest.raises(EngineStartError, match="Identity"):
        num_embeddings(nn.Identity(), PreTrainedConfig())


def test_a_model_that_scales_its_embeddings_in_place_changes_no_soft_prompt(
    tmp_path: Path, make_engine: Callable[..., LLMEngine]
) -> None:
    config = CTRLConfig(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=48, dff=80, n_layer=3, n_head=4, initializer_range=0.25
    )
    family = make_family("ctrl", tmp_path, {"prompt_tuning_20": PEFT_CONFIGS["prompt_tuning_20"]}, config)
    engine = make_engine(family)
    source, text = family.soft_prompts["prompt_tuning_20"], [5, 17, 3, 99]
    want = family.expected_logprobs("prompt_tuning_20", text)
    for name in ("first", "again"):
        add(engine, name, text, greedy(2, prompt_logprobs=2), soft_prompt=source)
        (first, *_) = run(engine)[name]
        check_logprobs(first.prompt_logprobs, text, want, num_top=2)
        assert torch.equal(engine.soft_prompts.rows(source), engine.soft_prompts.read(source))
