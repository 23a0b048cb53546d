"""Figures of a check: appended to a file of JSON lines one by one, judged, and shown as a table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One result.

    Attributes:
        part: The part of the check.
        name: What was measured; unique in its part.
        value: The result; None for a note alone.
        unit: The unit of ``value``.
        at_most: The largest value that is good; None without such a target.
        at_least: The smallest value that is good; None without such a target.
        is_detail: Whether the table omits it, unless its target is missed.
        note: Anything to know about it.
    """

    part: str
    name: str
    value: float | None = None
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    is_detail: bool = False
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the target holds; None without one. A value that is not a number misses every target."""
        if self.at_most is None and self.at_least is None:
            return None
        if self.value is None or math.isnan(self.value):
            return False
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def line(self) -> str:
        """The line of the table."""
        target = "".join(
            f"{sign} {bound:g}" for sign, bound in (("<=", self.at_most), (">=", self.at_least)) if bound is not None
        )
        shown = "" if self.value is None else f"{self.value:.4g} {self.unit}".strip()
        verdict = {None: "", True: "ok", False: "MISSED"}[self.holds]
        return f"{self.part:9s} {self.name:46s} {shown:>16s}  {target:9s} {verdict:6s} {self.note}".rstrip()


class Results:
    """Appends the figures of one part to a file; each is on the disk before the next is computed.

    Args:
        path: The file.
        part: The part's name.
        judges_speed: Whether targets of speed are judged; not on a CPU.
    """

    def __init__(self, path: Path, part: str, *, judges_speed: bool) -> None:
        self._path, self._part, self._judges_speed = path, part, judges_speed

    def add(
        self,
        name: str,
        value: float | None = None,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        is_detail: bool = False,
        note: str = "",
    ) -> Figure:
        """Append a figure whose target, if any, is one of correctness."""
        figure = Figure(
            part=self._part,
            name=name,
            value=value,
            unit=unit,
            at_most=at_most,
            at_least=at_least,
            is_detail=is_detail,
            note=note,
        )
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(figure)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return figure

    def add_speed(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        is_detail: bool = False,
        note: str = "",
    ) -> Figure:
        """Append a figure whose target, if any, is one of speed."""
        if not self._judges_speed:
            at_most = at_least = None
        return self.add(name, value, unit, at_most=at_most, at_least=at_least, is_detail=is_detail, note=note)


def read_figures(path: Path) -> list[Figure]:
    """The figures in a file; none if it is missing. A last line that a kill cut off is left out."""
    figures = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            figures.append(Figure(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return figures


def table(figures: Sequence[Figure]) -> str:
    """The figures that are no details, and every missed target, one a line."""
    return "\n".join(figure.line() for figure in figures if not figure.is_detail or figure.holds is False)
