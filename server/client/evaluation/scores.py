"""Scores: accuracy or exact match, F1 of each label, and which label is taken for which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

OTHER = "(other)"
"""The column of the confusion matrix for errors and for labels that are not the data's."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """How one label fares.

    Attributes:
        precision: Of the rows that were given it, how many have it; 0 where none was.
        recall: Of the rows that have it, how many were given it; 0 where none has.
        f1: Their harmonic mean; 0 where both are.
        support: Rows that have it.
    """

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class Scores:
    """How one evaluated did.

    Attributes:
        right: Of each row, whether it was answered right.
        num_errors: Rows without an answer; they count as wrong.
        labels: Scores by label, in order; None where rows have no labels.
        confusion: Rows by label and by answer, the last column being ``OTHER``; None where rows have no labels.
    """

    right: list[bool]
    num_errors: int
    labels: dict[str, LabelScore] | None = None
    confusion: list[list[int]] | None = None

    @property
    def accuracy(self) -> float:
        """Share of the rows that were answered right."""
        return sum(self.right) / len(self.right)

    @property
    def macro_f1(self) -> float | None:
        """Mean F1 of the labels, each with the same weight; None where rows have no labels."""
        if self.labels is None:
            return None
        return sum(score.f1 for score in self.labels.values()) / len(self.labels)

    @property
    def as_json(self) -> dict[str, Any]:
        """For programs; what is said of single rows is left out."""
        found: dict[str, Any] = {
            "rows": len(self.right),
            "right": sum(self.right),
            "errors": self.num_errors,
            "accuracy": self.accuracy,
        }
        if self.labels is not None:
            found["macro_f1"] = self.macro_f1
            found["labels"] = {label: asdict(score) for label, score in self.labels.items()}
            found["confusion"] = {"labels": [*self.labels, OTHER], "counts": self.confusion}
        return found


def exact_match(expected: Sequence[str], answers: Sequence[str | None]) -> Scores:
    """Compare whole texts; white space at either end does not count. None is a row without an answer."""
    right = [
        answer is not None and answer.strip() == want.strip() for want, answer in zip(expected, answers, strict=True)
    ]
    return Scores(right, sum(answer is None for answer in answers))


def score_labels(expected: Sequence[str], answers: Sequence[str | None], labels: Sequence[str]) -> Scores:
    """Compare labels.

    Args:
        expected: The label of each row, one of ``labels``.
        answers: What each row was given; None is a row without an answer.
        labels: All labels of the data.
    """
    pairs = Counter(zip(expected, answers, strict=True))
    given, have = Counter(answers), Counter(expected)
    scores = {}
    for label in labels:
        hits = pairs[label, label]
        precision = hits / given[label] if given[label] else 0.0
        recall = hits / have[label] if have[label] else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        scores[label] = LabelScore(precision, recall, f1, have[label])
    confusion = []
    for label in labels:
        row = [pairs[label, answer] for answer in labels]
        confusion.append([*row, have[label] - sum(row)])
    right = [want == answer for want, answer in zip(expected, answers, strict=True)]
    return Scores(right, sum(answer is None for answer in answers), scores, confusion)
