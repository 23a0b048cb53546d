"""Compare the engine vllm, behind the API, with vLLM's own ``LLM.generate``, in one run.

    python -m benchmarks.vllm_engine --vllm .venv-vllm/bin/python                     # first tokens
    python -m benchmarks.vllm_engine --vllm .venv-vllm/bin/python --part throughput

The model has 135M shape and random weights; prefix caching is off. ``first_tokens``: one request at a time asks for
one token, in turn with and without a soft prompt that is in host memory. ``throughput``: 64 requests over 16 soft
prompts of 20 tokens (alternately prompt tuning and prefix tuning), with texts of 32 to 128 tokens and 32 new tokens:

- ``served``: over HTTP, with soft prompts;
- ``served texts``: over HTTP, the same texts without soft prompts;
- ``longer``: ``LLM.generate`` with texts that are 20 tokens longer instead of soft prompts;
- ``texts``: ``LLM.generate`` with the texts alone.

The ways run in turn, several times, after one warm-up; the figures are medians of the ratios per round. Both parts
take some minutes on two cores, beside the compilation by vLLM, which it keeps for a ``--folder`` that stays.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

from benchmarks.peers.vllm_process import vllm_process
from benchmarks.server import BASE, build_served_model, serving, soft_prompt_files
from benchmarks.ways import Way, default_dtype, machine, measure, medians, ratio, vllm_way
from benchmarks.workload import VOCABULARY, Text, make_texts

TIMEOUT = 300.0
KV_CACHE_GIB = 2


def upload(url: str, count: int, *, layers: int, num_virtual_tokens: int) -> None:
    """Upload ``p0``, ``p1`` and so on, of both kinds in turn."""
    for index in range(count):
        config, weights = soft_prompt_files(
            index, layers=layers, num_virtual_tokens=num_virtual_tokens, is_prefix=bool(index % 2)
        )
        files = [("files", ("adapter_config.json", config)), ("files", ("adapter_model.safetensors", weights))]
        httpx.post(f"{url}/v1/prompts", data={"id": f"p{index}"}, files=files, timeout=TIMEOUT).raise_for_status()


def body(model: str, token_ids: list[int], new_tokens: int) -> dict[str, object]:
    """A greedy completion of exactly ``new_tokens`` tokens."""
    return {
        "model": model,
        "prompt": token_ids,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def served_way(url: str, texts: Sequence[Text], new_tokens: int, *, has_soft_prompts: bool) -> Way:
    """All texts at once over HTTP."""

    async def run() -> tuple[int, float]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as http:

            async def ask(text: Text) -> int:
                model = f"p{text.prompt}" if has_soft_prompts else BASE
                response = await http.post("/v1/completions", json=body(model, text.token_ids, new_tokens))
                return int(response.raise_for_status().json()["usage"]["completion_tokens"])

            began = time.perf_counter()
            counts = await asyncio.gather(*map(ask, texts))
            return sum(counts), time.perf_counter() - began

    return lambda: asyncio.run(run())


def first_token_times(url: str, models: Sequence[str], *, count: int, length: int) -> dict[str, list[float]]:
    """Seconds to the answer of one token, by model. All have the same texts, in turn; the first is not kept."""
    rng = random.Random(2)
    times: dict[str, list[float]] = {model: [] for model in models}
    with httpx.Client(base_url=url, timeout=TIMEOUT) as http:
        for number in range(count + 1):
            text = [rng.randrange(1, VOCABULARY) for _ in range(length)]
            for model in models:
                began = time.perf_counter()
                http.post("/v1/completions", json=body(model, text, 1)).raise_for_status()
                if number:
                    times[model].append(time.perf_counter() - began)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="Python interpreter of an environment with vLLM")
    parser.add_argument("--part", choices=("first_tokens", "throughput"), default="first_tokens")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--first-tokens", type=int, default=40, help="requests for one token, of each model")
    parser.add_argument("--first-token-length", type=int, default=64, help="tokens of their texts")
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--folder", type=Path, help="keep the model there; vLLM finds what it has compiled for it")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = build_served_model(folder, layers=arguments.layers)
        flags = ["--engine", "vllm", "--engine-python", str(arguments.vllm.absolute()), "--dtype", arguments.dtype]
        flags += ["--no-enable-prefix-caching", "--kv-cache-memory", f"{KV_CACHE_GIB}GiB", "--max-model-len", "2048"]
        flags += ["--max-num-seqs", str(arguments.requests)]
        store = stack.enter_context(tempfile.TemporaryDirectory())
        url = stack.enter_context(serving(model, Path(store) / "store", *flags))
        upload(url, arguments.prompts, layers=arguments.layers, num_virtual_tokens=arguments.virtual_tokens)
        figures = (
            throughput(arguments, model, url) if arguments.part == "throughput" else first_tokens(arguments, url)
        )
    print(json.dumps({"machine": machine(), "dtype": arguments.dtype} | figures, indent=2))


def throughput(arguments: argparse.Namespace, model: Path, url: str) -> dict[str, object]:
    """The speeds of the four ways, and their ratios."""
    texts = make_texts(arguments.requests, num_prompts=arguments.prompts, shortest=32, longest=128)
    new_tokens, num_seqs = arguments.new_tokens, arguments.requests
    with vllm_process(
        arguments.vllm, model, arguments.dtype, max_num_seqs=num_seqs, kv_cache_gib=KV_CACHE_GIB
    ) as alone:
        ways: dict[str, Way] = {
            "served": served_way(url, texts, new_tokens, has_soft_prompts=True),
            "longer": vllm_way(alone, texts, new_tokens, extra_tokens=arguments.virtual_tokens),
            "served texts": served_way(url, texts, new_tokens, has_soft_prompts=False),
            "texts": vllm_way(alone, texts, new_tokens, extra_tokens=0),
        }
        speeds = measure(ways, arguments.rounds)
    return {
        "median_tokens_per_second": medians(speeds),
        "served_over_longer": ratio(speeds, "served", "longer"),
        "served_texts_over_texts": ratio(speeds, "served texts", "texts"),
    }


def first_tokens(arguments: argparse.Namespace, url: str) -> dict[str, object]:
    """Times to the first token with a soft prompt of either kind, and over those without."""
    times = first_token_times(
        url, ["p0", "p1", BASE], count=arguments.first_tokens, length=arguments.first_token_length
    )
    first = {model: statistics.median(seconds) for model, seconds in times.items()}
    return {
        "first_token_of_embeddings_over_text": round(first["p0"] / first[BASE], 3),
        "first_token_of_key_values_over_text": round(first["p1"] / first[BASE], 3),
        "first_token_ms": {model: round(1000 * seconds, 1) for model, seconds in first.items()},
    }


if __name__ == "__main__":
    main()
