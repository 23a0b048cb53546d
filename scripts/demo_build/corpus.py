"""The corpus of the demo model, and the labelled examples for its soft prompts.

A document of the corpus is one of three kinds. *Prose*: sentences in which every kind of input is followed by more
prose, so that an input alone does not call for an answer. *Instructed*: an instruction, the input on the next line,
and the output on the line after that. *Chained*: several inputs after one instruction.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.demo_build.grammar import (
    CITIES,
    EXTRA_TASKS,
    FIRST_NAMES,
    MONTHS,
    PRODUCTS,
    TASKS,
    WEEKDAYS,
    Pair,
    Task,
)

HELDOUT_EXAMPLES = 150
TRAIN_EXAMPLES = 1500
PROSE_SHARE = 0.35


@dataclass(frozen=True)
class Document:
    """Pieces of text, each with whether it is an answer; answers weigh more in the loss."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """The whole document."""
        return "".join(piece for piece, _ in self.pieces)


def follow_up(rng: random.Random) -> str:
    """Draw a sentence that can follow any other."""
    name, other, city = rng.choice(FIRST_NAMES), rng.choice(FIRST_NAMES), rng.choice(CITIES)
    day, product, month = rng.choice(WEEKDAYS), rng.choice(PRODUCTS), rng.choice(MONTHS)
    return rng.choice(
        [
            f"{name} said so on {day}.",
            f"We talked about it with {name} in {city}.",
            f"Nobody in {city} had heard of it before {month}.",
            f"Later {name} and {other} walked home together.",
            f"The old {product} is still in the kitchen.",
            f"In {month} the weather in {city} was mild.",
            f"I will ask {name} again on {day}.",
            f"{name} kept the {product} and gave the rest to {other}.",
            f"There was a letter from {city} on the table.",
            f"It took until {day} before anybody answered.",
        ]
    )


def _prose(rng: random.Random) -> Document:
    opening = (
        rng.choice([*TASKS.values(), *EXTRA_TASKS.values()]).draw(rng)[0] if rng.random() < 0.8 else follow_up(rng)
    )
    sentences = [opening, *(follow_up(rng) for _ in range(rng.randrange(1, 4)))]
    if rng.random() < 0.3:
        sentences.append(rng.choice(list(TASKS.values())).draw(rng)[0])
    return Document(((" ".join(sentences), False),))


def _instructed(rng: random.Random, task: Task) -> Document:
    pieces: list[tuple[str, bool]] = [(rng.choice(task.instructions), False)]
    for _ in range(1 if rng.random() < 0.85 else 2):
        text, answer = task.draw(rng)
        pieces += [(f"\n{text}", False), (f"\n{answer}", True)]
    return Document(tuple(pieces))


def documents(seed: int, excluded: frozenset[str]) -> Iterator[Document]:
    """Yield documents forever; no document contains an input of ``excluded``."""
    rng = random.Random(seed)
    tasks = [*TASKS.values(), *EXTRA_TASKS.values()]
    weights = [task.weight for task in tasks]
    while True:
        document = _prose(rng) if rng.random() < PROSE_SHARE else _instructed(rng, rng.choices(tasks, weights)[0])
        if not any(piece.strip() in excluded for piece, _ in document.pieces):
            yield document


def examples(task: str, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Labelled examples of one task, as (training, held out); all inputs are distinct."""
    rng = random.Random(f"{seed}-{task}")
    pairs: dict[str, str] = {}
    while len(pairs) < TRAIN_EXAMPLES + HELDOUT_EXAMPLES:
        text, answer = TASKS[task].draw(rng)
        pairs.setdefault(text, answer)
    items = list(pairs.items())
    return items[HELDOUT_EXAMPLES:], items[:HELDOUT_EXAMPLES]


def heldout_inputs(seed: int) -> frozenset[str]:
    """All held-out inputs of all tasks."""
    return frozenset(text for task in TASKS for text, _ in examples(task, seed)[1])


def write_heldout(seed: int, folder: Path) -> None:
    """Write the held-out examples as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        lines = [json.dumps({"input": text, "output": answer}) for text, answer in examples(task, seed)[1]]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
