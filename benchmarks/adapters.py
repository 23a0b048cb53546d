"""Steps over LoRA adapters, against steps without them, PEFT's ``adapter_names`` and vLLM's ``enable_lora``.

    python -m benchmarks.adapters [--parts decode prefill mixed cold memory peers] [--vllm PYTHON]

A model of 135M shape with random weights, in the dtype that is fast on the machine; no prefix caching. Adapters have
rank 16 on all linear layers, except where stated. The ways of a part run in turn, several times, after one warm-up;
figures are medians of the rounds, and for the ratios per round their median, lower and upper quartile. Decodes have
an engine for each way, which keeps running: their turns are short, so that all ways meet the same load.

- ``decode``: steps of 64 decodes over 1, 16 and 64 adapters, and over 16 of rank 8 on ``q_proj`` and ``v_proj``,
  against the same steps without adapters. Beside it: the time to read the adapters' bytes from memory once;
- ``prefill``: one step of 16 texts of 64 tokens over 16 adapters, against the same without;
- ``mixed``: steps of 64 decodes, 16 of them bare, 16 over soft prompts, 16 over 8 adapters and 16 over pairs of both,
  against 64 bare ones;
- ``cold``: time to the first token of a text of 128 tokens, with an adapter that has to be read from its file and
  with one in memory;
- ``memory``: 1,024 requests over 512 adapters (rank 8 on ``q_proj`` and ``v_proj``) with memory for 64 of them,
  against the same requests over 64 adapters;
- ``peers``: 64 requests over 16 adapters, 64 new tokens each: our engine, PEFT's ``adapter_names`` over one padded
  batch, and vLLM in a separate environment (``make bench-vllm`` sets it up).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapter_parts.files import ATTENTION, AdapterFiles, write_adapter
from benchmarks.adapter_parts.peers import adapter_names_way, vllm_lora_way
from benchmarks.adapter_parts.steps import Request, decodes_way, reading_seconds, run_way
from benchmarks.peers.vllm_process import vllm_process
from benchmarks.ways import PAUSE_SECONDS, Way, default_dtype, machine, measure, medians
from benchmarks.workload import VOCABULARY, build_model, build_soft_prompts, soft_prompt_source
from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.stats import EngineStats
from server.engine.types import Member

NUM_DECODES = 64
NUM_SOFT_PROMPTS, VIRTUAL_TOKENS = 16, 20
PREFILL_TEXTS, PREFILL_TOKENS = 16, 64
COLD_TOKENS = 128
MANY_REQUESTS, MANY_ADAPTERS, ROOM = 1024, 512, 64
RANK = 16
TURN_PAUSE_SECONDS = 0.05
START_STEPS = 64
"""Steps in which texts may start, at most."""


@dataclass(frozen=True)
class Bench:
    """What all parts use.

    Attributes:
        arguments: The command's options.
        model_folder: The model.
        large: Rank 16 on all linear layers.
        small: Rank 8 on queries and values.
        soft_prompts: Folders of soft prompts.
    """

    arguments: argparse.Namespace
    model_folder: Path
    large: AdapterFiles
    small: AdapterFiles
    soft_prompts: list[Path]

    @property
    def dtype(self) -> torch.dtype:
        """The serving dtype."""
        dtype: torch.dtype = getattr(torch, self.arguments.dtype)
        return dtype

    def engine(self, **changes: Any) -> LLMEngine:
        """An engine without prefix caching: every round computes all texts."""
        settings: dict[str, Any] = {"dtype": self.arguments.dtype, "kv_cache_memory": 2 * 2**30}
        settings |= {"adapter_host_bytes": 4 * 2**30, "enable_prefix_caching": False} | changes
        settings.setdefault("adapter_device_bytes", settings["adapter_host_bytes"])
        return LLMEngine(EngineSettings(model=str(self.model_folder), **settings))


def texts(count: int, shortest: int, longest: int) -> list[list[int]]:
    """Random texts."""
    rng = random.Random(count)
    return [[rng.randrange(1, VOCABULARY) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def over(requests: Sequence[list[int]], files: AdapterFiles, count: int) -> list[Request]:
    """The texts over that many adapters in turn; 0 for none."""
    sources = [files.source(str(index)) for index in range(count)]
    return [
        (text, Member(adapter=sources[index % count]) if count else Member()) for index, text in enumerate(requests)
    ]


def compare(
    ways: dict[str, Way], rounds: int, first: str = "bare", *, pause: float = PAUSE_SECONDS
) -> dict[str, object]:
    """Run the ways in turn; returns their speeds, and the median and quartiles of their ratios to the first."""
    speeds = measure(ways, rounds, pause)
    ratios: dict[str, object] = {}
    for name in ways:
        if name != first:
            each = [one / other for one, other in zip(speeds[name], speeds[first], strict=True)]
            low, middle, high = statistics.quantiles(each, n=4)
            ratios[f"{name} over {first}"] = [round(value, 3) for value in (middle, low, high)]
    return {"median_tokens_per_second": medians(speeds), **ratios}


def decode(bench: Bench) -> dict[str, object]:
    """The part ``decode``."""
    given = texts(NUM_DECODES, 32, 128)
    requests = {
        "bare": over(given, bench.large, 0),
        **{f"{count} adapters": over(given, bench.large, count) for count in (1, 16, 64)},
        "16 adapters, rank 8, q and v": over(given, bench.small, 16),
    }
    figures, _ = decode_in_turns(bench, requests)
    nbytes = bench.large.nbytes(bench.dtype)
    return {
        **figures,
        "adapter_bytes": nbytes,
        "ms_to_read": {str(count): round(1000 * reading_seconds(count * nbytes), 2) for count in (1, 16, 64)},
    }


def decode_in_turns(
    bench: Bench, requests: dict[str, list[Request]]
) -> tuple[dict[str, object], dict[str, EngineStats]]:
    """Decode steps of each way's requests on an engine of its own, in short turns; their figures and statistics."""
    turns, steps = bench.arguments.turns, bench.arguments.steps
    with ExitStack() as stack:
        engines = {name: stack.enter_context(closing(bench.engine(kv_cache_memory=2**30))) for name in requests}
        ways = {
            name: decodes_way(engine, requests[name], steps, longest=(turns + 2) * steps + START_STEPS)
            for name, engine in engines.items()
        }
        figures = compare(ways, turns, pause=TURN_PAUSE_SECONDS)
        return figures, {name: engine.stats for name, engine in engines.items()}


