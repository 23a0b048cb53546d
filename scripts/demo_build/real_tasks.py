"""Labelled examples for the soft prompts of the real model.

A review names things that its writer found good or bad. **No word of praise or blame in a held-out review is in a
training review**: what is learnt is the task, and the model knows the words. Dates are those of the demo's grammar.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from scripts.demo_build.grammar import Pair, dates

TRAIN_EXAMPLES = 1500
HELDOUT_EXAMPLES = 150


@dataclass(frozen=True)
class Opinions:
    """Words of praise and of blame."""

    good: tuple[str, ...]
    bad: tuple[str, ...]


_TRAIN = Opinions(
    good=(
        "great", "excellent", "wonderful", "fantastic", "lovely", "superb", "brilliant", "charming", "delicious",
        "friendly", "comfortable", "spotless", "generous", "reliable", "helpful", "impressive", "delightful", "cosy",
    ),
    bad=(
        "terrible", "awful", "horrible", "dreadful", "disappointing", "rude", "filthy", "noisy", "tasteless",
        "uncomfortable", "overpriced", "useless", "boring", "unreliable", "sloppy", "shabby", "dull", "annoying",
    ),
)  # fmt: skip
_HELDOUT = Opinions(
    good=("outstanding", "magnificent", "pleasant", "exquisite", "flawless", "marvellous", "enjoyable", "polite"),
    bad=("atrocious", "disgusting", "unpleasant", "appalling", "faulty", "dismal", "tedious", "hostile"),
)
_THINGS = (
    "room", "breakfast", "service", "staff", "soup", "dessert", "waiter", "view", "bed", "film", "story", "music",
    "acting", "ending", "train", "driver", "seat", "museum", "guide", "tour", "coffee", "menu", "garden", "hotel",
)  # fmt: skip
_OPENINGS = (
    "We stayed there for two nights.", "I went with my sister.", "It was our second visit.", "I booked it online.",
    "We came by chance.", "My friends had recommended it.", "", "", "",
)  # fmt: skip


def _sentiment(rng: random.Random, words: Opinions) -> Pair:
    is_good = rng.random() < 0.5

    def clause(good: bool) -> str:
        is_negated = rng.random() < 0.15
        word = rng.choice(words.good if good != is_negated else words.bad)
        adverb = rng.choice(("not", "not at all", "never") if is_negated else ("", "", "really", "simply", "quite"))
        return " ".join(f"the {rng.choice(_THINGS)} was {adverb} {word}".split())

    form = rng.random()
    if form < 0.3:
        body = f"{clause(not is_good)}, but {clause(is_good)}, and that is what counts"
    elif form < 0.65:
        body = f"{clause(is_good)} and {clause(is_good)}"
    else:
        body = clause(is_good)
    text = f"{rng.choice(_OPENINGS)} {body[0].upper()}{body[1:]}.".strip()
    return text, "positive" if is_good else "negative"


def _draw(task: str, rng: random.Random, *, is_heldout: bool) -> Pair:
    if task == "dates":
        return dates(rng)
    return _sentiment(rng, _HELDOUT if is_heldout else _TRAIN)


def real_examples(task: str, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Labelled examples of ``sentiment`` or ``dates``, as (training, held out); all inputs are distinct."""
    parts: list[list[Pair]] = []
    seen: set[str] = set()
    for number, is_heldout in ((TRAIN_EXAMPLES, False), (HELDOUT_EXAMPLES, True)):
        rng = random.Random(f"{seed}-real-{task}-{is_heldout}")
        pairs: list[Pair] = []
        while len(pairs) < number:
            text, answer = _draw(task, rng, is_heldout=is_heldout)
            if text not in seen:
                seen.add(text)
                pairs.append((text, answer))
        parts.append(pairs)
    return parts[0], parts[1]
