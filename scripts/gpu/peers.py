"""The same work by transformers: continuous batching, and one padded batch over a static cache."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import GenerationConfig

from benchmarks.prefill_parts.first_token import EngineStepper
from scripts.gpu.device import release, synchronise
from scripts.gpu.driving import text
from scripts.gpu.models import Scale, draw_model, serving
from scripts.gpu.results import Results


def run(results: Results, scale: Scale) -> None:
    """Measure all ways; a way that fails does not stop the others.

    Raises:
        RuntimeError: If a way failed.
    """
    new_tokens = 2 * scale.steps
    texts = [text(scale, number, scale.context) for number in range(scale.batch)]
    ways: dict[str, Callable[[], float]] = {
        "engine": lambda: by_engine(scale, texts, new_tokens),
        "transformers, static cache": lambda: by_static_cache(scale, texts, new_tokens),
        "transformers, continuous batching": lambda: by_continuous_batching(scale, texts, new_tokens),
    }
    if scale.is_dry:
        results.add("peers", note="without continuous batching, whose cache takes most of the memory")
        del ways["transformers, continuous batching"]
    speeds: dict[str, float] = {}
    failures = []
    for name, way in ways.items():
        try:
            speeds[name] = len(texts) * new_tokens / way()
        except Exception as error:  # the others may still work
            failures.append(f"{name}: {type(error).__name__}: {error}")
            results.add(name, note=failures[-1][:300])
            continue
        finally:
            release()
        results.add_speed(name, speeds[name], "tokens/s")
        if name != "engine" and "engine" in speeds:
            results.add_speed(f"engine over {name}", speeds["engine"] / speeds[name], "")
    if failures:
        raise RuntimeError("; ".join(failures))


def by_engine(scale: Scale, texts: list[list[int]], new_tokens: int) -> float:
    """Seconds of the engine."""
    with serving(scale) as engine:

        def generate() -> None:
            stepper = EngineStepper(engine, [])
            for number, ids in enumerate(texts):
                stepper.add(f"text{number}", ids, new_tokens)
            while engine.num_unfinished:
                stepper.step()

        return _second_run(generate, scale)


def by_static_cache(scale: Scale, texts: list[list[int]], new_tokens: int) -> float:
    """Seconds of ``generate`` with a static cache, without compiling the model."""
    model = draw_model(scale, scale.dtype).eval()
    ids = torch.tensor(texts, device=scale.device)
    config = _greedy(new_tokens, cache_implementation="static", disable_compile=True)

    def generate() -> None:
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)

    return _second_run(generate, scale)


def by_continuous_batching(scale: Scale, texts: list[list[int]], new_tokens: int) -> float:
    """Seconds of ``generate_batch``.

    Raises:
        RuntimeError: If it returned fewer tokens than expected.
    """
    model = draw_model(scale, scale.dtype).eval()
    model.set_attn_implementation("paged|sdpa")
    config = _greedy(new_tokens)

    def generate() -> None:
        outputs = model.generate_batch(inputs=texts, generation_config=config, progress_bar=False)
        counts = {len(output.generated_tokens) for output in outputs.values()}
        if len(outputs) != len(texts) or counts != {new_tokens}:
            raise RuntimeError(f"{len(outputs)} texts got {sorted(counts)} tokens")

    return _second_run(generate, scale)


def _greedy(new_tokens: int, **options: object) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=None, **options
    )


def _second_run(work: Callable[[], None], scale: Scale) -> float:
    """Seconds of some work that ran once before."""
    work()
    synchronise(scale.device)
    started = time.perf_counter()
    work()
    synchronise(scale.device)
    return time.perf_counter() - started
