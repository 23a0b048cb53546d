"""Run one engine with poisoned requests in nearly every batch, and check that no healthy token changes.

    python -m scripts.soak_poison --steps 10000 --backend compiled
    python -m scripts.soak_poison --steps 10000 --backend torch --block-size 5

Healthy requests to the embedded model, with and without soft prompts, have known greedy tokens in float32. They share
batches with poisoned requests: soft prompts with huge or NaN values, texts with a token whose embedding is NaN, and
ensembles with such a soft prompt. The cache is small, so sequences reuse each other's blocks all the time. Every
healthy answer is compared with the known one. Every step ends with an integrity check of the scheduler, and every 50
steps all findable blocks must be finite.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from prompt_store.types import ROWS_TENSOR, WEIGHTS_FILE
from server.config import EngineSettings
from server.demo.tour import MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY
from server.engine.llm_engine import LLMEngine
from server.engine.model.platform import CPUPlatform, Platform
from server.engine.types import FinishReason, GenerateRequest, Member, SamplingParams, SoftPromptSource

TASKS = ("sentiment", "intent", "extract")
NAN_TOKEN = 700
HUGE = (3e38, -3e38, 1e38, 1e30, 1e20)
CHECK_EVERY = 50
"""Number of steps between checks of all findable blocks."""


@dataclass(frozen=True, slots=True)
class HealthyRequest:
    """A healthy request and its greedy tokens."""

    text: list[int]
    source: SoftPromptSource | None
    max_tokens: int
    expected: tuple[int, ...] = ()


class Traffic:
    """Healthy and poisoned requests for one engine.

    Args:
        engine: An engine on the embedded model; its embedding of ``NAN_TOKEN`` becomes NaN.
        folder: Where poisoned soft prompts are written.
    """

    def __init__(self, engine: LLMEngine, folder: Path, seed: int) -> None:
        self.engine = engine
        self.counts: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._number = 0
        self._unfinished: dict[str, HealthyRequest | None] = {}
        engine.runner.embed_tokens.register_forward_hook(_poison_token)
        self._poisons = _poisons(engine, folder)
        sources = [_source(SOFT_PROMPTS_DIRECTORY / task / WEIGHTS_FILE, task) for task in TASKS]
        self._sources = sources
        lengths = (3, 16, 47, 130, 311, 600)
        bases = [HealthyRequest(self._text(length), source, 6) for length in lengths for source in (None, *sources)]
        # Each of these shares a prefix with one of the first.
        requests = bases + [HealthyRequest(base.text[:-3] + self._text(9), base.source, 40) for base in bases]
        self._requests = [replace(request, expected=self._alone(request)) for request in requests]

    @property
    def num_unfinished(self) -> int:
        """Number of requests that have not ended."""
        return len(self._unfinished)

    def add_healthy(self) -> None:
        """Add a request with a known answer."""
        request = self._rng.choice(self._requests)
        self._add(request.text, request.source, request.max_tokens, request)

    def add_poison(self) -> None:
        """Add a request whose values are huge or not finite."""
        rng, text = self._rng, self._text(self._rng.randint(1, 90))
        kind = rng.random()
        if kind < 0.25:
            text[rng.randrange(len(text))] = NAN_TOKEN
            self._add(text, rng.choice([None, *self._sources]), rng.randint(1, 6))
        elif kind < 0.35:  # shares a prefix with healthy requests
            request = rng.choice(self._requests)
            self._add([*request.text, NAN_TOKEN, *text], request.source, 2)
        elif kind < 0.45:
            self._add(text, rng.choice(self._sources), 4, others=(None, rng.choice(self._poisons)))
        else:
            self._add(text, rng.choice(self._poisons), rng.randint(1, 12))

    def abort(self) -> None:
        """Abort a random request."""
        if self._unfinished:
            request_id = self._rng.choice(list(self._unfinished))
            self._unfinished.pop(request_id)
            self.engine.abort(request_id)
            self._tokens.pop(request_id, None)
            self.counts["aborted"] += 1

    def step(self) -> None:
        """Run one step, and compare the healthy requests that end.

        Raises:
            AssertionError: If a healthy answer differs from the answer alone, or a findable block is not finite.
        """
        self.counts["steps"] += 1
        for output in self.engine.step():
            tokens = self._tokens.setdefault(output.request_id, [])
            tokens += output.token_ids
            if output.finish_reason is None and output.failure is None:
                continue
            request = self._unfinished.pop(output.request_id)
            received = tuple(self._tokens.pop(output.request_id))
            if request is None:
                self.counts[f"poison: {output.failure.code if output.failure else output.finish_reason}"] += 1
                continue
            self.counts["healthy"] += 1
            if received != request.expected or output.finish_reason is not FinishReason.LENGTH:
                raise AssertionError(
                    f"{output.request_id}: {len(request.text)} tokens after soft prompt "
                    f"{request.source and request.source.digest} gave {received} "
                    f"({output.finish_reason}, {output.failure}), expected {request.expected}"
                )
        self.engine.scheduler.check_integrity()
        if self.counts["steps"] % CHECK_EVERY == 0:
            self.check_cache()

    def check_cache(self) -> None:
        """Check every block that a later sequence can reuse.

        Raises:
            AssertionError: If a block is not finite.
        """
        blocks, cache = self.engine.scheduler.block_manager, self.engine.runner.cache
        findable = list(blocks.findable)
        if findable and not cache.are_finite(findable).all():
            raise AssertionError("a findable block of text is not finite")
        for run in blocks.runs.values():
            if run.is_filled and not cache.are_finite(run.blocks).flatten()[: run.num_computed].all():
                raise AssertionError(f"the cached soft prompt {run.key} is not finite")

    _tokens: dict[str, list[int]]

    def _alone(self, request: HealthyRequest) -> tuple[int, ...]:
        self._tokens = {}
        self._add(request.text, request.source, request.max_tokens)
        tokens: list[int] = []
        while self.engine.num_unfinished:
            for output in self.engine.step():
                tokens += output.token_ids
        self._unfinished.clear()
        return tuple(tokens)

    def _add(
        self,
        text: list[int],
        source: SoftPromptSource | None,
        max_tokens: int,
        healthy: HealthyRequest | None = None,
        others: tuple[SoftPromptSource | None, ...] = (),
    ) -> None:
        self._number += 1
        request_id = f"r{self._number}"
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        refused = self.engine.add(
            GenerateRequest(
                request_id=request_id,
                prompt_token_ids=text,
                params=params,
                soft_prompt=source,
                others=tuple(Member(soft_prompt=one) for one in others),
                salt=self._rng.choice("ab") if healthy else "evil",
            )
        )
        if refused:
            raise AssertionError(refused[0].failure)
        self._unfinished[request_id] = healthy

    def _text(self, length: int) -> list[int]:
        return [self._rng.randrange(3, NAN_TOKEN) for _ in range(length)]


def _poison_token(
    _module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    return output.masked_fill((arguments[0] == NAN_TOKEN)[..., None], torch.nan)


def _source(path: Path, digest: str) -> SoftPromptSource:
    with safe_open(path, framework="pt") as file:
        num_tokens, width = file.get_slice(ROWS_TENSOR).get_shape()
    return SoftPromptSource(
        digest=digest, num_virtual_tokens=num_tokens, is_key_values=width != _embedding_width(), path=str(path)
    )


def _embedding_width() -> int:
    with safe_open(MODEL_DIRECTORY / "model.safetensors", framework="pt") as file:
        return int(file.get_slice("model.embed_tokens.weight").get_shape()[1])


def _poisons(engine: LLMEngine, folder: Path) -> list[SoftPromptSource]:
    model = engine.model
    widths = {False: model.embedding_width, True: 2 * model.num_layers * model.num_kv_heads * model.head_dim}
    sources = []
    generator = torch.Generator().manual_seed(0)
    for is_key_values, width in widths.items():
        for index, value in enumerate((*HUGE, float("nan"))):
            rows = torch.full(((16, 37, 33, 5, 70, 8)[index], width), value)
            if index % 2:  # mixed signs, so that sums meet both infinities
                rows *= torch.randn(rows.shape, generator=generator).sign()
            path = folder / f"{is_key_values}-{index}.safetensors"
            save_file({ROWS_TENSOR: rows}, path)
            sources.append(_source(path, path.stem))
    return sources


@contextmanager
def running(backend: str, block_size: int) -> Iterator[LLMEngine]:
    """An engine whose cache holds little more than one of the longest sequences.

    Args:
        backend: The attention backend: ``compiled`` or ``torch``.
        block_size: Positions per block.
    """
    platform = Platform(torch.device("cpu")) if backend == "torch" else CPUPlatform()
    with ExitStack() as stack:
        engine = LLMEngine(
            EngineSettings(
                model=str(MODEL_DIRECTORY),
                dtype="float32",
                device="cpu",
                block_size=block_size,
                kv_cache_memory=4 * 2**20,
                max_num_seqs=12,
                max_num_batched_tokens=400,
                num_threads=torch.get_num_threads(),
            ),
            platform=platform,
        )
        stack.callback(engine.close)
        yield engine


def soak(num_steps: int, *, seed: int = 0, backend: str = "compiled", block_size: int = 16) -> Counter[str]:
    """Run ``num_steps`` steps under traffic; returns the counts of events.

    Raises:
        AssertionError: If a healthy answer changes, or a findable block is not finite.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, running(backend, block_size) as engine:
        traffic = Traffic(engine, Path(folder), seed)
        while traffic.counts["steps"] < num_steps:
            kind = rng.random()
            if traffic.num_unfinished < 24 and kind < 0.4:
                traffic.add_healthy() if rng.random() < 0.4 else traffic.add_poison()
            elif kind < 0.41:
                traffic.abort()
            else:
                traffic.step()
        traffic.counts["preemptions"] = engine.stats.num_preemptions
        traffic.counts["evicted soft prompts"] = engine.stats.soft_prompt_evictions
        traffic.counts["cached tokens"] = engine.stats.prefix_cache_hits
        return traffic.counts


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("compiled", "torch"), default="compiled")
    parser.add_argument("--block-size", type=int, default=16)
    arguments = parser.parse_args()
    started = time.monotonic()
    counts = soak(arguments.steps, seed=arguments.seed, backend=arguments.backend, block_size=arguments.block_size)
    summary = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{summary} in {time.monotonic() - started:.0f} s: no healthy token changed")


if __name__ == "__main__":
    main()
