"""Soft prompts in the key/value caches of vLLM's GPU backends, without a GPU; run by vLLM's interpreter.

Each case allocates a cache as vLLM does for a backend and a layout, registers it with the connector, and lets the
connector load a prefix, and save and load computed blocks. The backend's own code writes and reads: ``impl`` objects
without their constructors, which look for a GPU. Triton's kernels run in Triton's interpreter. Other kernels are
replaced by their documented arithmetic over the views that the backend passes to them.

    python -m tests.support.without_gpu tests.support.vllm_layouts

prints the outcomes as JSON: by backend, and by layout and parts of a block.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flashinfer
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import get_flashinfer_layout_string
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache, map_kv_caches_to_kernel_blocks

from server.engine.types import SoftPromptSource
from server.engine.vllm.connector import SoftPromptConnector
from server.engine.vllm.residency import Read
from server.engine.vllm.scheduler_side import Commands, Load, Save
from server.engine.vllm.worker_side import Shard, WorkerSide

BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
BLOCK, HEADS, DIM, COUNT = 32, 2, 16, 39
QUERY_HEADS = 4
NUM_BLOCKS = 12
GROUPS = (("model.layers.0.attn", "model.layers.2.attn"), ("model.layers.1.attn", "model.layers.3.attn"))
NUM_LAYERS = 4
FIRST_IDS, SECOND_IDS = ((3, 5), (9, 2)), ((8, 1), (4, 11))
"""Blocks by group. A block belongs to one group at a time: in some layouts the groups share their memory."""
SOURCE = SoftPromptSource(digest="a", num_virtual_tokens=COUNT, is_key_values=True, path="/a")

Rows = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [COUNT, HEADS, DIM]."""


