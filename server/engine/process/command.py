"""How the process of each engine is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import prompt_store
import server
from server.config import EngineSettings
from server.engine.model.environment import threads_and_memory
from server.errors import EngineStartError
from server.logs import variables as log_variables

NATIVE, VLLM = "server.engine.process.engine_process", "server.engine.vllm.main"

_VLLM_VARIABLES = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CONFIGURE_LOGGING": "0"}
"""Defaults for vLLM: no report to anyone, and no log format of its own."""

_VLLM_ONLY = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "quantization",
    "engine_args",
    "max_loras",
    "vllm_metrics",
)
"""Settings that mean nothing to the native engine."""


def command(settings: EngineSettings) -> list[str]:
    """The interpreter and the module to run; the caller appends the file descriptor.

    Raises:
        EngineStartError: If the settings lack an interpreter, it does not exist, or they are for the other engine.
    """
    if settings.engine == "native":
        defaults = EngineSettings(model=settings.model)
        for name in _VLLM_ONLY:
            if getattr(settings, name) != getattr(defaults, name):
                raise EngineStartError(
                    f"--{name.replace('_', '-')} is for --engine vllm; the native engine has no use for it"
                )
        return [sys.executable, "-m", NATIVE]
    if settings.engine_python is None:
        raise EngineStartError("--engine vllm needs --engine-python: the interpreter of an environment with vLLM")
    # Not resolved, because a link to an interpreter is how it finds its environment.
    path = Path(settings.engine_python).expanduser().absolute()
    if not path.is_file() or not os.access(path, os.X_OK):
        raise EngineStartError(f"--engine-python {settings.engine_python} is no program that can be run")
    return [str(path), "-m", VLLM]


@contextmanager
def environment(settings: EngineSettings) -> Iterator[dict[str, str]]:
    """The environment of the process, which needs it as long as it runs.

    It logs as this process does, and the operator's variables take precedence. Another interpreter finds our packages
    through a folder of links: the folder that they are installed in holds torch, too, in another version.
    """
    variables = {**os.environ, **log_variables()}
    if settings.engine == "native":
        yield {**variables, **threads_and_memory(os.environ)}
        return
    with TemporaryDirectory(prefix="prelude-engine-", ignore_cleanup_errors=True) as folder:
        for package in (server, prompt_store):
            (Path(folder) / package.__name__).symlink_to(Path(str(package.__file__)).parent)
        yield {**_VLLM_VARIABLES, **_threads(settings), **variables, "PYTHONPATH": _first(folder, os.environ)}


def _threads(settings: EngineSettings) -> dict[str, str]:
    """The processors of each of vLLM's workers; vLLM itself finds none for several on one memory node."""
    num_workers = settings.tensor_parallel_size * settings.pipeline_parallel_size
    if settings.num_threads is None and num_workers == 1:
        return {}
    processors = sorted(os.sched_getaffinity(0))[: settings.num_threads]
    share = max(1, len(processors) // num_workers)
    parts = [processors[share * index : share * (index + 1)] or processors[-1:] for index in range(num_workers)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in parts)}


def _first(folder: str, environment: Mapping[str, str]) -> str:
    others = environment.get("PYTHONPATH")
    return folder if not others else f"{folder}{os.pathsep}{others}"
