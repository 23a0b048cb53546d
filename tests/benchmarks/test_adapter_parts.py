"""The parts of ``benchmarks.adapters``: its adapters are PEFT's, and its ways count and time what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from benchmarks.adapter_parts.files import ALL_LINEAR, ATTENTION, write_adapter
from benchmarks.adapter_parts.steps import decodes_way, run_way
from benchmarks.workload import build_model
from prompt_store.files.lora.adapter_layout import adapter_layout
from server.engine.types import ErrorCode, GenerateRequest, Member, RequestFailure, TokenEvent


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), layers=2, vocab_size=64)


@pytest.mark.parametrize("targets", [ALL_LINEAR, ATTENTION])
def test_the_adapters_are_files_of_peft(model_folder: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    files = write_adapter(model_folder, tmp_path / "adapter", rank=3, targets=targets)
    base: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    model: Any = PeftModel.from_pretrained(base, str(files.folder))  # it warns if a weight is missing

    source = files.source("one")
    with safe_open(source.path, "pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    layout = adapter_layout(json.loads(Path(source.config_path).read_text()), shapes)
    assert (len(layout), {module.scale for module in layout}) == (2 * len(targets), {2.0})
    assert files.num_parameters == source.num_parameters
    assert files.num_parameters == sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    assert files.nbytes(torch.bfloat16) == 2 * files.num_parameters
    assert source.digest != files.source("two").digest


class _Engine:
    """Gives each request a token in every step; texts start one step after another."""

    has_work = True

    def __init__(self, failing: str | None = None) -> None:
        self.requests: dict[str, GenerateRequest] = {}
        self.left: dict[str, int] = {}
        self.steps = 0
        self.failing = failing

    @property
    def num_unfinished(self) -> int:
        return len(self.left)

    def add(self, request: GenerateRequest) -> list[TokenEvent]:
        self.requests[request.request_id] = request
        self.left[request.request_id] = request.params.max_tokens
        return []

    def abort(self, request_id: str) -> None:
        self.left.pop(request_id)

    def step(self) -> list[TokenEvent]:
        self.steps += 1
        events = []
        for request_id in list(self.left)[: self.steps]:
            if request_id == self.failing:
                failure = RequestFailure(ErrorCode.FAILED, "the file is gone")
                return [TokenEvent(request_id=request_id, failure=failure)]
            events.append(TokenEvent(request_id=request_id, token_ids=[7]))
            self.left[request_id] -= 1
            if not self.left[request_id]:
                self.left.pop(request_id)
        return events


@pytest.fixture
def requests(model_folder: Path, tmp_path: Path) -> list[tuple[list[int], Member]]:
    source = write_adapter(model_folder, tmp_path / "a", rank=2, targets=ATTENTION).source("one")
    return [([1, 2, 3], Member()), ([4, 5], Member(adapter=source)), ([6], Member())]


def test_only_steps_of_all_decodes_are_timed(requests: list[tuple[list[int], Member]]) -> None:
    engine: Any = _Engine()
    way = decodes_way(engine, requests, 5, longest=20)

    started = engine.steps
    for turn in (1, 2):
        tokens, seconds = way()
        assert (tokens, engine.steps) == (15, started + 5 * turn)
        assert seconds > 0
    assert engine.num_unfinished == len(requests), "they go on in the next turn"
    assert [request.adapter is None for request in engine.requests.values()] == [True, False, True]


@pytest.mark.parametrize(("new_tokens", "count"), [(1, 6), (4, 12)])
def test_a_run_counts_rows_of_a_prefill_or_new_tokens(
    requests: list[tuple[list[int], Member]], new_tokens: int, count: int
) -> None:
    engine: Any = _Engine()

    assert run_way(engine, requests, new_tokens)()[0] == count


def test_a_failed_request_is_an_error(requests: list[tuple[list[int], Member]]) -> None:
    engine: Any = _Engine(failing="1")

    with pytest.raises(RuntimeError, match="the file is gone"):
        run_way(engine, requests, 3)()
