"""Triton loads its C library from the folder of the image's build, and needs no compiler then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from server.engine.cuda import triton_launcher

HEADER = Path(sysconfig.get_paths()["include"], "Python.h")
needs_a_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None or not HEADER.exists(), reason="needs gcc and Python's headers (python3-dev)"
)
LOAD = """
import sys
from pathlib import Path
from server.engine.cuda.triton_launcher import use_prebuilt
from triton.backends.nvidia import driver
from triton.runtime.build import compile_module_from_src
if len(sys.argv) > 1:
    use_prebuilt(Path(sys.argv[1]))
source = Path(driver.dirname, "driver.c").read_text()
module = compile_module_from_src(
    source, "cuda_utils", library_dirs=[], include_dirs=driver.include_dirs, libraries=driver.libraries
)
print(callable(module.launch), callable(module.load_binary))
"""
COMPILE = """
import sys
from pathlib import Path
from server.engine.cuda.triton_launcher import use_prebuilt
from triton import knobs
from triton.runtime.build import compile_module_from_src
use_prebuilt(Path(sys.argv[1]))
source = '''#include <Python.h>
static struct PyModuleDef own = {PyModuleDef_HEAD_INIT, "own", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_own(void) { return PyModule_Create(&own); }
'''
print(compile_module_from_src(source, "own").__name__, knobs.build.impl is not None)
"""


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prebuilt")
    assert triton_launcher.build(folder).parent == folder
    return folder


@pytest.fixture
def cuda(prebuilt: Path, tmp_path: Path) -> Path:
    """A folder with a stub of the driver's library, with all functions that Triton uses."""
    (library,) = prebuilt.iterdir()
    undefined = subprocess.run(["nm", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = [word for word in undefined.stdout.split() if word.startswith("cu")]
    assert "cuModuleLoadData" in names
    code = "".join(f"int {name}(void) {{ return 0; }}\n" for name in names)
    command = ["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), "-x", "c", "-"]
    subprocess.run(command, input=code, text=True, check=True)
    return tmp_path


def python(code: str, *arguments: Path, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), **variables}
    environment.pop("CC", None)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@needs_a_compiler
def test_the_compiled_library_is_loaded_without_a_compiler(prebuilt: Path, cuda: Path, tmp_path: Path) -> None:
    bare: dict[str, Any] = {"cache": tmp_path / "cache", "PATH": str(tmp_path), "LD_LIBRARY_PATH": str(cuda)}
    without = python(LOAD, **bare)
    assert "Failed to find C compiler" in without.stderr
    done = python(LOAD, prebuilt, **bare)
    assert done.stdout.split() == ["True", "True"], done.stderr


@needs_a_compiler
def test_other_code_is_compiled(prebuilt: Path, tmp_path: Path) -> None:
    done = python(COMPILE, prebuilt, cache=tmp_path / "cache")
    assert done.stdout.split() == ["own", "True"], done.stderr


def test_without_a_compiled_library_triton_is_not_changed(tmp_path: Path) -> None:
    from triton import knobs

    triton_launcher.use_prebuilt(tmp_path / "none")
    assert knobs.build.impl is None


@pytest.mark.parametrize(
    ("compiler", "message"), [(None, "there is no C compiler"), ("false", "false failed")], ids=["none", "failing"]
)
def test_building_without_a_compiler_is_an_error(
    compiler: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _name: compiler)
    with pytest.raises(RuntimeError, match=message):
        triton_launcher.build(tmp_path)


def test_a_triton_that_compiles_while_it_serves_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    with pytest.raises(RuntimeError, match="Triton 3.6.0 compiles a launcher for each kernel .* Triton 3.7 or later"):
        triton_launcher.build(tmp_path)
    monkeypatch.setattr(triton, "__version__", "3.10.0+git1")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(RuntimeError, match="there is no C compiler"):  # the version is right
        triton_launcher.build(tmp_path)
