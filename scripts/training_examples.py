"""Write the examples that docs/training.md trains with: ``python -m scripts.training_examples``.

The task is triage of a mixed inbox: complaints go to support, praise to great, orders to delivery, and whatever
somebody asks of an assistant to call. The embedded model has read such texts, but nothing in its corpus asks for
this. The labels are words of which its small vocabulary has each as one token. ``tasks.jsonl`` is for the method
multitask and adds a second task that the corpus does not have: whether a request names a day of the week.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from scripts.demo_build.grammar import WEEKDAYS, extract, intent, sentiment

FOLDER = Path(__file__).parent.parent / "server" / "demo" / "examples"
SEED = 7
NUM_TRAIN, NUM_TEST = 400, 150


def triage(rng: random.Random) -> tuple[str, str]:
    """One message and where it goes."""
    label = rng.choice(["support", "great", "delivery", "call"])
    if label == "delivery":
        return extract(rng)[0], label
    if label == "call":
        return intent(rng)[0], label
    wanted = "negative" if label == "support" else "positive"
    while (pair := sentiment(rng))[1] != wanted:
        pass
    return pair[0], label


def weekday(rng: random.Random) -> tuple[str, str]:
    """Something said to an assistant, and whether it names a day of the week."""
    wanted = rng.choice(["alarm", "manual"])
    while True:
        text = intent(rng)[0]
        if any(day in text for day in WEEKDAYS) == (wanted == "alarm"):
            return text, wanted


def files() -> dict[str, list[dict[str, object]]]:
    """The rows of each file; no text of a test file is in a training file."""
    rng = random.Random(SEED)
    found: dict[str, list[dict[str, object]]] = {}
    for name, draws in (("triage", [triage]), ("tasks", [triage, weekday])):
        seen: set[str] = set()
        rows: list[dict[str, object]] = []
        while len(rows) < NUM_TRAIN + NUM_TEST:
            task = len(rows) % len(draws)
            text, label = draws[task](rng)
            if text not in seen:
                seen.add(text)
                rows.append({"text": text, "label": label} | ({"task_id": task} if len(draws) > 1 else {}))
        found[name] = rows[:NUM_TRAIN]
        found[f"{name}-test"] = rows[NUM_TRAIN:]
    return found


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files().items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
