"""Each platform serves its device, and imports no library of another platform."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from server.demo.tour import MODEL_DIRECTORY
from server.engine.attention.backend import SDPABackend
from server.engine.cpu import row_kernels
from server.engine.model.platform import CPUPlatform, CUDAPlatform, Platform, choose_platform
from server.errors import EngineStartError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SERVE = f"""
from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.types import GenerateRequest, SamplingParams

def serve(platform=None):
    settings = EngineSettings(model={str(MODEL_DIRECTORY)!r}, dtype="float32", kv_cache_memory=1 << 24, num_threads=1)
    engine = LLMEngine(settings, platform=platform)
    params = SamplingParams(max_tokens=5, temperature=0.0)
    engine.add(GenerateRequest(request_id="r", prompt_token_ids=[5, 6, 7, 8], params=params))
    tokens = []
    while engine.num_unfinished:
        tokens += [token for output in engine.step() for token in output.token_ids]
    engine.close()
    return engine, tokens
"""
HIDE = """
import sys
asked = []
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            frame = sys._getframe(1)
            while frame.f_globals["__name__"].startswith(("importlib", "_frozen_importlib")):
                frame = frame.f_back
            asked.append(frame.f_globals["__name__"])
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def compiled_tokens() -> str:
    script = f"""{SERVE}
engine, tokens = serve()
assert type(engine.runner.backend).__name__ == "CPUBackend"
print(tokens)
"""
    return run(script, CUDA_VISIBLE_DEVICES="").stdout.strip()


def test_on_a_cpu_only_torch_imports_triton(compiled_tokens: str) -> None:
    script = f"""HIDDEN = {{"triton"}}
{HIDE}
{SERVE}
import server.engine.process.engine_process
engine, tokens = serve()
assert type(engine.runner.backend).__name__ == "CPUBackend"
assert not [name for name in sys.modules if name.startswith(("triton", "server.engine.cuda"))]
assert not [name for name in asked if not name.startswith("torch.")], asked
print(tokens)
"""
    assert run(script, CUDA_VISIBLE_DEVICES="").stdout.strip() == compiled_tokens


def test_on_a_gpu_numba_is_not_imported(compiled_tokens: str) -> None:
    """Without a GPU, in Triton's interpreter."""
    pytest.importorskip("triton")
    script = f"""HIDDEN = {{"numba", "llvmlite"}}
{HIDE}
{SERVE}
import server.engine.process.engine_process, torch
from types import SimpleNamespace
from server.engine.model import exactness
from server.engine.model.platform import CUDAPlatform, Platform

exactness.PROBE_KEYS = 48
torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=4)
platform = CUDAPlatform(torch.device("cpu"))
torch.cuda.is_available = lambda: False
platform.recorder = platform.device_memory = platform.copy_stream = lambda: None
engine, tokens = serve(platform)
assert type(engine.runner.backend).__name__ == "TritonBackend"
assert not [name for name in sys.modules if name.startswith(("numba", "llvmlite", "server.engine.cpu"))]
assert asked == []
print(tokens)
"""
    assert run(script, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1").stdout.strip() == compiled_tokens


def test_a_cpu_without_numba_serves_by_torch_and_says_so(compiled_tokens: str) -> None:
    script = f"""HIDDEN = {{"numba", "llvmlite"}}
{HIDE}
{SERVE}
import logging, torch
logging.basicConfig()
engine, tokens = serve()
assert type(engine.runner.backend).__name__ == "SDPABackend"
assert torch.get_num_threads() == 1
print(tokens)
"""
    done = run(script, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="2")
    assert done.stdout.strip() == compiled_tokens
    assert "Numba is not installed" in done.stderr
    assert "pip install 'prelude-server[cpu]'" in done.stderr


def test_a_failed_import_of_our_own_is_not_taken_for_a_missing_numba() -> None:
    script = f"""HIDDEN = {{"server.engine.cpu.vector_code"}}
{HIDE.replace('name.partition(".")[0]', "name")}
from server.engine.model.platform import CPUPlatform
try:
    CPUPlatform()
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run(script).stdout.strip() == "server.engine.cpu.vector_code"


def test_the_process_that_starts_an_engine_imports_no_torch() -> None:
    run("import sys, server.engine.process.connection\nassert 'torch' not in sys.modules")


def test_only_the_platform_reads_the_kind_of_device() -> None:
    engine = ROOT / "server" / "engine"
    asking = [path.relative_to(engine) for path in engine.rglob("*.py") if "device.type" in path.read_text()]
    assert asking == [Path("model/platform.py")]


def test_the_platform_follows_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for setting in ("auto", "cpu"):
        platform = choose_platform(setting)
        assert (type(platform), platform.name) == (CPUPlatform, "cpu")
    with pytest.raises(EngineStartError, match="torch finds no CUDA device"):
        choose_platform("cuda")
    with pytest.raises(EngineStartError, match="torch finds no CUDA device"):
        CUDAPlatform()


@pytest.mark.parametrize(
    ("built_for", "words"),
    [
        (None, "is built without CUDA; install torch's CUDA build"),
        ("12.8", "is built for CUDA 12.8, and finds no GPU or a"),
    ],
)
def test_a_missing_or_old_cuda_is_explained(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(EngineStartError, match=words):
        choose_platform("cuda")


def test_the_plain_platform_changes_nothing() -> None:
    platform = Platform(torch.device("cpu"))
    num_threads = torch.get_num_threads()
    platform.set_num_threads(None)
    assert torch.get_num_threads() == num_threads
    assert platform.backends == (SDPABackend,)
    assert platform.best_dtype(torch.float16) is torch.float16
    assert platform.recorder() is None
    assert platform.device_memory() is None
    free, share = platform.free_memory()
    assert free > 0
    assert 0 < share < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_largest_logits_of_a_cpu_equal_torch(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 33).to(dtype).t()[::3]  # not contiguous
    values, tokens = CPUPlatform().largest(logits)
    expected = torch.max(logits, dim=-1)
    assert torch.equal(values.to(dtype), expected.values)
    assert torch.equal(logits.gather(1, tokens[:, None])[:, 0], expected.values)
    assert row_kernels.can_compile(dtype) == (dtype in {torch.float32, torch.bfloat16})
