"""Compare a mixed batch with PEFT's generate, transformers' padded batch and vLLM, in one run.

    python -m benchmarks.mixed_batch [--vllm PYTHON]

64 requests over 16 soft prompts of 20 tokens (alternately prompt tuning and prefix tuning), with texts of 32 to 128
tokens and 64 new tokens each, on a model of 135M shape with random weights, in the dtype that is fast on the machine:

- ``mixed``: our engine, all requests in one batch;
- ``no prompts``: our engine with the same texts without soft prompts;
- ``peft``: PEFT's generate. One soft prompt is active at a time, so the requests run group by group (left-padded
  batches of 4; these are inexact in PEFT, see docs/soft-prompts.md);
- ``padded``: transformers' generate over one padded batch of all the texts, without soft prompts;
- ``vllm``: vLLM's build for this device in a separate environment, with texts that are 20 tokens longer and without
  prefix caching. ``make bench-vllm`` sets it up.

The same alternatives then run a load of long inputs and short answers: 32 requests over 8 soft prompts, with texts of
256 to 768 tokens and 8 new tokens each. The figures are under ``long_input``; ``benchmarks.prefill`` has more.

The alternatives run in turn, several times, after one warm-up; the figures are medians of the ratios per round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.peers.vllm_process import vllm_process
from benchmarks.ways import Contenders, Way, default_dtype, machine, measure, medians, ratio
from benchmarks.workload import Text, build_model, build_soft_prompts, make_texts, soft_prompt_source
from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine

LONG_PROMPTS, LONG_NEW_TOKENS = 8, 8


def compare(contenders: Contenders, texts: Sequence[Text], new_tokens: int, rounds: int) -> dict[str, object]:
    """Run the alternatives in turn; returns their median speeds, and the ratios of ``mixed`` to the others."""
    print(f"-- {len(texts)} requests, {new_tokens} new tokens each", flush=True)
    ways: dict[str, Way] = {"mixed": contenders.with_soft_prompts(texts, new_tokens)}
    ways |= contenders.others(texts, new_tokens)
    speeds = measure(ways, rounds)
    return {
        "median_tokens_per_second": medians(speeds),
        **{f"mixed_over_{name.replace(' ', '_')}": ratio(speeds, "mixed", name) for name in ways if name != "mixed"},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--long-requests", type=int, default=32, help="requests of the long-input load")
    parser.add_argument(
        "--long-lengths", nargs=2, type=int, default=(256, 768), metavar=("SHORTEST", "LONGEST"), help="of its texts"
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--vllm", type=Path, help="Python interpreter of an environment with vLLM")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    texts = make_texts(arguments.requests, num_prompts=arguments.prompts, shortest=32, longest=128)
    shortest, longest = arguments.long_lengths
    long_texts = make_texts(
        arguments.long_requests,
        num_prompts=min(LONG_PROMPTS, arguments.prompts),
        shortest=shortest,
        longest=longest,
    )
    dtype = arguments.dtype
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model_folder = build_model(folder, layers=arguments.layers)
        virtual = arguments.virtual_tokens
        folders = build_soft_prompts(model_folder, folder, count=arguments.prompts, num_virtual_tokens=virtual)
        sources = [soft_prompt_source(path, index, virtual) for index, path in enumerate(folders)]
        # With prefix caching, every round after the first would find its texts computed.
        engine = LLMEngine(
            EngineSettings(
                model=str(model_folder), dtype=dtype, enable_prefix_caching=False, kv_cache_memory=2 * 2**30
            )
        )
        vllm = None
        if arguments.vllm:
            most = max(arguments.requests, arguments.long_requests)
            vllm = stack.enter_context(vllm_process(arguments.vllm, model_folder, dtype, max_num_seqs=most))
        contenders = Contenders(model_folder, dtype, engine, folders, sources, vllm)
        figures = {
            "machine": machine(),
            "dtype": dtype,
            **compare(contenders, texts, arguments.new_tokens, arguments.rounds),
            "distinct_prompts_in_one_step": engine.stats.max_batch_distinct_prompts,
            "long_input": compare(contenders, long_texts, LONG_NEW_TOKENS, arguments.rounds),
        }
        engine.close()
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
