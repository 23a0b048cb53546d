"""Held-out accuracy in the server's engine: with a soft prompt, without one, and with a written instruction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scripts.demo_build.grammar import TASKS
from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.types import GenerateRequest, SamplingParams, SoftPromptSource

MAX_TOKENS = 48


def source_of(folder: Path) -> SoftPromptSource:
    """The soft prompt in a folder that PEFT has written."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return SoftPromptSource(
        digest=folder.name,
        num_virtual_tokens=config["num_virtual_tokens"],
        is_key_values=config["peft_type"] == "PREFIX_TUNING",
        path=str(folder / "adapter_model.safetensors"),
    )


def accuracy(
    engine: LLMEngine,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[dict[str, str]],
    source: SoftPromptSource | None,
    max_tokens: int = MAX_TOKENS,
) -> float:
    """The share of inputs with the exact answer, by greedy decoding."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    answers: dict[str, list[int]] = {str(index): [] for index in range(len(pairs))}
    for index, pair in enumerate(pairs):
        ids = tokenizer.encode(pair["input"], add_special_tokens=False)
        engine.add(GenerateRequest(request_id=str(index), prompt_token_ids=ids, params=params, soft_prompt=source))
    while engine.num_unfinished:
        for output in engine.step():
            answers[output.request_id] += output.token_ids
    right = sum(
        str(tokenizer.decode(answers[str(index)], skip_special_tokens=True)).strip() == pair["output"]
        for index, pair in enumerate(pairs)
    )
    return right / len(pairs)


def evaluate(model_folder: Path, soft_prompts: Path, heldout: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by dtype, task and condition (``without``, ``in_words``, ``with``)."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in ("float32", "bfloat16"):
        engine = LLMEngine(EngineSettings(model=str(model_folder), dtype=dtype, kv_cache_memory=256 * 2**20))
        for task, grammar in TASKS.items():
            pairs = [json.loads(line) for line in (heldout / f"{task}.jsonl").read_text().splitlines()]
            instructed = [{**pair, "input": f"{grammar.instructions[0]}\n{pair['input']}"} for pair in pairs]
            row = {
                "without": accuracy(engine, tokenizer, pairs, None),
                "in_words": accuracy(engine, tokenizer, instructed, None),
            }
            if (soft_prompts / task).exists():
                row["with"] = accuracy(engine, tokenizer, pairs, source_of(soft_prompts / task))
            figures.setdefault(dtype, {})[task] = {key: round(value, 4) for key, value in row.items()}
            print(dtype, task, figures[dtype][task], flush=True)
        engine.close()
    return figures