def reshape_and_cache_flash(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *_: object,
) -> None:
    """What vLLM's kernel of this name does: a cache is a pointer and strides of blocks, positions and heads."""
    for rows, cache in ((keys, key_cache), (values, value_cache)):
        assert cache.stride(3) == 1
        assert cache.stride() == key_cache.stride()
        flat = cache.as_strided((cache.untyped_storage().nbytes() // cache.element_size(),), (1,), 0)
        size = cache.shape[1]
        for row, slot in zip(rows, slots.tolist(), strict=True):
            for head in range(cache.shape[2]):
                at = cache.storage_offset() + slot // size * cache.stride(0)
                at += slot % size * cache.stride(1) + head * cache.stride(2)
                flat[at : at + DIM] = row[head]


@dataclass
class Case:
    """A cache in a layout, whose blocks a kernel divides into ``parts``."""

    backend: str
    layout: KVCacheLayout
    parts: int

    def __post_init__(self) -> None:
        self.cls: Any = AttentionBackendEnum[self.backend].get_class()
        spec = {"block_size": BLOCK, "num_kv_heads": HEADS, "head_size": DIM, "dtype": torch.float32}
        groups = [
            KVCacheGroupSpec(list(GROUPS[0]), FullAttentionSpec(**spec)),
            KVCacheGroupSpec(list(GROUPS[1]), SlidingWindowSpec(**spec, sliding_window=64)),
        ]
        cache_config = SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: self.layout,
            num_gpu_blocks_override=NUM_BLOCKS,
            prefix_cache_retention_interval=None,
        )
        config = SimpleNamespace(cache_config=cache_config, attention_config=SimpleNamespace(hisparse_config=None))
        self.kv_cache_config: KVCacheConfig = get_kv_cache_config_from_groups(config, groups, 2**30)
        caches = allocate_kv_cache(
            self.kv_cache_config, torch.device("cpu"), self.layout, [BLOCK // self.parts] * len(groups)
        )
        modules = map_kv_caches_to_kernel_blocks(caches, [])
        self.modules = {name: self.module(cache) for name, cache in modules.items()}
        connector: Any = SoftPromptConnector.__new__(SoftPromptConnector)
        connector._kv_cache_config = self.kv_cache_config
        connector._vllm_config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=self.modules),
            model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: NUM_LAYERS),
        )
        self.rows = torch.randn(COUNT, NUM_LAYERS * 2 * HEADS * DIM)
        self.worker = connector._worker = WorkerSide(Shard(NUM_LAYERS, HEADS, DIM, 0, HEADS), lambda _: self.rows)
        connector.register_kv_caches(caches)
        self.storage = next(iter(caches.values())).untyped_storage()

    def module(self, cache: torch.Tensor) -> Any:
        """An attention layer."""
        one = torch.ones(1)
        impl = self.cls.get_impl_cls().__new__(self.cls.get_impl_cls())
        vars(impl).update(vars(SETTINGS))
        return SimpleNamespace(
            impl=impl, kv_cache=cache, _k_scale=one, _v_scale=one, _q_scale=one, _q_scale_float=1.0,
            _k_scale_float=1.0, _v_scale_float=1.0,
        )  # fmt: skip

    # Reading

    def attention(self, name: str, ids: Sequence[int], query: torch.Tensor) -> torch.Tensor:
        """The backend's attention [1, QUERY_HEADS, DIM] of a query after COUNT positions in these blocks."""
        module = self.modules[name]
        table = torch.tensor([[block * self.parts + part for block in ids for part in range(self.parts)]])
        metadata = SimpleNamespace(
            num_actual_tokens=1,
            query_start_loc=torch.tensor([0, 1]),
            seq_lens=torch.tensor([COUNT], dtype=torch.int32),
            max_query_len=1,
            max_seq_len=COUNT,
            block_table=table.to(torch.int32),
            kv_cache_layout=self.layout,
            causal=True,
            num_decode_tokens=0,
            num_prefill_tokens=1,
            num_prefills=1,
            decode=None,
            q_data_type_prefill=torch.float32,
            use_cascade=False,
            max_num_splits=0,
            **dict.fromkeys(UNUSED),
        )
        self.table = metadata.block_table
        output = torch.zeros(1, QUERY_HEADS, DIM)
        READERS[self.backend](self, module, query, metadata, output)
        return output

    def check(self, ids: Sequence[Sequence[int]], rows_of: Callable[[int], Rows]) -> None:
        """Each layer's attention over these blocks is that over the rows."""
        for group, names in enumerate(GROUPS):
            for name in names:
                query = torch.randn(1, QUERY_HEADS, DIM)
                keys, values = rows_of(int(name.split(".")[2]))
                found = self.attention(name, ids[group], query)
                torch.testing.assert_close(found, attend(query, keys, values), atol=1e-5, rtol=1e-4)

    # The connector

    def report(self) -> None:
        """Wait until the worker has read or saved."""
        until = time.monotonic() + 20
        while (reported := self.worker.take_report()) is None:
            assert time.monotonic() < until
            time.sleep(0.001)
        assert not reported.failed, reported.failed

    def num_written(self) -> int:
        """Values of the whole cache that are not 0."""
        whole = torch.tensor([], dtype=torch.float32).set_(self.storage)
        return int(whole.count_nonzero())

    def prefix(self) -> None:
        """A prefix is written where attention reads it, and nowhere else."""
        self.worker.before_step(Commands(reads=[Read(1, SOURCE)]))
        self.report()
        self.worker.before_step(Commands(loads=[Load(1, 0, COUNT, FIRST_IDS)]))
        whole = self.rows.view(COUNT, NUM_LAYERS, 2, HEADS, DIM)
        self.check(FIRST_IDS, lambda layer: (whole[:, layer, 0], whole[:, layer, 1]))
        assert self.num_written() == self.rows.numel()

    def computed(self) -> None:
        """What a forward pass has written is saved, and read by attention from other blocks."""
        computed = {index: (torch.randn(COUNT, HEADS, DIM), torch.randn(COUNT, HEADS, DIM)) for index in range(4)}
        for ids, names in zip(FIRST_IDS, GROUPS, strict=True):
            slots = torch.tensor([ids[position // BLOCK] * BLOCK + position % BLOCK for position in range(COUNT)])
            for name in names:
                module = self.modules[name]
                module.impl.do_kv_cache_update(module, *computed[int(name.split(".")[2])], module.kv_cache, slots)
        self.check(FIRST_IDS, computed.__getitem__)
        self.worker.after_step(Commands(saves=[Save(2, FIRST_IDS)]))
        self.report()
        torch.tensor([], dtype=torch.float32).set_(self.storage).zero_()
        self.worker.before_step(Commands(loads=[Load(2, 0, COUNT, SECOND_IDS)]))
        self.check(SECOND_IDS, computed.__getitem__)
        assert self.num_written() == sum(keys.numel() + values.numel() for keys, values in computed.values())


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention [1, QUERY_HEADS, DIM] over rows [COUNT, HEADS, DIM]."""
    share = QUERY_HEADS // HEADS
    keys, values = keys.repeat_interleave(share, 1), values.repeat_interleave(share, 1)
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", query, keys) * DIM**-0.5, -1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def gather(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of a sequence, of a cache [blocks, positions, heads, DIM]: position p is in table[p // size]."""
    size = cache.shape[1]
    return torch.stack([cache[table[0, position // size], position % size] for position in range(COUNT)])


def read_flash(case: Case, module: Any, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
    """FLASH_ATTN: its kernel gets k and v [blocks, positions, heads, DIM]."""

    def kernel(*, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, **more: Any) -> None:
        out.copy_(attend(q, gather(k, more["block_table"]), gather(v, more["block_table"])))

    with patch("vllm.v1.attention.backends.flash_attn.flash_attn_varlen_func", kernel, create=True):
        module.impl.forward(module, query, None, None, module.kv_cache, metadata, output)


def read_triton(case: Case, module: Any, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
    """TRITON_ATTN: its own kernel, interpreted."""
    module.impl.forward(module, query, None, None, module.kv_cache, metadata, output)


def read_flashinfer(case: Case, module: Any, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
    """FLASHINFER: its wrapper gets views in the order that it was planned with, NHD or HND."""
    planned = get_flashinfer_layout_string(case.layout)

    class Wrapper:
        _window_left, _logits_soft_cap, _sm_scale, _causal = -1, 0.0, DIM**-0.5, True

        def run(self, q: torch.Tensor, caches: Rows, *, out: torch.Tensor, **more: Any) -> None:
            keys, values = caches if planned == "NHD" else tuple(cache.transpose(1, 2) for cache in caches)
            out.copy_(attend(q, gather(keys, case.table), gather(values, case.table)))

    with (
        patch.object(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", Wrapper),
        patch.object(flashinfer, "BatchAttentionWithAttentionSinkWrapper", type("Other", (), {})),
    ):
        metadata.prefill = flashinfer.FIPrefill(wrapper=Wrapper())
        module.impl.forward(module, query, None, None, module.kv_cache, metadata, output)


UNUSED = (
    "scheduler_metadata",
    "mm_prefix_query_range_tensor",
    "mm_prefix_range_tensor",
    "seq_threshold_3D",
    "num_par_softmax_segments",
    "softmax_segm_output",
    "softmax_segm_max",
    "softmax_segm_expsum",
    "rswa_prefix_lens",
    "rswa_window",
)
"""Parts of a backend's metadata that these cases do not have."""

READERS = {"FLASH_ATTN": read_flash, "FLASHINFER": read_flashinfer, "TRITON_ATTN": read_triton}
SETTINGS = SimpleNamespace(
    attn_type=AttentionType.DECODER,
    num_heads=QUERY_HEADS,
    num_kv_heads=HEADS,
    head_size=DIM,
    scale=DIM**-0.5,
    kv_cache_dtype="auto",
    cache_dtype="auto",
    alibi_slopes=None,
    use_alibi_sqrt=False,
    sliding_window=(-1, -1),
    window_left=-1,
    logits_soft_cap=0,
    sinks=None,
    dcp_world_size=1,
    vllm_flash_attn_version=2,
    supports_quant_query_input=False,
    kv_sharing_target_layer_name=None,
    _kv_quant_mode=KVQuantMode.NONE,
    _is_per_token_head_quant=False,
    chunk_lookback=-1,
    use_td=False,
    is_kvcache_nvfp4=False,
    nvfp4_fa2=False,
    nvfp4_trtllm=False,
    fa4_hd256=False,
    batch_invariant_enabled=False,
    bmm1_scale=None,
    bmm2_scale=None,
    o_sf_scale=None,
)


def outcome(backend: str, layout: KVCacheLayout, parts: int) -> str:
    """``right``, ``refused by vLLM: ...`` or a traceback."""
    torch.manual_seed(0)
    supported = AttentionBackendEnum[backend].get_class().supported_kv_cache_layouts()
    if supported is not None and layout not in supported:
        return f"refused by vLLM: {backend} does not support {layout.name}"
    try:
        cases = [Case(backend, layout, parts) for _ in range(2)]
        if backend == "FLASHINFER":
            get_flashinfer_layout_string(layout)
    except (ValueError, AssertionError) as error:
        return f"refused by vLLM: {error}"
    try:
        cases[0].prefix()
        cases[1].computed()
    except Exception:
        return traceback.format_exc()
    return "right"


def main() -> None:
    """Run all cases and print the outcomes."""
    flash = "vllm.v1.attention.backends.flash_attn.reshape_and_cache_flash"
    found: dict[str, dict[str, str]] = {}
    with (
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch(flash, reshape_and_cache_flash, create=True),
        patch.object(torch.ops, "_C_cache_ops", SimpleNamespace(reshape_and_cache_flash=reshape_and_cache_flash)),
        torch.inference_mode(),
    ):
        for backend in BACKENDS:
            cases = {f"{layout.name}/{parts}": (layout, parts) for layout in KVCacheLayout for parts in (1, 2)}
            found[backend] = {name: outcome(backend, *case) for name, case in cases.items()}
    sys.stdout.write(json.dumps(found) + "\n")
