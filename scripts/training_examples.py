"""Write the training examples that docs/training.md uses: ``python -m scripts.training_examples``.

The task is triage of a mixed inbox. Complaints get the label support, praise gets great, orders get delivery, and
requests to an assistant get call. The corpus of the embedded model contains similar texts, but no instruction for
this task. Each label is one token of the model's small vocabulary. ``tasks.jsonl`` is for the method multitask. It
adds a second task that is not in the corpus either: does a request name a day of the week?
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
    """Draw one message and its label."""
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
    """Draw one request to an assistant, and whether it names a day of the week."""
    wanted = rng.choice(["alarm", "manual"])
    while True:
        text = intent(rng)[0]
        if any(day in text for day in WEEKDAYS) == (wanted == "alarm"):
            return text, wanted


def files() -> dict[str, list[dict[str, object]]]:
    """The rows of each file; training and test files have no text in common."""
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
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files().items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
