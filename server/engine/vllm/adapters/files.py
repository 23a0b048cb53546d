"""Adapters of the registry in the form that vLLM loads: a folder with PEFT's two files.

vLLM matches the patterns of ``adapter_config.json`` with a backtracking engine, and stops at tensors that are copies
of the base's. So the configuration is written anew, from the tensors that are there, without the uploader's patterns.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from prompt_store.errors import InvalidPromptError
from prompt_store.files.lora.adapter_layout import adapter_layout
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, AdaptedModule, ModuleShape
from server.engine.types import AdapterSource

PARTS = ("A", "B")
"""The parts of an adapted module that vLLM applies."""


class AdapterRefusedError(Exception):
    """vLLM cannot apply this adapter to this base; the message says why."""


class AdapterUnreadableError(Exception):
    """An adapter's files are missing or damaged."""


def write_folder(source: AdapterSource, folder: Path, *, modules: Mapping[str, ModuleShape], max_rank: int) -> None:
    """Write a new folder that vLLM can load; the weights are linked where nothing has to be left out.

    Args:
        source: The adapter; its files have to stay as long as the folder is used.
        folder: Where; it must not exist.
        modules: The modules of the base, as in ``ModelInfo``.
        max_rank: The largest rank that vLLM has memory for.

    Raises:
        AdapterRefusedError: If vLLM cannot apply it.
        AdapterUnreadableError: If its files cannot be read.
    """
    try:
        fields = json.loads(Path(source.config_path).read_bytes())
        with safe_open(source.path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        adapted = adapter_layout(fields, shapes)
    except InvalidPromptError as error:
        raise AdapterRefusedError(str(error)) from error
    except Exception as error:  # of any kind: the files may be missing or damaged
        raise AdapterUnreadableError(f"adapter {source.digest[:12]} cannot be read: {error}") from error
    for module in adapted:
        _check(source, module, shapes, modules, max_rank)
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config_of(adapted)))
    names = {name for module in adapted for name in module.tensors.values()}
    if names == shapes.keys():
        (folder / WEIGHTS_FILE).symlink_to(Path(source.path).absolute())
        return
    with safe_open(source.path, framework="pt") as file:
        save_file({name: file.get_tensor(name) for name in sorted(names)}, folder / WEIGHTS_FILE)


def config_of(adapted: Iterable[AdaptedModule]) -> dict[str, object]:
    """The fields of ``adapter_config.json`` that give these modules their ranks and scales."""
    modules = list(adapted)
    (rank, scale), _ = Counter((module.rank, module.scale) for module in modules).most_common(1)[0]
    others = [module for module in modules if (module.rank, module.scale) != (rank, scale)]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted({module.name.rpartition(".")[2] for module in modules}),
        "rank_pattern": {re.escape(module.name): module.rank for module in others},
        "alpha_pattern": {re.escape(module.name): module.scale * module.rank for module in others},
    }


def _check(
    source: AdapterSource,
    module: AdaptedModule,
    shapes: Mapping[str, tuple[int, ...]],
    modules: Mapping[str, ModuleShape],
    max_rank: int,
) -> None:
    """Check what the upload was checked for, too: the server may have had another engine or base then."""
    named = f"adapter {source.digest[:12]}"
    shape = modules.get(module.name)
    if shape is None or shape.unsupported is not None:
        why = "which is no module of this base" if shape is None else f"and {shape.unsupported}"
        raise AdapterRefusedError(f"{named} changes {module.name}, {why}")
    others = sorted(module.tensors.keys() - set(PARTS))
    if others:
        raise AdapterRefusedError(
            f"{named} has {module.tensors[others[0]]}; engine vllm applies lora_A and lora_B alone, no DoRA, IA3 or "
            "lora_bias"
        )
    if module.rank > max_rank:
        raise AdapterRefusedError(
            f"{named} has rank {module.rank} in {module.name}; the limit of this server is {max_rank} "
            "(--max-adapter-rank)"
        )
    found = (shapes[module.tensors["A"]][1], shapes[module.tensors["B"]][0])
    if found != (shape.in_features, shape.out_features):
        raise AdapterRefusedError(
            f"{named} adapts {module.name} from {found[0]} to {found[1]} features; this base has "
            f"{shape.in_features} and {shape.out_features}"
        )
