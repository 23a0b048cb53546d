"""Tiny random models of more families than every engine test needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    Cohere2Config,
    CohereConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from tests.support.engine.harness import CONTEXT, SHAPE, VOCABULARY

UNTIED: dict[str, Any] = {**SHAPE, "tie_word_embeddings": False}  # a random tied model repeats its last token
MIXED: dict[str, Any] = {
    "sliding_window": 11,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "init_std": 0.25,
    "dropout": 0.0,
    "tie_word_embeddings": False,
    **NO_TOKENS,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "cohere": lambda: CohereConfig(**UNTIED, use_qk_norm=True, logit_scale=1.0),
    "cohere2": lambda: Cohere2Config(**UNTIED, **MIXED, logit_scale=1.0),
    "gemma": lambda: GemmaConfig(**UNTIED, head_dim=16),
    "gpt_bigcode": lambda: GPTBigCodeConfig(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=48,
        n_layer=3,
        n_head=4,
        initializer_range=0.25,
        tie_word_embeddings=False,
        **NO_TOKENS,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **{key: value for key, value in UNTIED.items() if key != "num_key_value_heads"},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "gpt_oss": lambda: GptOssConfig(**UNTIED, **MIXED, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "granite": lambda: GraniteConfig(
        **UNTIED, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.7, attention_multiplier=0.2
    ),
    "mixtral": lambda: MixtralConfig(**UNTIED, num_local_experts=4),
    "olmo2": lambda: Olmo2Config(**UNTIED),
    "olmo3": lambda: Olmo3Config(**UNTIED, **MIXED),
    "opt": lambda: OPTConfig(**OPT),
    "opt_projected": lambda: OPTConfig(**OPT, word_embed_proj_dim=24, do_layer_norm_before=False),
    "phi": lambda: PhiConfig(**UNTIED, qk_layernorm=True),
    "phi3": lambda: Phi3Config(**UNTIED, sliding_window=11),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **{**UNTIED, "head_dim": 16}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40
    ),
    "smollm3": lambda: SmolLM3Config(**UNTIED, no_rope_layers=[1, 0, 1]),
    "stablelm": lambda: StableLmConfig(
        **UNTIED,
        qk_layernorm=True,
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "starcoder2": lambda: Starcoder2Config(**UNTIED, sliding_window=11),
}
LESS_COMMON: dict[str, Callable[[], PreTrainedConfig]] = {
    "ernie4_5": lambda: Ernie4_5Config(**UNTIED),
    "exaone4": lambda: Exaone4Config(**UNTIED, **MIXED),
    "gemma4": lambda: Gemma4TextConfig(
        **{
            **UNTIED,
            **MIXED,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "head_dim": 16,
            "global_head_dim": 16,
        },
        hidden_size_per_layer_input=0,
    ),
    "glm4": lambda: Glm4Config(**UNTIED, head_dim=16),
    "glm4_moe": lambda: Glm4MoeConfig(
        **{**UNTIED, "head_dim": 16},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "granitemoe": lambda: GraniteMoeConfig(
        **UNTIED,
        num_local_experts=4,
        num_experts_per_tok=2,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.2,
    ),
    "seed_oss": lambda: SeedOssConfig(**UNTIED, head_dim=16),
}
"""Families whose tokens, but not logprobs, are compared with PEFT's."""
