"""The check of the GPU path: what it judges, that no part stops it, and a rehearsal of all of it on a CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from scripts.gpu import check
from scripts.gpu.check import BUDGETS, allowed_seconds, run_part
from scripts.gpu.models import dry_scale, full_scale
from scripts.gpu.part import PARTS
from scripts.gpu.results import Figure, Results, read_figures, table
from scripts.gpu.steps import add_step, bytes_of_step, group_of
from scripts.gpu.suite import run_tests

ROOT = Path(check.__file__).parents[2]


@pytest.mark.parametrize(
    ("value", "at_most", "at_least", "holds"),
    [
        (1.5, 1.5, None, True),
        (1.6, 1.5, None, False),
        (0.6, None, 0.6, True),
        (0.59, None, 0.6, False),
        (math.nan, 1.5, None, False),
        (None, None, 1, False),
        (9.0, None, None, None),
    ],
)
def test_targets_are_judged(
    value: float | None, at_most: float | None, at_least: float | None, holds: bool | None
) -> None:
    figure = Figure(part="p", name="n", value=value, at_most=at_most, at_least=at_least)
    assert figure.holds is holds
    assert ("MISSED" in figure.line()) == (holds is False)


def test_figures_are_on_the_disk_at_once_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    assert read_figures(path) == []
    results = Results(path, "steps", judges_speed=True)
    first = results.add("one", 1.0, at_most=2)
    second = results.add_speed("two", 3.0, "ms", at_most=2, is_detail=True)
    third = results.add("three", 3.0, is_detail=True)
    assert read_figures(path) == [first, second, third]
    with path.open("a") as file:
        file.write(json.dumps({"part": "steps", "name": "four"})[:-4])
    assert read_figures(path) == [first, second, third]
    assert table([first, second, third]).splitlines() == [first.line(), second.line()]  # a missed detail is shown


def test_speed_is_not_judged_in_a_rehearsal(tmp_path: Path) -> None:
    results = Results(tmp_path / "figures.jsonl", "steps", judges_speed=False)
    assert results.add_speed("slow", 9.0, "ms", at_most=1).holds is None
    assert results.add("wrong", 9.0, at_most=1).holds is False


def test_a_step_is_judged_by_the_bytes_that_it_reads(tmp_path: Path) -> None:
    scale = full_scale()
    weights = 2 * scale.shape.weights_read
    assert 14.5e9 < weights < 15.5e9  # 8.03e9 parameters, less the table of embeddings
    assert bytes_of_step(scale, 64) - weights == 64 * 512 * 131_072
    results = Results(tmp_path / "figures.jsonl", "steps", judges_speed=True)
    for batch, seconds in ((1, 0.005), (64, 0.006), (64, 0.01), (256, 0.1)):
        add_step(results, scale, batch, seconds, 4.3e12, is_eager=False)
    shares = [figure for figure in read_figures(tmp_path / "figures.jsonl") if figure.name.startswith("share")]
    assert [figure.holds for figure in shares] == [True, True, False, None]


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("attend", "attention"),
        ("store", "keys and values"),
        ("nvjet_tst_128x64_64x8_1x2_h_bz_TNN", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", "products"),
        ("void at::native::reduce_kernel<512, 1>", "reductions"),
        ("void at::native::vectorized_elementwise_kernel<4>", "element-wise"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("unknown", "other"),
    ],
)
def test_kernels_are_grouped_by_name(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_later_parts_keep_their_time_and_get_what_earlier_ones_left() -> None:
    parts = list(BUDGETS)
    assert list(PARTS) == parts
    total = float(sum(BUDGETS.values()))
    assert total == 480
    assert allowed_seconds("ceilings", parts, total, total) == BUDGETS["ceilings"]
    assert allowed_seconds("kernels", parts, total - 10, total) == BUDGETS["kernels"] + 20
    assert allowed_seconds("peers", parts, 5.0, total) == 5.0
    assert allowed_seconds("loads", ["loads"], 100.0, 100.0) == 100.0


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print(child.pid, flush=True)
child.wait()
"""
    assert run_part(python(code), tmp_path / "log", dict(os.environ), 5.0) == "did not end in 5 s"
    stat = Path(f"/proc/{(tmp_path / 'log').read_text().strip()}/stat")
    end = time.monotonic() + 20
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter(["failed with status 1", "did not end in 3 s", "ran"])

    def run(command: list[str], log: Path, *_: object) -> str:
        log.write_text(f"output of {command[3]}\nthe reason\n")
        return next(ends)

    monkeypatch.setattr(check, "run_part", run)
    figures = check.check(tmp_path, ["ceilings", "steps", "peers"], 30.0, is_dry=True, wheels=None)
    assert [(figure.part, figure.holds, figure.note) for figure in figures] == [
        ("ceilings", False, "failed with status 1: the reason"),
        ("steps", False, "did not end in 3 s: the reason"),
        ("peers", True, "ran"),
    ]


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (0.0, 1)])
def test_the_exit_status_says_whether_all_targets_hold(
    value: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Figure(part="ceilings", name="ran", value=value, at_least=1, is_detail=True)
    monkeypatch.setattr(check, "check", lambda *_, **__: [figure])
    monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == status
    assert f"{1 - status} of 1 targets hold" in capsys.readouterr().out


def test_failed_tests_are_figures(tmp_path: Path) -> None:
    """In a process of its own, because pytest runs pytest."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    code = f"""
from pathlib import Path
from scripts.gpu.results import Results
from scripts.gpu.suite import run_tests
results = Results(Path({str(tmp_path / "f")!r}), "tests", judges_speed=True)
run_tests(results, ["-q", "-c", "/dev/null", {str(tmp_path)!r}])
"""
    subprocess.run(python(code), cwd=ROOT, check=True, capture_output=True)
    figures = {figure.name: figure for figure in read_figures(tmp_path / "f")}
    assert {name: figure.value for name, figure in figures.items()} == {
        "failed: test_bad": 1,
        "tests that passed": 1,
        "tests that failed": 1,
        "tests that were skipped": 1,
    }
    assert figures["failed: test_bad"].holds is figures["tests that were skipped"].holds is False


def test_tests_that_cannot_run_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest, "main", lambda *_, **__: pytest.ExitCode.USAGE_ERROR)
    with pytest.raises(RuntimeError, match="USAGE_ERROR"):
        run_tests(Results(tmp_path / "f", "tests", judges_speed=True), [])


def test_wheels_are_installed_for_the_parts_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "packed-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("packed.py", "")
        wheel.writestr("packed-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: packed\nVersion: 1.0\n")
        wheel.writestr("packed-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("packed-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PYTHONPATH", "/before")
    assert check.paths(tmp_path, None) == [str(ROOT), "/before"]
    site, *others = check.paths(tmp_path, wheels)
    assert others == [str(ROOT), "/before"]
    assert Path(site, "packed.py").exists()
    (wheels / "broken-1.0-py3-none-any.whl").write_text("")
    with pytest.raises(subprocess.CalledProcessError):
        check.paths(tmp_path, wheels)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts_are_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.gpu.check", "--dry", "--seconds", "850", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    logs = {path.name: path.read_text()[-2000:] for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    figures = read_figures(tmp_path / "figures.jsonl")
    assert [figure.part for figure in figures if figure.name == "ran"] == list(BUDGETS)
    assert len(table(figures).splitlines()) < 60
    batches = dry_scale().batches
    names = {figure.name for figure in figures}
    assert {f"share of the copy's bandwidth, {batch} x 24" for batch in batches} <= names
    assert "tests that passed" in names
    assert "speed was not judged" in done.stdout