def prefill(bench: Bench) -> dict[str, object]:
    """The part ``prefill``."""
    given = texts(PREFILL_TEXTS, PREFILL_TOKENS, PREFILL_TOKENS)
    with closing(bench.engine()) as engine:
        ways = {
            "bare": run_way(engine, over(given, bench.large, 0), 1),
            "16 adapters": run_way(engine, over(given, bench.large, 16), 1),
        }
        return compare(ways, bench.arguments.rounds)


def mixed(bench: Bench) -> dict[str, object]:
    """The part ``mixed``."""
    given = texts(NUM_DECODES, 32, 128)
    prompts = [soft_prompt_source(path, index, VIRTUAL_TOKENS) for index, path in enumerate(bench.soft_prompts)]
    adapters = [bench.large.source(str(index)) for index in range(8)]
    members: list[Member] = []
    for index in range(NUM_DECODES // 4):
        prompt, adapter = prompts[index % len(prompts)], adapters[index % len(adapters)]
        members += [Member(), Member(soft_prompt=prompt), Member(adapter=adapter)]
        members.append(Member(soft_prompt=prompt, adapter=adapter))
    figures, stats = decode_in_turns(
        bench, {"bare": over(given, bench.large, 0), "mixed": list(zip(given, members, strict=True))}
    )
    return {
        **figures,
        "distinct_adapters_in_one_step": stats["mixed"].max_batch_distinct_adapters,
        "distinct_soft_prompts_in_one_step": stats["mixed"].max_batch_distinct_prompts,
    }


def cold(bench: Bench) -> dict[str, object]:
    """The part ``cold``."""
    (text,) = texts(1, COLD_TOKENS, COLD_TOKENS)
    with closing(bench.engine()) as engine:
        seconds: dict[str, list[float]] = {"cold": [], "warm": []}
        for index in range(bench.arguments.cold_texts + 1):
            for kind, name in (("cold", f"cold{index}"), ("warm", "warm")):
                _, taken = run_way(engine, [(text, Member(adapter=bench.large.source(name)))], 1)()
                if index:  # the first round compiles, and reads the warm adapter
                    seconds[kind].append(taken)
    found = {f"{kind}_median_ms": round(1000 * statistics.median(values), 2) for kind, values in seconds.items()}
    ratios = [first / second for first, second in zip(seconds["cold"], seconds["warm"], strict=True)]
    return {**found, "cold over warm": round(statistics.median(ratios), 3)}


def memory(bench: Bench) -> dict[str, object]:
    """The part ``memory``."""
    given = texts(MANY_REQUESTS, 16, 32)
    random.Random(0).shuffle(given)
    nbytes = bench.small.nbytes(bench.dtype)
    with closing(bench.engine(adapter_host_bytes=ROOM * nbytes + nbytes // 2)) as engine:
        ways = {
            f"{ROOM} adapters": run_way(engine, over(given, bench.small, ROOM), 8),
            f"{MANY_ADAPTERS} adapters": run_way(engine, over(given, bench.small, MANY_ADAPTERS), 8),
        }
        figures = compare(ways, bench.arguments.rounds, f"{ROOM} adapters")
        stats = engine.stats.adapters
        return {
            **figures,
            "adapter_bytes": nbytes,
            "resident": stats.resident,
            "resident_bytes": stats.resident_bytes,
            "loads": stats.loads,
            "evictions": stats.evictions,
        }


def peers(bench: Bench) -> dict[str, object]:
    """The part ``peers``."""
    arguments = bench.arguments
    given = texts(NUM_DECODES, 32, 128)
    files = [bench.large] * 16
    with closing(bench.engine()) as engine:
        ways: dict[str, Way] = {"ours": run_way(engine, over(given, bench.large, 16), arguments.new_tokens)}
        ways["peft"] = adapter_names_way(bench.model_folder, files, given, arguments.new_tokens, arguments.dtype)
        if arguments.vllm is None:
            return compare(ways, arguments.rounds, "ours")
        process = vllm_process(
            arguments.vllm, bench.model_folder, arguments.dtype, max_num_seqs=NUM_DECODES, lora=(16, RANK)
        )
        with process as vllm:
            ways["vllm"] = vllm_lora_way(vllm, files, given, arguments.new_tokens)
            return {**compare(ways, arguments.rounds, "ours"), "vllm": vllm.facts}


PARTS: dict[str, Callable[[Bench], dict[str, object]]] = {
    "decode": decode,
    "prefill": prefill,
    "mixed": mixed,
    "cold": cold,
    "memory": memory,
    "peers": peers,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=25, help="of each way in the parts with decodes")
    parser.add_argument("--steps", type=int, default=4, help="decode steps in each turn")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each request in peers")
    parser.add_argument("--cold-texts", type=int, default=20)
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--vllm", type=Path, help="Python interpreter of an environment with vLLM")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures: dict[str, object] = {"machine": machine(), "dtype": arguments.dtype, "layers": arguments.layers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_folder = build_model(folder, layers=arguments.layers)
        bench = Bench(
            arguments,
            model_folder,
            write_adapter(model_folder, folder / "large", rank=RANK),
            write_adapter(model_folder, folder / "small", rank=8, targets=ATTENTION),
            build_soft_prompts(model_folder, folder, count=NUM_SOFT_PROMPTS, num_virtual_tokens=VIRTUAL_TOKENS),
        )
        for part in arguments.parts:
            print(f"-- {part}", flush=True)
            figures[part] = PARTS[part](bench)
            gc.collect()
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
