"""Scores: accuracy or exact match, F1 of each label, and the confusion matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

OTHER = "(other)"
"""The column of the confusion matrix for errors and for labels that the data does not have."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """Scores of one label; a ratio with denominator 0 is 0.

    Attributes:
        precision: Share of the rows answered with this label that have it.
        recall: Share of the rows with this label that were answered with it.
        f1: Harmonic mean of precision and recall.
        support: Number of rows with this label.
    """

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one model.

    Attributes:
        right: For each row, whether the answer is correct.
        num_errors: Rows without an answer; they count as wrong.
        labels: Scores by label, in order; None if rows have no labels.
        confusion: Number of rows by label (rows) and answer (columns, the last is ``OTHER``); None if rows have no
            labels.
    """

    right: list[bool]
    num_errors: int
    labels: dict[str, LabelScore] | None = None
    confusion: list[list[int]] | None = None

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return sum(self.right) / len(self.right)

    @property
    def macro_f1(self) -> float | None:
        """Unweighted mean F1 of the labels; None if rows have no labels."""
        if self.labels is None:
            return None
        return sum(score.f1 for score in self.labels.values()) / len(self.labels)

    @property
    def as_json(self) -> dict[str, Any]:
        """The scores as a JSON object, without those of single rows."""
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
    """Compare texts, without white space at both ends. An answer of None is an error."""
    right = [
        answer is not None and answer.strip() == want.strip() for want, answer in zip(expected, answers, strict=True)
    ]
    return Scores(right, sum(answer is None for answer in answers))


def score_labels(expected: Sequence[str], answers: Sequence[str | None], labels: Sequence[str]) -> Scores:
    """Compare labels.

    Args:
        expected: The label of each row, one of ``labels``.
        answers: The answer of each row; None is an error.
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
