"""Six kinds of adapters on every family of models, in one batch: greedy tokens equal PEFT's own at batch 1."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from server.config import EngineSettings
from server.engine.model.model_runner import ModelRunner
from server.engine.model.soft_prompts import SoftPromptLoader
from tests.support.engine.adapters import Text, generate, make_adapters, reader_of
from tests.support.engine.families import FAMILIES, LESS_COMMON
from tests.support.engine.harness import ALL_PEFT_CONFIGS, CONFIGS, MORE_CONFIGS, make_family, random_text

pytestmark = pytest.mark.slow

MAX_TOKENS = 8
SOFT_PROMPTS = ("prompt_tuning_8", "p_tuning_7", "prefix_13", "multitask_6", "cpt_9", "cartridge_14")
MODELS = CONFIGS | MORE_CONFIGS | FAMILIES | LESS_COMMON


@pytest.mark.parametrize("name", MODELS)
def test_adapters_and_pairs_beside_bare_rows_equal_peft(name: str, tmp_path: Path) -> None:
    peft_configs = {key: ALL_PEFT_CONFIGS[key] for key in SOFT_PROMPTS}
    family, rng = make_family(name, tmp_path, peft_configs, MODELS[name]()), random.Random(name)
    adapted = make_adapters(family, tmp_path)
    settings = EngineSettings(model=str(family.path), dtype="float32", kv_cache_memory=2**25, block_size=4)
    runner = ModelRunner(settings)
    reader = reader_of(runner)
    info = runner.info
    loader = SoftPromptLoader(
        embedding_width=info.embedding_width,
        key_values_width=info.num_layers * 2 * info.num_kv_heads * info.head_dim,
        head_width=info.embedding_width,
        dtype=runner.dtype,
        budget_bytes=0,
    )
    weights = {kind: reader.read(source) for kind, source in adapted.sources.items()}
    texts, expected = {}, {}
    for kind in [None, *weights]:
        for soft_prompt in [None, *family.soft_prompts]:
            token_ids = random_text(rng, 3, 20)
            text = Text(token_ids, None if kind is None else weights[kind])
            source = family.source(soft_prompt)
            if source is not None:
                rows = loader.read(source)
                text.rows, text.key_values = (None, rows) if source.is_key_values else (rows, None)
            texts[kind, soft_prompt] = text
            expected[kind, soft_prompt] = adapted.expected(kind, token_ids, MAX_TOKENS, soft_prompt)
    order = list(texts)
    rng.shuffle(order)
    answers = generate(runner, [texts[key] for key in order], MAX_TOKENS)
    assert dict(zip(order, answers, strict=True)) == {key: expected[key] for key in order}
    bare = {kind: adapted.expected(kind, [5, 6, 7, 8], MAX_TOKENS) for kind in [None, *weights]}
    assert len({tuple(answer) for answer in bare.values()}) >= len(bare) - 2, "most adapters change nothing"
