"""The C library by which Triton launches kernels, compiled ahead of time.

Triton 3.7 and later compile it at the first launch, and need a C compiler then. For an image without a compiler,
``python -m server.engine.cuda.triton_launcher`` compiles it in an earlier build stage into a folder beside this file,
and Triton loads it from there. Without that folder, or with another version of Triton, the library is compiled at
the first launch as usual.

Before 3.7, Triton compiles a launcher for each signature of a kernel. Signatures depend on the model, so the machine
that serves needs a C compiler.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PREBUILT = Path(__file__).with_name("prebuilt")
"""The folder of the compiled library."""

OLDEST = (3, 7)
"""The first version of Triton with one launcher for all kernels."""

_CUDA = "libcuda.so.1"  # the driver's library, which the host provides


def build(folder: Path = PREBUILT) -> Path:
    """Compile the library for the installed versions of Triton and Python; returns the file.

    Raises:
        ImportError: If Triton is not installed.
        RuntimeError: If Triton is older than ``OLDEST``, there is no C compiler, or the compiler fails.
    """
    version: str = importlib.import_module("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise RuntimeError(
            f"Triton {version} compiles a launcher for each kernel while it serves, and needs a C compiler then: "
            f"install Triton {'.'.join(map(str, OLDEST))} or later, or serve with a C compiler"
        )
    backend = Path(importlib.import_module("triton.backends.nvidia").__file__ or "").parent
    source = backend / "driver.c"
    target = folder / _file_name("cuda_utils", source.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as stub:
        # Without a GPU there is no driver library to link with; only the stub's name is recorded.
        _run(_compiler(), "-shared", f"-Wl,-soname,{_CUDA}", "-o", f"{stub}/{_CUDA}", "-x", "c", "/dev/null")
        _compile(source, target, [stub], [str(backend / "include")], [_CUDA])
    return target


def use_prebuilt(folder: Path = PREBUILT) -> None:
    """Let Triton load the compiled library, if the folder exists.

    Raises:
        ImportError: If Triton is not installed.
    """
    knobs: Any = importlib.import_module("triton.knobs").build
    if knobs.impl is not None or not folder.is_dir():
        return

    def find_or_compile(
        name: str,
        source: str,
        folder_of_source: str,
        libraries_in: list[str],
        headers_in: list[str],
        libraries: list[str],
    ) -> str:
        prebuilt = folder / _file_name(name, Path(source).read_text())
        if prebuilt.exists():
            return str(prebuilt)
        target = Path(folder_of_source, f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}")
        _compile(Path(source), target, libraries_in, headers_in, libraries)
        return str(target)

    knobs.impl = find_or_compile


def _compile(
    source: Path, target: Path, libraries_in: Sequence[str], headers_in: Sequence[str], libraries: Sequence[str]
) -> None:
    """Compile a Python extension of one C file, with Triton's flags."""
    python = sysconfig.get_paths(scheme="posix_prefix")["include"]
    _run(
        _compiler(), str(source), "-O3", "-shared", "-fPIC", "-Wno-psabi", "-o", str(target),
        *(f"-I{folder}" for folder in (*headers_in, python)), "-Wl,--no-as-needed",
        *(f"-L{folder}" for folder in libraries_in),
        *(f"-l:{library}" if ".so" in library else f"-l{library}" for library in libraries),
    )  # fmt: skip


def _compiler() -> str:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("there is no C compiler")
    return compiler


def _file_name(name: str, source: str) -> str:
    return f"{name}.{hashlib.sha256(source.encode()).hexdigest()}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the compiler
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    build()
