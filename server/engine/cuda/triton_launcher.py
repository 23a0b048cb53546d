"""The one piece of C code by which Triton launches kernels, compiled before there is a GPU.

Triton compiles it when it first launches something, so wherever it runs there has to be a C compiler. An image whose
last stage has none can be built nevertheless: ``python -m server.engine.cuda.triton_launcher`` compiles it in an
earlier stage, beside this file, and Triton is given that instead. Where nothing was compiled so, or for
another version of Triton, it compiles as ever.
"""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREBUILT = Path(__file__).with_name("prebuilt")
"""Where what was compiled before lies."""

_CUDA = "libcuda.so.1"  # the driver's library, which is the host's


def build(folder: Path = PREBUILT) -> Path:
    """Compile it for the Triton and the Python that are installed; returns the file.

    Args:
        folder: Where to write it.

    Raises:
        ImportError: If there is no Triton.
        RuntimeError: If there is no C compiler, or it fails.
    """
    backend = Path(importlib.import_module("triton.backends.nvidia").__file__ or "").parent
    source = (backend / "driver.c").read_text()
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("there is no C compiler")
    target = folder / _file_name("cuda_utils", source)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        # Where there is no GPU there is no such library either; of this one only the name is kept.
        _run(compiler, "-shared", f"-Wl,-soname,{_CUDA}", "-o", f"{name}/{_CUDA}", "-x", "c", "/dev/null")
        _run(
            compiler, str(backend / "driver.c"), "-O3", "-shared", "-fPIC", "-Wno-psabi", "-o", str(target),
            f"-I{backend / 'include'}", f"-I{sysconfig.get_paths(scheme='posix_prefix')['include']}",
            "-Wl,--no-as-needed", f"-L{name}", f"-l:{_CUDA}",
        )  # fmt: skip
    return target


def use_prebuilt(folder: Path = PREBUILT) -> None:
    """Let Triton take what lies there in place of compiling the same.

    Raises:
        ImportError: If there is no Triton.
    """
    knobs: Any = importlib.import_module("triton.knobs").build
    if knobs.impl is None and folder.is_dir():
        knobs.impl = _taking_from(folder, knobs)


def _taking_from(folder: Path, knobs: Any) -> Callable[..., str]:
    compile_now: Any = importlib.import_module("triton.runtime.build")._build  # noqa: SLF001 - what it calls itself

    def take(name: str, source: str, *arguments: Any) -> str:
        known = folder / _file_name(name, Path(source).read_text())
        if known.exists():
            return str(known)
        knobs.impl = None
        try:
            compiled: str = compile_now(name, source, *arguments, [])
        finally:
            knobs.impl = take
        return compiled

    return take


def _file_name(name: str, source: str) -> str:
    return f"{name}.{hashlib.sha256(source.encode()).hexdigest()}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a compiler's, on Triton's file
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    build()
