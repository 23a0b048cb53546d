"""What a request tells the connector: it survives the way to vLLM's processes, and tells adapters apart."""

from __future__ import annotations

import msgspec
import pytest

from server.engine.types import AdapterSource, SoftPromptSource
from server.engine.vllm.use import Role, Use, source_with, use_of

ADAPTERS = [AdapterSource(digest=name, path="/a", config_path="/c", num_parameters=1) for name in "ab"]


def source(*, is_key_values: bool) -> SoftPromptSource:
    return SoftPromptSource(digest="s", num_virtual_tokens=2, is_key_values=is_key_values, path="/s", task_id=1)


def test_a_use_survives_the_way_through_json() -> None:
    use = Use(request_id="r", role=Role.LOAD, source=source(is_key_values=True), adapter="a")
    assert use_of(msgspec.json.decode(msgspec.json.encode(use.to_params()))) == use
    assert use_of(None) is None


@pytest.mark.parametrize("params", [{}, {"request_id": 1}, {"request_id": "r", "role": "other"}, "text"])
def test_params_of_others_are_no_use(params: object) -> None:
    assert use_of(params) is None


def test_embeddings_have_other_keys_and_values_under_each_adapter() -> None:
    rows = source(is_key_values=False)
    found = [source_with(rows, adapter) for adapter in (None, *ADAPTERS)]
    assert len({one.identity for one in found if one is not None}) == 3
    assert all(one is not None and one.path == rows.path and one.task_id == 1 for one in found)


def test_keys_and_values_are_the_same_under_every_adapter() -> None:
    prefix = source(is_key_values=True)
    assert source_with(prefix, ADAPTERS[0]) == source_with(prefix, None) == prefix
    assert source_with(None, ADAPTERS[0]) is None
