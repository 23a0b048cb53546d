"""The ways to serve long texts with few new tokens, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.ways import Contenders, Way, lasting, measure, medians, ratio
from benchmarks.workload import Text, make_texts

PROMPT_COUNTS = (8, 16)
"""Numbers of soft prompts; the first one is compared with the other ways."""

ROUND_SECONDS = 1.0
"""Minimum duration of each way in a round."""


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests that are submitted at once.

    Attributes:
        requests: Their number.
        shortest: Minimum number of text tokens.
        longest: Maximum number of text tokens.
        new_tokens: Per request.
    """

    requests: int
    shortest: int
    longest: int
    new_tokens: int

    def __str__(self) -> str:
        length = f"{self.shortest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        return f"{self.requests} x {length} tokens, {self.new_tokens} new"

    def texts(self, num_prompts: int) -> list[Text]:
        """The same random texts for any number of soft prompts."""
        return make_texts(self.requests, num_prompts=num_prompts, shortest=self.shortest, longest=self.longest)


def loads(mixed: Load, requests: Sequence[int], lengths: Sequence[int], new_tokens: Sequence[int]) -> list[Load]:
    """The mixed load, then each combination of the others."""
    return [mixed] + [
        Load(count, length, length, new) for length in lengths for new in new_tokens for count in requests
    ]


def compare(contenders: Contenders, load: Load, rounds: int, *, peft: bool, pause: float) -> dict[str, object]:
    """Run the ways in turn.

    Args:
        contenders: With at least as many soft prompts as the most of ``PROMPT_COUNTS``.
        load: The requests.
        rounds: Number of rounds after the warm-up.
        peft: Whether to include PEFT's generate.
        pause: Seconds before each way.

    Returns:
        Medians over the rounds: speeds in tokens per second of new tokens and of text tokens, and ratios of speeds.
    """
    counts = sorted({min(count, load.requests) for count in PROMPT_COUNTS})
    ways: dict[str, Way] = {
        f"{count} prompts": contenders.with_soft_prompts(load.texts(count), load.new_tokens) for count in counts
    }
    first, *more = ways
    texts = load.texts(counts[0])
    ways |= contenders.others(texts, load.new_tokens, peft=peft)
    print(f"-- {load}", flush=True)
    speeds = measure({name: lasting(way, ROUND_SECONDS) for name, way in ways.items()}, rounds, pause)
    text_tokens = sum(len(text.token_ids) for text in texts)
    per_new_token = text_tokens / (load.requests * load.new_tokens)
    ratios = {f"{first} over {name}": ratio(speeds, first, name) for name in ways if name != first}
    ratios |= {f"{name} over no prompts": ratio(speeds, name, "no prompts") for name in more}
    inputs = {name: round(speed * per_new_token, 1) for name, speed in medians(speeds).items()}
    print(f"{load}:")
    for name, speed in medians(speeds).items():
        print(f"  {name:12s} {speed:9.1f} new tokens/s  {inputs[name]:10.1f} text tokens/s")
    print("  " + ", ".join(f"{name} {value}" for name, value in ratios.items()), flush=True)
    return {
        **dataclasses.asdict(load),
        "text_tokens": text_tokens,
        "median_tokens_per_second": medians(speeds),
        "median_text_tokens_per_second": inputs,
        "ratios": ratios,
    }
