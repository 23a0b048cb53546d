"""Scores, compared with plain counting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.evaluation.scores import OTHER, exact_match, score_labels
from tests.support.presence import present

LABELS = ["a", "b", "c"]
pairs = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, None, "elsewhere"])), min_size=1, max_size=40
)


@given(pairs=pairs)
def test_scores_of_labels_match_plain_counting(pairs: list[tuple[str, str | None]]) -> None:
    expected, answers = [want for want, _ in pairs], [got for _, got in pairs]
    scores = score_labels(expected, answers, LABELS)
    assert scores.accuracy == pytest.approx(sum(want == got for want, got in pairs) / len(pairs))
    assert scores.num_errors == answers.count(None)
    labels, confusion = present(scores.labels), present(scores.confusion)
    for place, label in enumerate(LABELS):
        hits = sum(want == got == label for want, got in pairs)
        misses, alarms = expected.count(label) - hits, answers.count(label) - hits
        own = labels[label]
        # An equivalent formula of F1.
        assert own.f1 == pytest.approx(2 * hits / (2 * hits + misses + alarms) if hits else 0.0)
        assert own.support == expected.count(label) == sum(confusion[place])
        assert confusion[place][place] == hits
        strange = sum(want == label and got not in LABELS for want, got in pairs)
        assert confusion[place][-1] == strange
    assert scores.macro_f1 == pytest.approx(sum(own.f1 for own in labels.values()) / 3)


def test_scores_of_a_known_case_are_exact() -> None:
    scores = score_labels(["a", "a", "a", "b"], ["a", "a", "b", None], ["a", "b"])
    assert scores.as_json == {
        "rows": 4,
        "right": 2,
        "errors": 1,
        "accuracy": 0.5,
        "macro_f1": pytest.approx(0.4),
        "labels": {
            "a": {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "support": 3},
            "b": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1},
        },
        "confusion": {"labels": ["a", "b", OTHER], "counts": [[2, 1, 0], [0, 0, 1]]},
    }


def test_texts_match_without_surrounding_white_space() -> None:
    scores = exact_match(["\nyes", "no", "a b", "x"], [" yes\n", "No", "a  b", None])
    assert scores.right == [True, False, False, False]
    assert (scores.accuracy, scores.num_errors, scores.macro_f1) == (0.25, 1, None)
    assert "labels" not in scores.as_json
