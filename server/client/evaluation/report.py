"""The report of an evaluation: tables, JSON, and a PNG of the confusion matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from server.client.tables import clean
from server.evaluation.scores import OTHER, Scores
from server.evaluation.significance import CONFIDENCE, Comparison


class PictureError(Exception):
    """The PNG cannot be drawn; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of an evaluation of one or two models.

    Attributes:
        data: Path of the data.
        sha256: Digest of the data.
        metric: ``accuracy`` of labels, or ``exact_match`` of texts.
        names: Names of the models.
        scores: Scores of each model.
        first_errors: For each model, the error of the first row without an answer.
        comparison: Comparison of two models.
    """

    data: str
    sha256: str
    metric: str
    names: Sequence[str]
    scores: Sequence[Scores]
    first_errors: Sequence[str | None]
    comparison: Comparison | None = None

    @property
    def num_errors(self) -> int:
        """Number of rows without an answer, over all models."""
        return sum(score.num_errors for score in self.scores)

    @property
    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        models = [{"model": name, **score.as_json} for name, score in zip(self.names, self.scores, strict=True)]
        return {
            "object": "evaluation",
            "data": self.data,
            "dataset_digest": self.sha256,
            "metric": self.metric,
            **models[0],
            "against": models[1] if len(models) > 1 else None,
            "comparison": None if self.comparison is None else self.comparison.as_json,
        }

    @property
    def parts(self) -> Iterator[Table | str]:
        """The report as tables and lines of text."""
        yield f"{self.data}: {len(self.scores[0].right):,} rows"
        has_labels = self.scores[0].labels is not None
        table = _table("", self.metric.replace("_", " "), *(["macro F1"] if has_labels else []), "right", "errors")
        for name, score in zip(self.names, self.scores, strict=True):
            macro = [] if score.macro_f1 is None else [f"{score.macro_f1:.4f}"]
            _row(table, name, f"{score.accuracy:.4f}", *macro, sum(score.right), score.num_errors)
        yield from ("", table)
        for name, error in zip(self.names, self.first_errors, strict=True):
            if error is not None:
                yield f"{name}: {error}"
        if self.comparison is not None:
            yield from ("", *_compared(self.names, self.comparison))
        if has_labels:
            yield from ("", _by_label(self.names, self.scores))
        for name, score in zip(self.names, self.scores, strict=True):
            if score.labels is not None and score.confusion is not None:
                yield from ("", _confusion(name, list(score.labels), score.confusion))


def _compared(names: Sequence[str], found: Comparison) -> Iterator[Table | str]:
    low, high = found.interval
    yield (
        f"{names[0]} minus {names[1]}: {found.difference:+.4f}, {CONFIDENCE:.0%} confidence interval {low:+.4f} to "
        f"{high:+.4f} (bootstrap over rows)"
    )
    yield (
        f"rows answered correctly by {names[0]} only: {found.only_first}; by {names[1]} only: {found.only_second}; "
        f"by both: {found.both_right}; by neither: {found.both_wrong}"
    )
    yield f"McNemar's exact test, two-sided: p = {found.p_value:.3g}"


def _by_label(names: Sequence[str], scores: Sequence[Scores]) -> Table:
    table = _table("label", "rows", *(f"{name}: {what}" for name in names for what in ("F1", "precision", "recall")))
    first = scores[0].labels or {}
    for label, own in first.items():
        all_scores = [(score.labels or {})[label] for score in scores]
        cells = [f"{value:.4f}" for one in all_scores for value in (one.f1, one.precision, one.recall)]
        _row(table, label, own.support, *cells)
    return table


def _confusion(name: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Table:
    has_other = any(row[-1] for row in counts)
    table = _table(f"{name}: label, answer", *labels, *([OTHER] if has_other else []))
    for label, row in zip(labels, counts, strict=True):
        _row(table, label, *(row if has_other else row[:-1]))
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(Text(clean(heading)), overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*(Text(clean(cell)) for cell in cells))


def check_drawable(*, has_labels: bool) -> None:
    """Check before the evaluation that a PNG can be drawn.

    Raises:
        PictureError: If the data has no labels, or matplotlib is not installed.
    """
    if not has_labels:
        raise PictureError("a confusion matrix needs data with labels")
    if find_spec("matplotlib") is None:
        raise PictureError("--png needs matplotlib: pip install 'prelude-server[train]'")


def draw(report: Report, path: Path) -> None:
    """Draw the confusion matrices as a PNG. Call ``check_drawable`` first.

    Raises:
        PictureError: If the file cannot be written.
    """
    found = [
        (name, list(score.labels), score.confusion)
        for name, score in zip(report.names, report.scores, strict=True)
        if score.labels is not None and score.confusion is not None
    ]
    # Imported here because matplotlib is optional and takes a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    size = 2.5 + 0.5 * (len(found[0][1]) + 1)
    figure = Figure(figsize=(size * len(found), size), layout="constrained")
    for place, (name, labels, counts) in enumerate(found, 1):
        axes = figure.add_subplot(1, len(found), place)
        axes.imshow(counts, cmap="Blues")
        axes.set_title(name)
        axes.set_xlabel("answer")
        axes.set_ylabel("label")
        axes.set_xticks(range(len(labels) + 1), [*labels, OTHER], rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        most = max(max(row) for row in counts)
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                axes.text(
                    column, row, str(count), ha="center", va="center", color="white" if 2 * count > most else "black"
                )
    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise PictureError(f"{path}: {error.strerror or error}") from error
