"""Measure the cost of different soft prompts in one batch, and the savings of a shared one.

    python -m benchmarks.prompt_tax [--parts distinct growing sharing] [--counts 1 16 256 4096]

The model has the 135M shape, but few layers and a small vocabulary, so that thousands of requests do not take hours
on a small machine. This overstates the cost of soft prompts, because the rest of a step is cheaper. Half of the soft
prompts are embeddings, which are computed once; the other half are keys and values, which are copied. Three parts:

- ``distinct``: 64 sequences with 64 different soft prompts of 20 tokens, against the same texts without soft prompts,
  and against texts that are 20 tokens longer and so attend to the same number of keys;
- ``growing``: 4,096 requests over 1, 16, 256 and 4,096 different soft prompts, each run with a new engine;
- ``sharing``: 64 sequences with one Cartridge of 1,024 tokens, against 64 copies under different digests: memory and
  time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.ways import default_dtype, engine_way, machine, measure, medians, ratio
from benchmarks.workload import HIDDEN_SIZE, KEY_VALUES_PER_LAYER, Text, build_model, make_texts
from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.types import SoftPromptSource

CARTRIDGE_TOKENS = 1024
VOCABULARY = 4096
PARTS = ("distinct", "growing", "sharing")


def random_prompts(folder: Path, count: int, layers: int, num_virtual_tokens: int = 20) -> list[SoftPromptSource]:
    """Random soft prompts, alternately embeddings and keys and values."""
    sources = []
    for index in range(count):
        width = layers * KEY_VALUES_PER_LAYER if index % 2 else HIDDEN_SIZE
        rows = np.random.default_rng(index).normal(0, 0.02, (num_virtual_tokens, width)).astype(np.float32)
        path = folder / f"tax{index}.safetensors"
        save_file({"prompt_embeddings": rows}, path)
        sources.append(
            SoftPromptSource(
                digest=path.stem,
                num_virtual_tokens=num_virtual_tokens,
                is_key_values=bool(index % 2),
                path=str(path),
            )
        )
    return sources


def cartridge(folder: Path, layers: int) -> SoftPromptSource:
    """A random Cartridge."""
    rows = np.random.default_rng(0).normal(0, 0.02, (CARTRIDGE_TOKENS, layers * KEY_VALUES_PER_LAYER))
    path = folder / "cartridge.safetensors"
    save_file({"prompt_embeddings": rows.astype(np.float32)}, path)
    return SoftPromptSource(
        digest="cartridge", num_virtual_tokens=CARTRIDGE_TOKENS, is_key_values=True, path=str(path)
    )


def copies_of(source: SoftPromptSource, count: int) -> list[SoftPromptSource]:
    """The same content under different digests, which the engine cannot recognize as equal."""
    return [
        SoftPromptSource(
            digest=f"{source.digest}{index}",
            num_virtual_tokens=source.num_virtual_tokens,
            is_key_values=source.is_key_values,
            path=source.path,
        )
        for index in range(count)
    ]


def distinct(
    settings: EngineSettings, texts: Sequence[Text], sources: Sequence[SoftPromptSource], new_tokens: int, rounds: int
) -> dict[str, object]:
    """Each text with a different soft prompt, against no soft prompts and against longer texts."""
    engine = LLMEngine(settings)
    longer = [Text([1] * 20 + text.token_ids, text.prompt) for text in texts]
    ways = {
        "different": engine_way(engine, texts, new_tokens, sources),
        "none": engine_way(engine, texts, new_tokens, None),
        "longer texts": engine_way(engine, longer, new_tokens, None),
    }
    speeds = measure(ways, rounds)
    engine.close()
    return {
        "tokens_per_second": medians(speeds),
        "different_over_none": ratio(speeds, "different", "none"),
        "different_over_longer_texts": ratio(speeds, "different", "longer texts"),
    }


def growing(
    settings: EngineSettings, sources: Sequence[SoftPromptSource], counts: Sequence[int], new_tokens: int, rounds: int
) -> dict[str, object]:
    """One request per source, over each number of different soft prompts in turn, each with a new engine."""
    texts = make_texts(len(sources), num_prompts=len(sources), shortest=32, longest=128, vocab_size=VOCABULARY)
    speeds: dict[str, list[float]] = {str(count): [] for count in counts}
    for number in range(rounds):
        for count in counts:
            engine = LLMEngine(settings)
            dealt = [dataclasses.replace(text, prompt=text.prompt % count) for text in texts]
            tokens, seconds = engine_way(engine, dealt, new_tokens, sources)()
            engine.close()
            speeds[str(count)].append(tokens / seconds)
            print(f"round {number}  {count:5d} soft prompts {tokens / seconds:8.1f} tokens/s", flush=True)
    least, most = str(min(counts)), str(max(counts))
    return {"tokens_per_second": medians(speeds), f"{most}_over_{least}": ratio(speeds, most, least)}


def sharing(settings: EngineSettings, folder: Path, layers: int, new_tokens: int) -> dict[str, object]:
    """64 sequences with one Cartridge, against 64 copies of it."""
    texts = make_texts(64, num_prompts=64, shortest=32, longest=64, vocab_size=VOCABULARY)
    source = cartridge(folder, layers)
    result: dict[str, object] = {}
    for name, sources in (("shared", [source] * 64), ("copies", copies_of(source, 64))):
        engine = LLMEngine(dataclasses.replace(settings, kv_cache_memory=8 * 2**30))
        started = time.perf_counter()
        tokens, seconds = engine_way(engine, texts, new_tokens, sources)()
        stats = engine.stats
        result[name] = {
            "soft_prompt_MiB": round(stats.soft_prompt_bytes / 2**20, 1),
            "seconds": round(time.perf_counter() - started, 1),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        engine.close()
        print(name, result[name], flush=True)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--requests", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--counts", nargs="+", type=int, help="numbers of soft prompts (default: 1, 16, 256, and one per request)"
    )
    arguments = parser.parse_args()
    counts = arguments.counts or (1, 16, 256, arguments.requests)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model(folder, layers=arguments.layers, vocab_size=VOCABULARY)
        sources = random_prompts(folder, arguments.requests, arguments.layers)
        settings = EngineSettings(model=str(model), dtype=arguments.dtype, enable_prefix_caching=False)
        texts = make_texts(64, num_prompts=64, shortest=32, longest=128, vocab_size=VOCABULARY)
        new_tokens, rounds = arguments.new_tokens, arguments.rounds
        figures: dict[str, object] = {"machine": f"{machine()}, {arguments.dtype}, {arguments.layers} layers"}
        if "distinct" in arguments.parts:
            figures["64 different"] = distinct(settings, texts, sources[:64], new_tokens, rounds)
        if "growing" in arguments.parts:
            figures[f"{len(sources)} requests"] = growing(settings, sources, counts, new_tokens, max(1, rounds - 1))
        if "sharing" in arguments.parts:
            figures["cartridge"] = sharing(settings, folder, arguments.layers, new_tokens)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
