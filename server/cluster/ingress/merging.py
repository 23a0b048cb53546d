"""Answers that are made of those of several replicas: metrics with a label, and the models of all bases."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(\{)?")


def merged_metrics(texts: Mapping[str, str]) -> str:
    """Metrics of several replicas in one text, each sample with the label ``replica``.

    The samples of a family stand together, as Prometheus' text format demands.

    Args:
        texts: Metrics in Prometheus' text format by name of the replica.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        label = f"replica={json.dumps(replica)}"
        family = ""
        seen: set[str] = set()
        for line in text.splitlines():
            if line.startswith("# "):
                words = line.split(" ", 3)
                if len(words) < 3 or words[1] not in ("HELP", "TYPE"):
                    continue  # a comment, or the end
                family = words[2]
                if family not in seen and family not in heads:
                    heads[family] = []
                    seen.add(family)
                if family in seen:
                    heads[family].append(line)
                samples.setdefault(family, [])
            elif line.strip():
                samples.setdefault(family, []).append(_labelled(line, label))
    lines = [line for family, found in samples.items() for line in [*heads.get(family, ()), *found]]
    return "\n".join(lines) + "\n" if lines else ""


def _labelled(line: str, label: str) -> str:
    found = _SAMPLE.match(line)
    if found is None:
        return line
    name, brace = found[1], found[2]
    rest = line[found.end() :]
    if brace is None:
        return f"{name}{{{label}}}{rest}"
    return f"{name}{{{label}{rest}" if rest.startswith("}") else f"{name}{{{label},{rest}"


def merged_models(answers: Iterable[bytes]) -> bytes:
    """The lists of models of several bases as one: the bases first, then soft prompts, each name once.

    Args:
        answers: Bodies of ``GET /v1/models``, in the order of the bases; a name belongs to the first that has it.
    """
    cards: list[Mapping[str, Any]] = []
    for answer in answers:
        found: Sequence[Mapping[str, Any]] = json.loads(answer)["data"]
        cards += found
    by_name: dict[str, Mapping[str, Any]] = {}
    for card in [card for card in cards if card["parent"] is None] + cards:
        by_name.setdefault(str(card["id"]), card)
    return json.dumps({"object": "list", "data": list(by_name.values())}).encode()


def stopped_base(name: str) -> bytes:
    """The list of models of a base without replicas: what is known of it without one."""
    card = {"id": name, "object": "model", "created": 0, "owned_by": "prelude", "root": name, "parent": None}
    return json.dumps({"object": "list", "data": [card]}).encode()
