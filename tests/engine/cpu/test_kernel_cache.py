"""Cached kernels are compiled again when any of their sources changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.engine.cpu import kernel_cache as module
from server.engine.cpu.kernel_cache import MAX_FOLDERS, PREFIX, SOURCES, kernel_cache, source_digest

pytestmark = pytest.mark.slow

PROGRAM = """
import torch
from server.engine.cpu import row_kernels
rows, more = torch.full((1, 4), 2.0), torch.full((1, 4), 3.0)
row_kernels.add(rows, more)
print(more.tolist())
"""


def run(package: Path, cache: Path) -> str:
    """The output of a program that adds rows by a kernel of a copy of the package."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=package, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_changed_helper_changes_the_kernels_that_inline_it(tmp_path: Path) -> None:
    package, cache = tmp_path / "package", tmp_path / "cache"
    for file in ("__init__.py", "engine/__init__.py", *(f"engine/cpu/{path.name}" for path in SOURCES.glob("*.py"))):
        target = package / "server" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCES.parents[1] / file, target)
    assert run(package, cache) == "[[5.0, 5.0, 5.0, 5.0]]"
    kernels = {path: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")}
    assert kernels
    assert run(package, cache) == "[[5.0, 5.0, 5.0, 5.0]]"
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")} == kernels  # the second start only reads
    helper = package / "server/engine/cpu/compiled.py"
    source = helper.read_text()
    assert source.count("return lambda element: element\n") == 1
    helper.write_text(source.replace("return lambda element: element\n", "return lambda element: -element\n"))
    assert run(package, cache) == "[[-5.0, -5.0, -5.0, -5.0]]"


def test_the_digest_covers_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    first = source_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = source_digest(tmp_path)
    (tmp_path / "b.py").write_text("x = 2")
    assert len({first, renamed, source_digest(tmp_path)}) == 3
    (tmp_path / "note.txt").write_text("no source")
    assert source_digest(tmp_path) == source_digest(tmp_path)


def test_old_folders_are_deleted_and_the_current_one_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    for age in range(MAX_FOLDERS + 3):
        old = tmp_path / f"{PREFIX}{age}"
        old.mkdir()
        os.utime(old, (age, age))
    (tmp_path / "somebody's").mkdir()
    current = kernel_cache()
    assert current is not None
    left = {path.name for path in tmp_path.iterdir()}
    newest = {f"{PREFIX}{age}" for age in range(4, MAX_FOLDERS + 3)}
    assert left == {current.name, "somebody's"} | newest


def test_without_a_writable_place_there_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(file))
    assert kernel_cache() is None
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "__pycache__").touch()  # a file where the folder would be
    found = module.kernel_cache(sources)
    assert found is not None
    assert found.parent == tmp_path / "home" / "prelude"


def test_without_a_cache_kernels_are_compiled_at_each_start(tmp_path: Path) -> None:
    """Containers may run from read-only file systems."""
    file = tmp_path / "file"
    file.touch()
    program = "from server.engine.cpu import row_kernels; print(type(row_kernels._norm_row._cache).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NUMBA_CACHE_DIR": str(file)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "NullCache"
