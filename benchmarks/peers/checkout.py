"""The process of one checkout in ``benchmarks.two_checkouts``; it runs that checkout's code.

Reads the name of a work from each line of standard input, runs it, and prints a line ``{"seconds": ...}``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.bulk import write_rows
from benchmarks.server import serving
from benchmarks.ways import default_dtype, engine_way
from benchmarks.workload import build_model, build_soft_prompts, make_texts, soft_prompt_source
from server.config import EngineSettings
from server.demo.tour import MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY
from server.engine.llm_engine import LLMEngine

REQUESTS, PROMPTS, VIRTUAL_TOKENS, NEW_TOKENS, LAYERS = 64, 16, 20, 32, 12
ROWS = 4000
PRELUDE = [sys.executable, "-c", "from server.cli import main; main()"]

Work = Mapping[str, Callable[[], float]]
"""Functions by name of the work; each returns its duration in seconds."""


def mixed_work(folder: Path, stack: ExitStack) -> Work:
    """The mixed batch, and the same texts without soft prompts."""
    torch.manual_seed(0)
    texts = make_texts(REQUESTS, num_prompts=PROMPTS, shortest=32, longest=128)
    model = build_model(folder, layers=LAYERS)
    folders = build_soft_prompts(model, folder, count=PROMPTS, num_virtual_tokens=VIRTUAL_TOKENS)
    sources = [soft_prompt_source(path, index, VIRTUAL_TOKENS) for index, path in enumerate(folders)]
    settings = EngineSettings(
        model=str(model), dtype=default_dtype(), enable_prefix_caching=False, kv_cache_memory=2**30
    )
    engine = LLMEngine(settings)
    stack.callback(engine.close)
    mixed, bare = engine_way(engine, texts, NEW_TOKENS, sources), engine_way(engine, texts, NEW_TOKENS, None)
    return {"mixed": lambda: mixed()[1], "bare": lambda: bare()[1]}


def bulk_work(folder: Path, stack: ExitStack) -> Work:
    """Rows of texts through ``prelude run``, with new texts in each run."""
    flags = ["--no-enable-prefix-caching", "--allow-other-base"]
    url = stack.enter_context(serving(MODEL_DIRECTORY, folder / "store", *flags))
    push = [*PRELUDE, "push", str(SOFT_PROMPTS_DIRECTORY / "sentiment"), "--id", "sentiment", "--url", url]
    subprocess.run(push, check=True, stdout=subprocess.DEVNULL)
    seeds = iter(range(1_000_000))

    def run() -> float:
        seed = next(seeds)
        source, output = folder / f"{seed}.jsonl", folder / f"{seed}.out.jsonl"
        write_rows(source, ROWS, seed)
        command = [*PRELUDE, "run", "sentiment", str(source), str(output), "--max-tokens", "2", "--url", url]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - started

    return {"bulk": run}


def main() -> None:
    """Run each requested work until the input ends."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        make = {"mixed": mixed_work, "bulk": bulk_work}[sys.argv[1]]
        work = make(Path(name), stack)
        for line in sys.stdin:
            print(json.dumps({"seconds": work[line.strip()]()}), flush=True)


if __name__ == "__main__":
    main()
