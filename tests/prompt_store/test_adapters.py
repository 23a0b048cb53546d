"""Adapters in the store: published from the files of PEFT, and leased with both files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from prompt_store.errors import CorruptBlobError, InvalidPromptError
from prompt_store.store import PromptStore
from prompt_store.types import BaseModelSpec, ModuleShape, PromptKind, PromptRef
from tests.prompt_store.conftest import Publish

Files = dict[str, tuple[bytes, bytes]]
NAME = "base_model.model.model.layers.0.q_proj"


@pytest.fixture(scope="session")
def base(base: BaseModelSpec) -> BaseModelSpec:
    return replace(base, modules={"model.layers.0.q_proj": ModuleShape("linear", 32, 24)})


def lora(value: float = 1.0, **fields: Any) -> tuple[bytes, bytes]:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | fields
    tensors = {f"{NAME}.lora_A.weight": np.full((4, 32), value, np.float16)}
    tensors[f"{NAME}.lora_B.weight"] = np.full((24, 4), value, np.float16)
    return json.dumps(config).encode(), save(tensors)


def test_an_adapter_is_published_and_leased_with_its_configuration(
    store: PromptStore, publish: Publish, peft_files: Files
) -> None:
    version, is_new = publish(store, lora())
    assert (is_new, version.kind, version.peft_type.value) == (True, PromptKind.ADAPTER, "LORA")
    assert (version.rank, version.num_modules, version.num_parameters) == (4, 1, 4 * 32 + 24 * 4)
    assert (version.targets, version.num_virtual_tokens, version.dtype) == (("q_proj",), 0, "F16")
    assert publish(store, lora()) == (version, False)
    assert publish(store, peft_files["prompt_tuning"])[0].version == 2
    with store.leased(PromptRef("p", version=1, alias=None)) as leased:
        store.delete_prompt("p", force=True)
        assert leased.config_path is not None
        assert (leased.config_path.read_bytes(), leased.weights_path.read_bytes()) == lora()
        assert store.totals().num_prompts == 0
    store.restore("p")
    with store.leased(PromptRef("p")) as leased:
        assert (leased.version.version, leased.config_path) == (2, None)


def test_a_lost_configuration_is_reported(store: PromptStore, publish: Publish, tmp_path: Path) -> None:
    version, _ = publish(store, lora())
    (config,) = (file for file in version.files if file.filename == "adapter_config.json")
    (path,) = (tmp_path / "store" / "blobs").rglob(config.sha256)
    path.unlink()
    for _ in range(2):  # nothing stays pinned
        with pytest.raises(CorruptBlobError):
            store.lease(PromptRef("p"))
    with pytest.raises(CorruptBlobError, match="no configuration"):
        store._leases.add(replace(version, files=version.files[1:]))


def test_a_soft_prompt_is_published_over_an_adapter(store: PromptStore, publish: Publish, peft_files: Files) -> None:
    publish(store, lora(), "lora")
    version, _ = publish(store, peft_files["prompt_tuning"], "p", over="lora@1")
    assert version.over == "lora@1"
    for over in ("lora", "lora@latest", "lora@0", "Lora@1"):
        with pytest.raises(ValueError, match="over must name a version|not valid|not a version"):
            publish(store, peft_files["p_tuning"], "p", over=over)
    with pytest.raises(ValueError, match="this is an adapter"):
        publish(store, lora(2.0), "other", over="lora@1")
    with pytest.raises(InvalidPromptError, match="does not exist"):
        publish(store, peft_files["p_tuning"], "p", over="lora@2")
    assert store.totals().num_versions == 2


def test_names_are_listed_by_kind(store: PromptStore, publish: Publish, peft_files: Files) -> None:
    publish(store, lora(), "lora")
    publish(store, peft_files["prompt_tuning"], "rows")
    names = {kind: [summary.name for summary in store.list_prompts(kind=kind)[0]] for kind in (None, *PromptKind)}
    assert names == {None: ["lora", "rows"], PromptKind.ADAPTER: ["lora"], PromptKind.SOFT_PROMPT: ["rows"]}
