"""How the process of each engine is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.config import EngineSettings
from server.engine.process.command import command, environment
from server.engine.process.connection import launch
from server.errors import EngineStartError

anyio = pytest.mark.anyio


def settings(**more: Any) -> EngineSettings:
    return EngineSettings(model="m", **{"engine": "vllm", **more})


def test_the_native_engine_runs_in_this_interpreter() -> None:
    assert command(EngineSettings(model="m"))[0] == sys.executable


@pytest.mark.parametrize(
    "of_vllm",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"quantization": "fp8"},
        {"engine_args": "{}"},
        {"max_loras": 4},
        {"vllm_metrics": True},
    ],
    ids=lambda of_vllm: next(iter(of_vllm)),
)
def test_the_native_engine_refuses_settings_of_vllm(of_vllm: dict[str, Any]) -> None:
    flag = next(iter(of_vllm)).replace("_", "-")
    with pytest.raises(EngineStartError, match=f"--{flag} is for --engine vllm"):
        command(EngineSettings(model="m", **of_vllm))


def test_another_interpreter_is_not_resolved(tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert command(settings(engine_python=str(link)))[0] == str(link)


@pytest.mark.parametrize(
    ("python", "words"),
    [
        (None, "--engine-python"),
        ("/nowhere/python", "no program"),
        (__file__, "no program"),
        (str(Path(__file__).parent), "no program"),
    ],
)
def test_an_interpreter_that_cannot_be_run_is_refused(python: str | None, words: str) -> None:
    with pytest.raises(EngineStartError, match=words):
        command(settings(engine_python=python))


def test_another_interpreter_finds_our_packages_and_no_others_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    code = "import server.config, prompt_store, sys; print(server.__path__, sys.path[1:3])"
    with environment(settings()) as variables:
        folder, others = variables["PYTHONPATH"].split(os.pathsep)
        assert others == "/somewhere"
        assert {path.name for path in Path(folder).iterdir()} == {"server", "prompt_store"}
        found = subprocess.run(
            [sys.executable, "-S", "-c", code], env=variables, cwd="/", capture_output=True, text=True, check=True
        )
        assert f"{folder}/server" in found.stdout
    assert not Path(folder).exists()


def test_the_operators_variables_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "7")
    with environment(settings(num_threads=1)) as variables:
        assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "7"
        assert variables["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(
    ("processors", "more", "bound"),
    [
        ({0, 1, 2, 3}, {}, None),
        ({0, 1, 2, 3}, {"num_threads": 2}, "0,1"),
        ({0, 1, 2, 3}, {"tensor_parallel_size": 2}, "0,1|2,3"),
        ({4, 5, 6, 7}, {"tensor_parallel_size": 2, "num_threads": 2}, "4|5"),
        ({2, 3}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "2|3|3|3"),
    ],
)
def test_processors_are_divided_among_the_workers(
    processors: set[int], more: dict[str, int], bound: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: processors)
    with environment(settings(**more)) as variables:
        assert variables.get("VLLM_CPU_OMP_THREADS_BIND") == bound


@anyio
async def test_an_environment_without_vllm_is_refused_in_words() -> None:
    with pytest.raises(EngineStartError, match="cannot import what engine vllm needs: No module named 'vllm'"):
        await launch(settings(engine_python=sys.executable))


@anyio
async def test_the_native_engines_settings_start_no_other_process() -> None:
    with pytest.raises(EngineStartError, match="--engine-python"):
        await launch(settings())
