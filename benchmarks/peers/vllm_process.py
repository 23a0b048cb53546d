"""vLLM in a process of another interpreter; it is started once and performs any number of tasks."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.peers.protocol import next_reply
from benchmarks.peers.token_times import TokenTimes

ROOT = Path(__file__).parents[2]


class VllmProcess:
    """A running process.

    Args:
        process: Runs ``benchmarks.peers.vllm_cpu``, with pipes.
        folder: For the files of tasks, and the process's log.

    Attributes:
        facts: Version and limits, for the figures.

    Raises:
        RuntimeError: If vLLM did not start.
    """

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process has no pipes")
        self._process, self._folder = process, folder
        self._tasks: IO[str] = process.stdin
        self._lines: IO[str] = process.stdout
        self._num_tasks = 0
        self.facts: dict[str, object] = self._next_reply()

    def task(self, kind: str, **arguments: object) -> str:
        """Write a task to a file; returns its name for ``perform``."""
        self._num_tasks += 1
        path = self._folder / f"task{self._num_tasks}.json"
        path.write_text(json.dumps({"kind": kind, **arguments}))
        return str(path)

    def perform(self, task: str) -> Any:
        """Perform a task; returns its result.

        Raises:
            RuntimeError: If vLLM ended.
        """
        self._tasks.write(task + "\n")
        self._tasks.flush()
        return self._next_reply()

    def generate_task(self, prompts: Sequence[list[int]], new_tokens: int) -> str:
        """A task whose result is the number of new tokens and the seconds."""
        return self.task("generate", prompts=prompts, new_tokens=new_tokens)

    def token_times(
        self, texts: Sequence[list[int]], decodes: Sequence[list[int]], *, steps_between: int, decode_tokens: int
    ) -> TokenTimes:
        """``measure_token_times`` in that process."""
        task = self.task(
            "token_times", texts=texts, decodes=decodes, steps_between=steps_between, decode_tokens=decode_tokens
        )
        return TokenTimes(**self.perform(task))

    def _next_reply(self) -> Any:
        try:
            return next_reply(self._lines)
        except EOFError as error:
            log = log_file(self._folder).read_text()[-2000:]
            raise RuntimeError(f"vLLM ended with status {self._process.wait()}: {log}") from error


def log_file(folder: Path) -> Path:
    """Where the process's standard error goes."""
    return folder / "vllm.log"


@contextmanager
def vllm_process(
    python: Path,
    model_folder: Path,
    dtype: str,
    *,
    max_num_seqs: int,
    kv_cache_gib: int = 2,
    steps_on_call: bool = False,
    lora: tuple[int, int] | None = None,
) -> Iterator[VllmProcess]:
    """Start vLLM without prefix caching.

    Args:
        python: Interpreter of an environment with vLLM.
        model_folder: The model.
        dtype: Of its weights and its cache.
        max_num_seqs: Maximum number of sequences in one step.
        kv_cache_gib: Size of the key/value cache.
        steps_on_call: Whether a step is computed only when it is called, as ``token_times`` needs it.
        lora: Number of adapters in one step, and their largest rank; None for a process without adapters.
    """
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{torch.get_num_threads() - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if steps_on_call else "1",
    }
    numbers = (max_num_seqs, *(lora or ()))
    folder = Path(tempfile.mkdtemp(prefix="vllm", dir=model_folder.parent))
    with log_file(folder).open("w") as log:
        process = subprocess.Popen(
            [python.absolute(), "-m", "benchmarks.peers.vllm_cpu", model_folder, dtype, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=environment,
        )
    try:
        yield VllmProcess(process, folder)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(timeout=60)
