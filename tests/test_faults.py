"""Short versions of the fault scripts; the long ones and their figures are in docs/operations.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.faults import corrupt_blob, disk_full
from scripts.faults.harness import Report


def test_damaged_files_are_never_served(tmp_path: Path) -> None:
    report = corrupt_blob.run(tmp_path, count=2)
    assert len(report.rows) > 10
    assert report.broken == []


def test_a_full_disk_loses_nothing_and_keeps_serving(tmp_path: Path) -> None:
    report = disk_full.run(tmp_path, mebibytes=14)
    if len(report.rows) == 1:
        pytest.skip(report.rows[0][1])
    assert report.broken == []


def test_a_broken_invariant_is_told() -> None:
    report = Report()
    report.check("files left", 3, holds=False)
    report.check("wrong answers", 0, holds=True)
    report.figure("answers", 5)
    assert report.broken == ["files left: 3"]
