"""What an engine cannot do is refused by name, before anything is sent to its process."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from server.config import EngineSettings
from server.engine.constraints import Constraint, ConstraintKind
from server.engine.process.async_engine import AsyncEngine
from server.engine.types import (
    ALL_CAPABILITIES,
    AdapterSource,
    Capability,
    GenerateRequest,
    Member,
    ModelInfo,
    SamplingParams,
    SoftPromptSource,
)
from server.errors import UnsupportedByEngineError
from tests.engine.process.test_restarts import MODEL, SOURCE, Launcher

PREFIX = SoftPromptSource(digest="p", num_virtual_tokens=1, is_key_values=True, path="/nowhere")
NEEDS: dict[Capability, dict[str, Any]] = {
    Capability.CLASSIFICATION_HEADS: {"params": SamplingParams(max_tokens=0, classify=True)},
    Capability.KEY_VALUES: {"soft_prompt": PREFIX},
    Capability.MEAN_ENSEMBLES: {"others": (Member(),)},
    Capability.STRUCTURED_OUTPUT: {
        "params": SamplingParams(constraint=Constraint(kind=ConstraintKind.REGEX, text="a"))
    },
}


ADAPTER = AdapterSource(digest="a", path="/nowhere", config_path="/nowhere", num_parameters=1)


def request(**more: Any) -> GenerateRequest:
    return GenerateRequest(request_id="r", prompt_token_ids=[1], **{"params": SamplingParams(), **more})


def without(*capabilities: Capability) -> ModelInfo:
    kept = tuple(name for name in ALL_CAPABILITIES if name not in capabilities)
    return msgspec.structs.replace(MODEL, engine="other", capabilities=kept)


@pytest.mark.anyio
@pytest.mark.parametrize("capability", NEEDS)
async def test_a_request_for_a_missing_capability_is_refused(capability: Capability) -> None:
    launcher = Launcher()
    launcher.script = [without(capability)]
    engine = AsyncEngine(EngineSettings(model="tiny"), launch=launcher.launch)
    await engine.start()
    try:
        with pytest.raises(UnsupportedByEngineError) as refused:
            await anext(engine.generate(request(**NEEDS[capability])))
        assert "engine other does not support" in refused.value.message
        assert f"capability {capability.value}" in refused.value.message
        assert launcher.processes[0].sent == []
        await anext(engine.generate(request(soft_prompt=SOURCE)))
    finally:
        await engine.stop()


@pytest.mark.anyio
async def test_an_engine_that_does_not_inspect_says_so() -> None:
    launcher = Launcher()
    launcher.script = [without(Capability.INSPECTION)]
    engine = AsyncEngine(EngineSettings(model="tiny"), launch=launcher.launch)
    await engine.start()
    try:
        with pytest.raises(UnsupportedByEngineError, match="inspection"):
            await engine.inspect(SOURCE, num_nearest=1)
    finally:
        await engine.stop()


def test_a_prefix_among_the_members_of_an_ensemble_counts() -> None:
    model = without(Capability.KEY_VALUES)
    assert model.missing(request(soft_prompt=SOURCE, others=(Member(),))) is None
    assert (
        model.missing(request(soft_prompt=SOURCE, others=(Member(), Member(soft_prompt=PREFIX))))
        is Capability.KEY_VALUES
    )


@pytest.mark.parametrize("more", [{}, *NEEDS.values()])
def test_the_native_engine_lacks_nothing(more: dict[str, Any]) -> None:
    assert MODEL.engine == "native"
    assert MODEL.missing(request(**more)) is None


@pytest.mark.anyio
async def test_an_engine_without_adapters_refuses_them_and_says_why() -> None:
    launcher = Launcher()
    launcher.script = [msgspec.structs.replace(MODEL, adapters_off="a product is not exact")]
    engine = AsyncEngine(EngineSettings(model="tiny"), launch=launcher.launch)
    await engine.start()
    try:
        for refused in (
            anext(engine.generate(request(adapter=ADAPTER))),
            anext(engine.generate(request(others=(Member(adapter=ADAPTER),)))),
            engine.prepare(SOURCE, ADAPTER),
            engine.inspect_adapter(ADAPTER),
        ):
            with pytest.raises(UnsupportedByEngineError, match="LoRA adapters .*a product is not exact"):
                await refused
        assert launcher.processes[0].sent == []
    finally:
        await engine.stop()
