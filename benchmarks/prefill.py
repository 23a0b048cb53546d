"""Long inputs, short answers: hundreds of tokens in, a few out, as in classification and extraction.

    python -m benchmarks.prefill [--parts throughput first-token steps layouts] [--vllm PYTHON]

A model of 135M shape with random weights and 2,048 positions, in the dtype that is fast on the machine; soft prompts
of 20 tokens, alternately prompt tuning and prefix tuning; no prefix caching. The alternatives of each part run in
turn, several times, after one warm-up. Figures are medians of the rounds, and medians of the ratios per round. Four
parts:

- ``throughput``: our engine with 8 and with 16 soft prompts and without any, PEFT's generate group by group,
  transformers' generate over one padded batch, and vLLM. A mixed load of 32 requests with texts of 256 to 768 tokens
  and 8 new tokens, then texts of one length: each combination of ``--lengths``, ``--new-tokens`` and ``--requests``;
- ``first-token``: time to the first token of a text of 512 tokens, alone and beside 32 running decodes, and the time
  between tokens of those decodes while such texts arrive one after another. Texts are added between two steps, in
  Prelude and in vLLM;
- ``steps``: a prefill step of 4 texts of 512 tokens, and of 1 text of 1,900, against its bare products (the
  vocabulary head on the sampled rows only), and against the processor's peak, measured with a large square product;
- ``layouts``: products of the model's shapes with weights packed for several numbers of rows, by ``torch.mm`` and
  ``F.linear``, and in pieces. CPU only.

vLLM gets texts that are longer by the number of virtual tokens. ``make bench-vllm`` sets up its environment.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.peers.vllm_process import VllmProcess, vllm_process
from benchmarks.prefill_parts import first_token, layouts, steps, throughput
from benchmarks.prefill_parts.first_token import Stream
from benchmarks.prefill_parts.throughput import PROMPT_COUNTS, Load
from benchmarks.ways import PAUSE_SECONDS, Contenders, default_dtype, machine
from benchmarks.workload import build_model, build_soft_prompts, soft_prompt_source
from server.config import EngineSettings
from server.engine.cpu.packed_linear import can_pack
from server.engine.llm_engine import LLMEngine

PARTS = ("throughput", "first-token", "steps", "layouts")
MIXED_NEW_TOKENS = 8
KV_CACHE_GIB = 4
"""Holds 32 sequences of 1,928 positions in float32."""


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause", type=float, default=PAUSE_SECONDS, help="seconds before each way of throughput")
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--vllm", type=Path, help="Python interpreter of an environment with vLLM")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    group = parser.add_argument_group("throughput")
    group.add_argument("--mixed-requests", type=int, default=32, help="requests of the mixed load; 0 leaves it out")
    group.add_argument("--mixed-lengths", nargs=2, type=int, default=(256, 768), metavar=("SHORTEST", "LONGEST"))
    group.add_argument(
        "--lengths", nargs="*", type=int, default=(128, 512, 1024, 1900), help="none: no fixed lengths"
    )
    group.add_argument("--new-tokens", nargs="+", type=int, default=(1, 8))
    group.add_argument("--requests", nargs="+", type=int, default=(1, 8, 32))
    group.add_argument(
        "--peft", type=int, default=768, metavar="LENGTH", help="longest text for which PEFT runs; 0: never"
    )
    group = parser.add_argument_group("first-token")
    group.add_argument("--text-length", type=int, default=512)
    group.add_argument("--texts", type=int, default=20, help="texts in each round")
    group.add_argument("--decodes", type=int, default=32, help="running decodes")
    group.add_argument("--steps-between", type=int, default=8, help="steps between a text's token and the next text")
    group.add_argument(
        "--limits", nargs="*", type=int, default=(), help="values of --max-num-batched-tokens to compare with 2048"
    )
    group = parser.add_argument_group("steps")
    group.add_argument(
        "--steps", nargs="+", type=_texts, default=((4, 512), (1, 1900)), metavar="TEXTSxTOKENS", help="e.g. 4x512"
    )
    group = parser.add_argument_group("layouts")
    group.add_argument("--rows", nargs="+", type=int, default=layouts.ROWS)
    return parser.parse_args()


def measure_throughput(contenders: Contenders, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """The part ``throughput``."""
    shortest, longest = arguments.mixed_lengths
    mixed = Load(arguments.mixed_requests, shortest, longest, MIXED_NEW_TOKENS)
    return [
        throughput.compare(
            contenders, load, arguments.rounds, peft=load.longest <= arguments.peft, pause=arguments.pause
        )
        for load in throughput.loads(mixed, arguments.requests, arguments.lengths, arguments.new_tokens)
        if load.requests
    ]


def measure_engines(arguments: argparse.Namespace, folder: Path, figures: dict[str, object]) -> None:
    """All parts but ``layouts``; adds to the figures."""
    parts, dtype, virtual = arguments.parts, arguments.dtype, arguments.virtual_tokens
    model_folder = build_model(folder, layers=arguments.layers)
    folders = build_soft_prompts(model_folder, folder, count=max(PROMPT_COUNTS), num_virtual_tokens=virtual)
    sources = [soft_prompt_source(path, index, virtual) for index, path in enumerate(folders)]
    settings = EngineSettings(
        model=str(model_folder), dtype=dtype, enable_prefix_caching=False, kv_cache_memory=KV_CACHE_GIB * 2**30
    )
    figures["max_num_batched_tokens"] = settings.max_num_batched_tokens
    engine = LLMEngine(settings)

    def start_vllm(part: str, stack: ExitStack, max_num_seqs: int, *, steps_on_call: bool) -> VllmProcess | None:
        if arguments.vllm is None:
            return None
        process = vllm_process(
            arguments.vllm,
            model_folder,
            dtype,
            max_num_seqs=max_num_seqs,
            kv_cache_gib=KV_CACHE_GIB,
            steps_on_call=steps_on_call,
        )
        vllm = stack.enter_context(process)
        figures[f"vllm in {part}"] = vllm.facts
        print(f"vLLM: {vllm.facts}", flush=True)
        return vllm

    if "throughput" in parts:
        with ExitStack() as stack:
            vllm = start_vllm(
                "throughput", stack, max(arguments.mixed_requests, *arguments.requests), steps_on_call=False
            )
            contenders = Contenders(model_folder, dtype, engine, folders, sources, vllm)
            figures["throughput"] = measure_throughput(contenders, arguments)
    if "first-token" in parts:
        with ExitStack() as stack:
            stream = Stream(
                arguments.text_length, arguments.texts, arguments.decodes, arguments.steps_between, arguments.limits
            )
            vllm = start_vllm("first-token", stack, arguments.decodes + 1, steps_on_call=True)
            figures["first_token"] = first_token.compare(engine, sources, vllm, stream, arguments.rounds)
    if "steps" in parts:
        figures["steps"] = [
            steps.compare(engine, count, length, arguments.rounds) for count, length in arguments.steps
        ]
    engine.close()


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    names = ("dtype", "layers", "virtual_tokens", "rounds")
    figures: dict[str, object] = {"machine": machine(), **{name: getattr(arguments, name) for name in names}}
    print(", ".join(f"{name}: {value}" for name, value in figures.items()), flush=True)
    if set(arguments.parts) - {"layouts"}:
        with tempfile.TemporaryDirectory() as name:
            measure_engines(arguments, Path(name), figures)
    if "layouts" in arguments.parts and can_pack(dtype):
        figures["layouts"] = layouts.compare(dtype, arguments.layers, arguments.rows, arguments.rounds)
    elif "layouts" in arguments.parts:
        print(f"layouts: oneDNN has no packed products in {arguments.dtype} here")
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def _texts(value: str) -> tuple[int, int]:
    count, length = value.split("x")
    return int(count), int(length)


if __name__ == "__main__":
    main()
