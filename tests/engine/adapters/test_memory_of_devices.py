"""How much memory adapters of running sequences may take on a device."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import engine
from server.config import EngineSettings
from server.engine.adapters.loader import held_adapter_bytes
from server.engine.model.platform import CPUPlatform, CUDAPlatform, Platform


@pytest.mark.parametrize(("has_own_memory", "held"), [(False, 100), (True, 30)])
def test_the_memory_of_a_device_limits_what_sequences_hold(has_own_memory: bool, held: int) -> None:
    settings = EngineSettings(model="m", adapter_host_bytes=100, adapter_device_bytes=30)
    assert held_adapter_bytes(settings, has_own_memory=has_own_memory) == held


def test_only_gpus_have_their_own_memory() -> None:
    assert [kind.has_own_memory for kind in (Platform, CPUPlatform, CUDAPlatform)] == [False, False, True]


def test_nothing_but_the_platform_asks_for_the_kind_of_device() -> None:
    folder = Path(engine.__file__).parent
    asking = [path.name for path in folder.rglob("*.py") if "device.type" in path.read_text()]
    assert asking == ["platform.py"]
