"""The tests of ``tests/gpu``, with a figure for each that fails as soon as it does."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest

from scripts.gpu.models import Scale
from scripts.gpu.results import Results

WORKERS = 4
FOLDER = "tests/gpu"
DRY = "tests/engine/model/test_gpu_families.py"
DRY_FAMILIES = ("llama", "opt_projected")


class Recorder:
    """A plugin that counts results, and adds a figure for each failure."""

    def __init__(self, results: Results) -> None:
        self.counts: Counter[str] = Counter()
        self._results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one phase of a test: a failure of any phase, other results of the call alone."""
        if report.failed:
            self.counts["failed"] += 1
            lines = report.longreprtext.splitlines() or [""]
            name = report.nodeid.rpartition("::")[2]
            self._results.add(f"failed: {name}", 1, at_most=0, is_detail=True, note=lines[-1].strip()[:300])
        elif report.skipped:
            self.counts["skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1


def run(results: Results, scale: Scale) -> None:
    """Run the tests.

    Raises:
        RuntimeError: If pytest could not run them.
    """
    # Libraries of other versions than the project's may warn when they are imported.
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--tb=short", "-W", "default"]
    if scale.is_dry:
        results.add("tests", note=f"of {' and '.join(DRY_FAMILIES)} without a GPU, by torch's attention")
        paths = [f"{DRY}::test_a_mixed_batch_equals_peft[{name}]" for name in DRY_FAMILIES]
        run_tests(results, [*options, "--confcutdir=tests/engine", *paths])
        return
    if importlib.util.find_spec("xdist") is not None:
        options += ["--numprocesses", str(WORKERS), "--maxprocesses", str(WORKERS)]
    # The fixtures of the other tests need packages that a machine for this check lacks.
    run_tests(results, [*options, f"--confcutdir={FOLDER}", FOLDER])


def run_tests(results: Results, arguments: list[str]) -> None:
    """Run pytest with some arguments.

    Raises:
        RuntimeError: If pytest could not run the tests.
    """
    recorder = Recorder(results)
    status = pytest.main(arguments, plugins=[recorder])
    results.add("tests that passed", recorder.counts["passed"], at_least=1)
    results.add("tests that failed", recorder.counts["failed"], at_most=0)
    results.add("tests that were skipped", recorder.counts["skipped"], at_most=0)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {status!r}")
