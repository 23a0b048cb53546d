"""Ways to generate the same tokens, run side by side: our engine, PEFT, transformers and vLLM."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.peers.vllm_process import VllmProcess
from benchmarks.workload import Text
from server.engine.cpu.packed_linear import has_fast_bfloat16
from server.engine.llm_engine import LLMEngine
from server.engine.types import GenerateRequest, SamplingParams, SoftPromptSource

Way = Callable[[], tuple[int, float]]
"""Runs all the work once; returns the number of new tokens and the duration in seconds."""

PAUSE_SECONDS = 2.0
"""Pause before each way; threads of the previous one may still spin for a while."""


def default_dtype() -> Literal["float32", "bfloat16"]:
    """The dtype that is fast on this machine."""
    return "bfloat16" if torch.cuda.is_available() or has_fast_bfloat16() else "float32"


def machine() -> str:
    """A description of the machine, for the figures."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def timed(run: Callable[[], int]) -> Way:
    """Make a way from a function that returns the number of new tokens."""

    def way() -> tuple[int, float]:
        started = time.perf_counter()
        count = run()
        return count, time.perf_counter() - started

    return way


def peft_way(model_folder: Path, folders: Sequence[Path], texts: Sequence[Text], new_tokens: int, dtype: str) -> Way:
    """PEFT's generate, group by group: one soft prompt is active at a time, and a model holds one type of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: dict[str, PeftModel] = {}
    types = [PeftConfig.from_pretrained(str(folder)).peft_type for folder in folders]
    for index, (folder, kind) in enumerate(zip(folders, types, strict=True)):
        if kind in models:
            models[kind].load_adapter(folder, adapter_name=str(index))
        else:
            base: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
            models[kind] = PeftModel.from_pretrained(base.to(device), str(folder), adapter_name=str(index)).eval()
    groups = [[text.token_ids for text in texts if text.prompt == index] for index in range(len(folders))]

    def run() -> int:
        count = 0
        for index, (group, kind) in enumerate(zip(groups, types, strict=True)):
            models[kind].set_adapter(str(index))
            count += generate(models[kind], group, new_tokens)
        return count

    return timed(run)


def padded_way(model_folder: Path, texts: Sequence[Text], new_tokens: int, dtype: str) -> Way:
    """All texts in one padded batch of transformers' generate, without soft prompts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    model.to(device).eval()
    return timed(lambda: generate(model, [text.token_ids for text in texts], new_tokens))


def engine_way(
    engine: LLMEngine, texts: Sequence[Text], new_tokens: int, sources: Sequence[SoftPromptSource] | None
) -> Way:
    """Our engine, with all texts submitted at once; ``Text.prompt`` is an index into ``sources``."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    def run() -> int:
        for index, text in enumerate(texts):
            source = sources[text.prompt] if sources else None
            request = GenerateRequest(
                request_id=str(index), prompt_token_ids=text.token_ids, params=params, soft_prompt=source
            )
            refused = engine.add(request)
            if refused:
                raise RuntimeError(refused[0].failure)
        count = 0
        while engine.num_unfinished:
            count += sum(len(output.token_ids) for output in engine.step())
        return count

    return timed(run)


def vllm_way(vllm: VllmProcess, texts: Sequence[Text], new_tokens: int, *, extra_tokens: int) -> Way:
    """vLLM; ``extra_tokens`` stand in for a soft prompt."""
    prompts = [[1 + index % 1000 for index in range(extra_tokens)] + text.token_ids for text in texts]
    task = vllm.generate_task(prompts, new_tokens)

    def way() -> tuple[int, float]:
        count, seconds = vllm.perform(task)
        return count, seconds

    return way


@dataclass(frozen=True)
class Contenders:
    """What the ways to serve one model need.

    Attributes:
        model_folder: The model.
        dtype: Of its weights.
        engine: Our engine with this model, without prefix caching: every round computes all texts.
        folders: Soft prompts in PEFT's format.
        sources: The same soft prompts for the engine.
        vllm: vLLM with this model; None to leave it out.
    """

    model_folder: Path
    dtype: str
    engine: LLMEngine
    folders: Sequence[Path]
    sources: Sequence[SoftPromptSource]
    vllm: VllmProcess | None

    def with_soft_prompts(self, texts: Sequence[Text], new_tokens: int) -> Way:
        """Our engine, with the soft prompts of the texts."""
        return engine_way(self.engine, texts, new_tokens, self.sources)

    def others(self, texts: Sequence[Text], new_tokens: int, *, peft: bool = True) -> dict[str, Way]:
        """The ways to compare with: ``no prompts``, ``peft``, ``padded`` and ``vllm``."""
        ways = {"no prompts": engine_way(self.engine, texts, new_tokens, None)}
        if peft:
            used = self.folders[: 1 + max(text.prompt for text in texts)]
            ways["peft"] = peft_way(self.model_folder, used, texts, new_tokens, self.dtype)
        ways["padded"] = padded_way(self.model_folder, texts, new_tokens, self.dtype)
        if self.vllm is not None:
            ways["vllm"] = vllm_way(self.vllm, texts, new_tokens, extra_tokens=self.sources[0].num_virtual_tokens)
        return ways


def lasting(way: Way, seconds: float) -> Way:
    """Repeat a way until its runs took ``seconds`` together: one short run says little."""

    def repeated() -> tuple[int, float]:
        count, duration = way()
        while duration < seconds:
            more, longer = way()
            count, duration = count + more, duration + longer
        return count, duration

    return repeated


def measure(ways: dict[str, Way], rounds: int, pause: float = PAUSE_SECONDS) -> dict[str, list[float]]:
    """Run the ways in turn, after one warm-up round; returns tokens per second of each way by round."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            time.sleep(pause)
            count, seconds = way()
            if number:  # round 0 is the warm-up
                speeds[name].append(count / seconds)
            print(f"round {number}  {name:12s} {count / seconds:8.1f} tokens/s", flush=True)
    return speeds


def ratio(speeds: dict[str, list[float]], first: str, second: str) -> float:
    """The median over the rounds of the first way's speed divided by the second's."""
    return round(statistics.median(a / b for a, b in zip(speeds[first], speeds[second], strict=True)), 3)


def medians(speeds: dict[str, list[float]]) -> dict[str, float]:
    """Median tokens per second of each way."""
    return {name: round(statistics.median(values), 1) for name, values in speeds.items()}


def generate(model: Any, group: Sequence[Sequence[int]], new_tokens: int, **arguments: Any) -> int:
    """Generate greedily over one left-padded batch of transformers; returns the number of new tokens."""
    device = next(model.parameters()).device
    width = max(map(len, group))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in group], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in group], device=device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **arguments
        )
    return int((output.shape[1] - width) * len(group))
