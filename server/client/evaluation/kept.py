"""Evaluations on the server: record finished ones, and decide a promotion by a recorded one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.client.evaluation.evaluator import AnswerOptions, EvaluationResult
from server.client.http import ClientError, PreludeClient
from server.datasets import Conversation, Example, LabelledText, PromptCompletion
from server.evaluation.examples import EvaluatedModel, expected_of, metric_of

MAX_ROWS = 5_000
"""Rows of an evaluation that a server keeps."""

PATH = "/v1/evaluations"

_ID = re.compile(r"eval-[0-9a-f]{32}")


def is_evaluation(text: str) -> bool:
    """Whether a text is the id of an evaluation, rather than an alias or a version."""
    return _ID.fullmatch(text) is not None


def check_recordable(examples: Sequence[Example]) -> None:
    """Check before the evaluation that a server can keep it.

    Raises:
        ClientError: If there are too many rows.
    """
    if len(examples) > MAX_ROWS:
        raise ClientError(
            f"a server keeps evaluations of at most {MAX_ROWS:,} rows, and the data has {len(examples):,}",
            code="usage",
        )


def record_evaluation(
    client: PreludeClient,
    examples: Sequence[Example],
    evaluated: EvaluatedModel,
    result: EvaluationResult,
    *,
    data: Path,
    sha256: str,
    options: AnswerOptions,
    keeps_texts: bool = False,
) -> dict[str, Any]:
    """Send a finished evaluation to the server, which computes the scores from the rows.

    Args:
        client: Client of the server.
        examples: The rows.
        evaluated: The model that was evaluated.
        result: Its answers.
        data: The file with the rows; its name is sent.
        sha256: Digest of the file.
        options: How answers were generated.
        keeps_texts: Whether to send the texts too.

    Returns:
        The server's record.

    Raises:
        ClientError: If the server does not take it.
    """
    body: dict[str, Any] = {
        "model": evaluated.model,
        "dataset": data.name,
        "dataset_digest": sha256,
        "metric": metric_of(examples[0]),
        "max_tokens": options.max_tokens,
        "stop": list(options.stop),
        "keep_texts": keeps_texts,
        "rows": [
            _row(example, answer, result.errors.get(index), is_right=is_right, keeps_text=keeps_texts)
            for index, (example, answer, is_right) in enumerate(
                zip(examples, result.answers, result.scores.right, strict=True)
            )
        ],
    }
    if evaluated.text_prompt is not None:
        body["text_prompt"] = evaluated.text_prompt
    if not evaluated.has_head:
        body["separator"] = evaluated.separator
    return client.call("POST", PATH, json=body)


def newest_on_same_data(client: PreludeClient, name: str, version: int, named: dict[str, Any]) -> dict[str, Any]:
    """The newest completed evaluation of a version on the data of another evaluation.

    Raises:
        ClientError: If there is none.
    """
    params = {
        "prompt_id": name,
        "version": version,
        "dataset_digest": named["dataset_digest"],
        "status": "completed",
        "limit": 1,
    }
    found: list[dict[str, Any]] = client.call("GET", PATH, params=params)["data"]
    if not found:
        what = named["dataset"] or "the same data"
        raise ClientError(
            f"{name}@{version} has no completed evaluation on the data of {named['id']}: give --data, or run "
            f"prelude eval {name}@{version} --data {what} --record first",
            status=404,
            code="not_found",
        )
    return found[0]


def compared(client: PreludeClient, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The comparison of two kept evaluations, without single rows.

    Raises:
        ClientError: If they are on other data, or one is not completed.
    """
    found = client.call("GET", f"{PATH}/{ours['id']}/comparison", params={"to": theirs["id"], "limit": 1})
    return {key: value for key, value in found.items() if key not in ("data", "has_more", "last_row")}


def why_not_better_than_kept(comparison: dict[str, Any], significant: float | None) -> str | None:
    """Why the first of two kept evaluations is not better; None if it is. ``significant`` bounds the p-value."""
    first, second = comparison["first"], comparison["second"]
    metric = first["metric"].replace("_", " ")
    scores = (
        f"{metric} {first['scores']['accuracy']:.4f} for {first['model']} against "
        f"{second['scores']['accuracy']:.4f} for {second['model']} on {comparison['rows']} rows"
    )
    if errors := first["rows"]["errors"] + second["rows"]["errors"]:
        return f"{errors} rows have no answer"
    if comparison["only_first"] <= comparison["only_second"]:
        return f"{scores} is not better"
    p_value = comparison["p_value"]
    if significant is not None and p_value >= significant:
        return f"{scores} is not significant: McNemar's p-value is {p_value:.3g}, not below {significant:g}"
    return None


def _row(
    example: Example, answer: str | None, error: str | None, *, is_right: bool, keeps_text: bool
) -> dict[str, Any]:
    row: dict[str, Any] = {"line": example.line}
    if error is not None or answer is None:
        row["error"] = (error or "no answer")[:2000]
    if isinstance(example, LabelledText):
        row["expected"] = example.label
        if answer is not None and "error" not in row:
            row["answer"] = answer
    elif "error" not in row:
        row["right"] = is_right
        if keeps_text:
            row["answer"] = answer
    if keeps_text:
        row["expected"] = expected_of(example)
        row["text"] = _text(example)
    return row


def _text(example: Example) -> str:
    match example:
        case LabelledText():
            return example.text
        case PromptCompletion():
            return example.prompt
        case Conversation():
            return "\n".join(f"{turn.role}: {turn.content}" for turn in example.messages[:-1])
