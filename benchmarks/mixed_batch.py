"""A mixed batch against PEFT's own way, in one run.

    python -m benchmarks.mixed_batch

64 requests over 16 soft prompts of 20 tokens (prompt tuning and prefix tuning in turn), texts of 32 to 128 tokens, 64
new tokens each, on a model of 135M shape with random weights in bfloat16. PEFT's way: one soft prompt is active at a
time, so requests are grouped by soft prompt and generated group after group (left-padded batches of 4; that they are
not exact is PEFT's, see docs/soft-prompts.md). Ours: all of them at once. Also measured: the same texts through our
engine without any soft prompt, which is what soft prompts would cost nothing against.

Each way runs in turn, several times, after one warm-up; the figure is the median of the ratios round by round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.workload import Text, build_model, build_soft_prompts, make_texts, soft_prompt_source
from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest
from server.engine.types import SamplingParams, SoftPromptSource


def make_peft_way(model_folder: Path, folders: list[Path], texts: list[Text], new_tokens: int) -> Callable[[], int]:
    """PEFT's generate, group after group; returns the number of new tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = []
    for folder in folders:
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).to(device)
        models.append(PeftModel.from_pretrained(base, folder).eval())
    groups = [[text.token_ids for text in texts if text.prompt == index] for index in range(len(folders))]

    def run() -> int:
        count = 0
        for model, group in zip(models, groups, strict=True):
            width = max(map(len, group))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in group], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in group], device=device)
            with torch.inference_mode():
                output = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False
                )
            count += (output.shape[1] - width) * len(group)
        return count

    return run


def make_engine_way(
    engine: LLMEngine, texts: list[Text], new_tokens: int, sources: list[SoftPromptSource] | None
) -> Callable[[], int]:
    """Our engine, everything at once; returns the number of new tokens."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    def run() -> int:
        for index, text in enumerate(texts):
            source = sources[text.prompt] if sources else None
            request = AddRequest(
                request_id=str(index), prompt_token_ids=text.token_ids, params=params, soft_prompt=source
            )
            refused = engine.add(request)
            if refused:
                raise RuntimeError(refused[0].error)
        count = 0
        while engine.num_unfinished:
            count += sum(len(output.token_ids) for output in engine.step())
        return count

    return run


def measure(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each way, round by round, in turn."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            count = run()
            speed = count / (time.perf_counter() - started)
            if number:  # the first is the warm-up
                speeds[name].append(speed)
            print(f"round {number}  {name:12s} {speed:8.1f} tokens/s", flush=True)
    return speeds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    texts = make_texts(arguments.requests, num_prompts=arguments.prompts, shortest=32, longest=128)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_folder = build_model(folder, layers=arguments.layers)
        virtual = arguments.virtual_tokens
        folders = build_soft_prompts(model_folder, folder, count=arguments.prompts, num_virtual_tokens=virtual)
        sources = [soft_prompt_source(path, index, virtual) for index, path in enumerate(folders)]
        # Without prefix caching, or every round after the first would find its texts computed.
        settings = EngineSettings(model=str(model_folder), dtype="bfloat16", enable_prefix_caching=False)
        engine = LLMEngine(settings)
        speeds = measure(
            {
                "peft": make_peft_way(model_folder, folders, texts, arguments.new_tokens),
                "mixed": make_engine_way(engine, texts, arguments.new_tokens, sources),
                "no prompts": make_engine_way(engine, texts, arguments.new_tokens, None),
            },
            arguments.rounds,
        )
        mixed_most = engine.stats.max_batch_distinct_prompts
        engine.close()
    over_peft = statistics.median(a / b for a, b in zip(speeds["mixed"], speeds["peft"], strict=True))
    over_bare = statistics.median(a / b for a, b in zip(speeds["mixed"], speeds["no prompts"], strict=True))
    figures = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "median_tokens_per_second": {key: round(statistics.median(values), 1) for key, values in speeds.items()},
        "mixed_over_peft": round(over_peft, 2),
        "mixed_over_no_prompts": round(over_bare, 3),
        "distinct_prompts_in_one_step": mixed_most,
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
