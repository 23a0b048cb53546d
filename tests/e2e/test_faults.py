"""Short versions of the fault scripts. benchmarks/faults.md has the results of the long ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.faults.corrupt_blob import damage
from scripts.faults.disk_full import fill, small_disk
from scripts.faults.harness import Report, Server, serve, upload_tasks

MEBIBYTES = 6


@pytest.fixture(scope="module")
def on_a_small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, bool]]:
    """A server, and whether its store is on a separate small file system; the tests check the remaining files."""
    folder: Path = tmp_path_factory.mktemp("faults")
    with small_disk(folder / "store", MEBIBYTES) as is_mounted, serve(folder) as server:
        yield server, is_mounted


def test_damaged_files_are_never_served(on_a_small_disk: tuple[Server, bool]) -> None:
    server, _ = on_a_small_disk
    report = Report()
    upload_tasks(server.client)
    damage(server, report, count=2)
    assert len(report.rows) > 10
    assert report.broken == []


def test_a_full_disk_loses_no_files_and_serving_continues(on_a_small_disk: tuple[Server, bool]) -> None:
    server, is_mounted = on_a_small_disk
    if not is_mounted:
        pytest.skip("no file system can be mounted here (it needs root and the right to mount)")
    report = Report()
    upload_tasks(server.client)
    fill(server, report, ballast_bytes=2**20)
    assert len(report.rows) > 10
    assert report.broken == []


def test_a_broken_invariant_is_reported() -> None:
    report = Report()
    report.check("files left", 3, holds=False)
    report.check("wrong answers", 0, holds=True)
    report.figure("answers", 5)
    assert report.broken == ["files left: 3"]
