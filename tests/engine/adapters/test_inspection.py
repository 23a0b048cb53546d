"""Inspections of adapters equal the norms of the dense change of each weight."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from server.engine.llm_engine import LLMEngine
from server.engine.messages import AdapterInspection, InspectAdapter, Inspected, encode_frame, from_engine_decoder
from server.engine.types import AdapterSource, ErrorCode, RequestFailure
from tests.support.engine.adapters import ADAPTERS, Adapted, make_adapters
from tests.support.engine.harness import Family
from tests.support.presence import present

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapted(make_family: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return make_adapters(make_family("llama"), tmp_path_factory.mktemp("adapters"))


def inspect(engine: LLMEngine, source: AdapterSource) -> AdapterInspection | RequestFailure:
    answers: queue.SimpleQueue[Inspected] = queue.SimpleQueue()
    engine.inspect(InspectAdapter(7, source), answers.put)
    answer = answers.get(timeout=60)
    assert answer.inspection_id == 7
    decoded = from_engine_decoder.decode(encode_frame(answer)[4:])
    assert isinstance(decoded, Inspected)
    assert isinstance(decoded.outcome, AdapterInspection | RequestFailure)
    return decoded.outcome


def dense_changes(adapted: Adapted, kind: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The weight and its change, by the module's name, from PEFT's merge of the adapter."""
    base = dict(adapted.family.model.named_modules())
    if kind == "bias":  # PEFT cannot merge it into layers without a bias
        layers = adapted.models[kind].base_model.model.named_modules()
        return {
            name: (base[name].weight.detach(), layer.get_delta_weight("default").detach())
            for name, layer in layers
            if hasattr(layer, "get_delta_weight")
        }
    model = copy.deepcopy(adapted.models[kind]).merge_and_unload()
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and name in base and not torch.equal(weight, base[name].weight):
            found[name] = base[name].weight.detach(), (weight - base[name].weight).detach()
    return found


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "head_and_embeddings"])
def test_norms_are_those_of_the_dense_change(
    kind: str, adapted: Adapted, make_engine: Callable[..., LLMEngine]
) -> None:
    outcome = inspect(make_engine(adapted.family), adapted.sources[kind])
    assert isinstance(outcome, AdapterInspection)
    want = dense_changes(adapted, kind)
    assert [module.name for module in outcome.modules] == list(want)
    for module in outcome.modules:
        weight, change = want[module.name]
        frobenius = float(change.norm())
        assert module.frobenius_norm == pytest.approx(frobenius, rel=1e-4)
        assert module.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(change, 2)), rel=2e-2)
        assert module.share == pytest.approx(frobenius / float(weight.norm()), rel=1e-4)
        assert (module.rank == 0) == (kind == "ia3")
    assert len({(module.rank, module.scale) for module in outcome.modules}) == (3 if kind == "all_rslora" else 1)


def test_head_and_embeddings_are_measured(adapted: Adapted, make_engine: Callable[..., LLMEngine]) -> None:
    outcome = inspect(make_engine(adapted.family), adapted.sources["head_and_embeddings"])
    assert isinstance(outcome, AdapterInspection)
    peft = dict(adapted.models["head_and_embeddings"].named_modules())
    found = {module.name: module for module in outcome.modules}
    assert found.keys() == {"model.embed_tokens", "lm_head"}
    layer = peft["base_model.model.model.embed_tokens"]
    change = layer.get_delta_weight("default").detach()
    table = present(adapted.family.model.get_input_embeddings()).weight.detach()
    module = found["model.embed_tokens"]
    assert module.frobenius_norm == pytest.approx(float(change.norm()), rel=1e-4)
    assert module.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(change, 2)), rel=1e-4)
    assert module.share == pytest.approx(float(change.norm() / table.norm()), rel=1e-4)


def test_an_adapter_that_cannot_be_read_is_reported(
    adapted: Adapted, tmp_path: Path, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(adapted.family)
    gone = msgspec.structs.replace(adapted.sources["dora"], path=str(tmp_path / "gone"))
    outcome = inspect(engine, gone)
    assert isinstance(outcome, RequestFailure)
    assert outcome.code is ErrorCode.FAILED
    assert isinstance(inspect(engine, adapted.sources["dora"]), AdapterInspection)
