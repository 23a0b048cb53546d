"""Read, check and split the training data. No model is loaded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.datasets import (
    FORM_NAMES,
    MAX_FAULTS,
    DatasetError,
    Example,
    LabelledText,
    PromptCompletion,
    digest,
    form_of,
    read_examples,
)
from server.training.settings import Method, TrainSettings

MIN_ROWS_TO_SPLIT = 10
"""With fewer rows none is held out: one or two would measure nothing, and training needs them."""

MAX_HELD_OUT = 500
"""Enough to tell accuracies two points apart. More would only make the twenty evaluations slower."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The training rows and the held-out rows.

    Attributes:
        train: Rows to train on.
        held_out: Rows to evaluate on; may be empty.
        held_out_path: The file of the held-out rows.
        digests: SHA-256 of each file, by role.
        labels: All labels, sorted; empty for the other formats.
        num_tasks: Number of tasks of a multitask prompt.
        warnings: Warnings for the user.
    """

    train: list[Example]
    held_out: list[Example]
    held_out_path: Path
    digests: dict[str, str]
    labels: tuple[str, ...]
    num_tasks: int
    warnings: tuple[str, ...]


def load_corpus(settings: TrainSettings) -> Corpus:
    """Read and check the files.

    Raises:
        DatasetError: With every fault.
    """
    examples = read_examples(settings.data)
    digests = {"data": digest(settings.data)}
    _check_tasks(settings.data, examples, settings.method)
    labels = _labels(examples)
    warnings = []
    if settings.has_head:
        _check_classes(settings.data, examples, labels)
    if len(labels) == 1:
        warnings.append(f"every row has the label {labels[0]!r}: there is nothing to learn")
    num_tasks = 1 + max(example.task_id or 0 for example in examples)
    if settings.eval_data is not None:
        held_out = read_examples(settings.eval_data)
        digests["eval_data"] = digest(settings.eval_data)
        _check_held_out(settings, held_out, form_of(examples), labels, num_tasks)
        if shared := len(set(examples) & set(held_out)):
            warnings.append(f"{shared} held-out rows are also training rows: the scores will be too high")
        return Corpus(examples, held_out, settings.eval_data, digests, labels, num_tasks, tuple(warnings))
    train, held_out = _split(examples, settings)
    if not held_out:
        warnings.append("no rows are held out: no evaluation, no early stopping, and the last state is saved")
    return Corpus(train, held_out, settings.data, digests, labels, num_tasks, tuple(warnings))


def initial_text(corpus: Corpus, settings: TrainSettings) -> str | None:
    """The text to initialise from: as configured, the description, or a sentence with the labels.

    Lester et al. 2021 initialise from the labels of a classification.

    Returns:
        None if there is none of them; use ``beginning_of_data`` then.
    """
    if settings.init_text is not None:
        return settings.init_text
    if settings.description is not None:
        return settings.description
    return f"Classify the text as {_listed(corpus.labels)}." if corpus.labels else None


def beginning_of_data(corpus: Corpus) -> str:
    """The beginning of the data as the text to initialise from, as in Eyuboglu et al. 2025."""
    return "\n".join(_text(example) for example in corpus.train[:64])


def _text(example: Example) -> str:
    if isinstance(example, PromptCompletion):
        return example.prompt + example.completion
    if isinstance(example, LabelledText):
        return f"{example.text} {example.label}"
    return "\n".join(message.content for message in example.messages)


def _listed(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} or {labels[-1]}"


def _labels(examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(sorted({example.label for example in examples if isinstance(example, LabelledText)}))


def _split(examples: list[Example], settings: TrainSettings) -> tuple[list[Example], list[Example]]:
    count = min(MAX_HELD_OUT, round(len(examples) * settings.eval_fraction))
    if settings.eval_fraction and len(examples) >= MIN_ROWS_TO_SPLIT:
        count = max(1, count)
    if len(examples) < MIN_ROWS_TO_SPLIT or count == 0:
        return examples, []
    chosen = set(random.Random(settings.seed).sample(range(len(examples)), count))  # noqa: S311 - a split, not a secret
    return (
        [example for place, example in enumerate(examples) if place not in chosen],
        [example for place, example in enumerate(examples) if place in chosen],
    )


def _check_classes(path: Path, examples: Sequence[Example], labels: Sequence[str]) -> None:
    if not labels:
        form = FORM_NAMES[type(examples[0])]
        raise DatasetError(
            path, [(0, f"the rows have the format {form}; a classification head needs {{text, label}}")]
        )
    if len(labels) == 1:
        raise DatasetError(path, [(0, f"every row has the label {labels[0]!r}; a classification head needs two")])


def _check_tasks(path: Path, examples: Sequence[Example], method: Method) -> None:
    has_tasks = examples[0].task_id is not None
    if method is Method.MULTITASK and not has_tasks:
        raise DatasetError(path, [(0, "the rows have no task_id, which the method multitask requires")])
    if method is not Method.MULTITASK and has_tasks:
        raise DatasetError(path, [(0, f"the rows have a task_id, which the method {method} does not support")])
    if has_tasks:
        known = {example.task_id for example in examples if example.task_id is not None}
        if missing := sorted(set(range(min(max(known), 10_000))) - known):
            reason = f"no row has the task_id {missing[0]}, but one has {max(known)}: count tasks from 0"
            raise DatasetError(path, [(0, reason)])


def _check_held_out(
    settings: TrainSettings,
    held_out: Sequence[Example],
    form: type[Example],
    labels: Sequence[str],
    num_tasks: int,
) -> None:
    path = settings.eval_data or settings.data
    if type(held_out[0]) is not form:
        raise DatasetError(
            path,
            [
                (
                    held_out[0].line,
                    f"has the format {FORM_NAMES[type(held_out[0])]}, but {settings.data} has {FORM_NAMES[form]}",
                )
            ],
        )
    if settings.method is not Method.MULTITASK:
        _check_tasks(path, held_out, settings.method)
    faults: list[tuple[int, str]] = []
    for example in held_out:
        if isinstance(example, LabelledText) and example.label not in labels:
            faults.append((example.line, f"the label {example.label[:40]!r} is in no training row"))
        if settings.method is Method.MULTITASK and (example.task_id is None or example.task_id >= num_tasks):
            faults.append((example.line, f"the task_id {example.task_id} is in no training row"))
    if faults:
        raise DatasetError(path, faults[:MAX_FAULTS], len(faults))
