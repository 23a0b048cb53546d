"""Triton's attention against torch's, in float32 and in the serving dtype, and the bandwidth that it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from scripts.gpu.device import replayed_seconds
from scripts.gpu.models import Scale
from scripts.gpu.results import Results
from server.engine.attention.backend import AttentionCall, SDPABackend, make_metadata
from server.engine.attention.kv_cache import KVCache, KVCacheSpec
from server.engine.cuda.triton_attention import TritonBackend

BLOCK_SIZE = 16
TIMED_BYTES = 2**27
"""Least bytes of keys and values of a case that is timed: more than fit into a cache of 60 MB."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Allowed relative error of attention against float32; twice that of torch's attention is allowed, too."""

Span = tuple[list[int], int, int]
"""Block table, first position, number of positions."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the kernels.

    Attributes:
        rows: (first position, positions) of each sequence, decodes first.
        head_dim: Width of a head.
        kv_heads: Key/value heads.
        group: Query heads of each.
        window: Newest keys that a row sees; None for all.
        softcap: Bound of the scores; None for none.
        has_sinks: Whether each head has a sink.
        first_block: The sequences' blocks start here, so that offsets are large.
    """

    rows: Sequence[tuple[int, int]]
    head_dim: int = 128
    kv_heads: int = 8
    group: int = 4
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    first_block: int = 0

    def __str__(self) -> str:
        sizes = [f"{sum(count for _, count in self.rows)} rows over {max(map(sum, self.rows))} keys"]
        sizes.append(f"{self.kv_heads} x {self.group} heads of {self.head_dim}")
        extras = {
            "window": self.window,
            "cap": self.softcap,
            "sinks": self.has_sinks or None,
            "block": self.first_block or None,
        }
        return ", ".join(sizes + [f"{name} {value}" for name, value in extras.items() if value is not None])


def decodes(count: int, keys: int) -> list[tuple[int, int]]:
    """Sequences of one new row, with different numbers of keys, at most ``keys``."""
    return [(max(0, keys - 1 - 7 * index % max(1, keys // 3)), 1) for index in range(count)]


def full_cases() -> list[Case]:
    """Decodes and prefills over all that models have; the most common ones first."""
    chunks = [(0, 128), (1000, 256), (7744, 256)]
    past_2_31 = 2**31 // (BLOCK_SIZE * 8 * 128) + 1000
    return [
        Case(rows=decodes(64, 512)),
        Case(rows=decodes(64, 8000)),
        Case(rows=decodes(1, 8000)),
        Case(rows=decodes(256, 2000)),
        Case(rows=chunks),
        Case(rows=[*decodes(64, 1000), *chunks]),
        Case(rows=[*decodes(16, 2000), (1900, 100)], first_block=past_2_31),
        Case(rows=decodes(16, 1)),
        *(Case(rows=[*decodes(16, 1500), (300, 70)], head_dim=width) for width in (64, 80, 96, 192, 256)),
        *(Case(rows=[*decodes(32, 900), (33, 65)], kv_heads=2, group=group) for group in (1, 2, 3, 7, 8, 16)),
        Case(rows=[*decodes(16, 8000), (5000, 256)], window=1024),
        Case(rows=[*decodes(16, 3000), (100, 200)], window=37, head_dim=64),
        Case(rows=[*decodes(16, 3000), (100, 200)], softcap=50.0, head_dim=256, kv_heads=4, group=2),
        Case(rows=[*decodes(16, 3000), (100, 200)], softcap=2.0, window=512, head_dim=256, kv_heads=4, group=2),
        Case(rows=[*decodes(16, 3000), (100, 200)], has_sinks=True, window=128, head_dim=64, group=8),
        Case(rows=[*decodes(2, 8000), (0, 33)], has_sinks=True, head_dim=64, group=8),
    ]


def dry_cases() -> list[Case]:
    """Few and small cases for Triton's interpreter."""
    return [
        Case(rows=[*decodes(3, 70), (5, 9)], head_dim=16, kv_heads=2, group=2),
        Case(rows=decodes(1, 600), head_dim=64, kv_heads=1, group=1, first_block=3),
        Case(rows=[(40, 1), (0, 7)], head_dim=24, kv_heads=1, group=3, window=11, softcap=2.0, has_sinks=True),
    ]


def run(results: Results, scale: Scale) -> None:
    """Compare and time all cases."""
    if scale.is_dry:
        results.add("kernels", note="in Triton's interpreter, in float32 alone")
    worst, num_equal, rates = 0.0, 0, {}
    cases = dry_cases() if scale.is_dry else full_cases()
    for case in cases:
        bench = Bench(case, scale)
        for name, value, allowed in bench.errors():
            figure = results.add(f"{name}: {case}", value, at_most=allowed, is_detail=True)
            worst, num_equal = max(worst, value / allowed), num_equal + (figure.holds is True)
        if bench.num_bytes >= TIMED_BYTES:
            rates[str(case)] = bench.num_bytes / replayed_seconds(bench.attend, scale.device) / 1e9
            results.add_speed(f"read: {case}", rates[str(case)], "GB/s", is_detail=True)
    results.add("comparisons that are equal", num_equal, f"of {2 * len(cases)}", at_least=2 * len(cases))
    results.add("worst error over the allowed one", worst)
    for case in (Case(rows=decodes(64, 8000)), Case(rows=decodes(1, 8000))):
        if str(case) in rates:
            results.add_speed(f"{len(case.rows)} decodes over 8,000 keys", rates[str(case)], "GB/s")


class Bench:
    """One case with its tensors."""

    def __init__(self, case: Case, scale: Scale) -> None:
        generator = torch.Generator(scale.device).manual_seed(0)
        counts = [-(-(start + count) // BLOCK_SIZE) for start, count in case.rows]
        num_blocks = case.first_block + sum(counts)
        spec = KVCacheSpec(1, case.kv_heads, case.head_dim, BLOCK_SIZE, scale.dtype)
        self.cache = KVCache(spec, num_blocks, scale.device)
        order = torch.randperm(sum(counts), device=scale.device, generator=generator) + case.first_block
        used = self.cache.tensor[:, :, case.first_block : num_blocks]
        used.copy_(torch.randn(used.shape, device=scale.device, generator=generator))
        tables = [table.tolist() for table in torch.split(order.cpu(), counts)]
        self._case, self._num_keys = case, sum(map(sum, case.rows))
        self._spans: list[Span] = [(table, *rows) for table, rows in zip(tables, case.rows, strict=True)]
        self._metadata = make_metadata(self._spans, BLOCK_SIZE, scale.device)
        num_heads, num_rows = case.kv_heads * case.group, sum(count for _, count in case.rows)
        # As from a projection: the heads of a row are adjacent.
        drawn = torch.randn(num_rows, num_heads, case.head_dim, device=scale.device, generator=generator)
        self._query = drawn.to(scale.dtype).transpose(0, 1)
        sinks = torch.randn(num_heads, device=scale.device, generator=generator).to(scale.dtype)
        self._call = AttentionCall(case.head_dim**-0.5, case.window, case.softcap, sinks if case.has_sinks else None)
        processors = 4 if scale.is_dry else torch.cuda.get_device_properties(scale.device).multi_processor_count
        self._backend = TritonBackend(self.cache, processors)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values that the case reads; 0 with windows or chunks, which read others."""
        spec = self.cache.spec
        row_bytes = 2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
        is_timed = self._case.window is None and all(count == 1 for _, count in self._case.rows)
        return self._num_keys * row_bytes if is_timed else 0

    def attend(self) -> torch.Tensor:
        """Triton's attention, [rows, heads, head_dim]."""
        return self._backend.attend(self._query, 0, self._metadata, self._call)

    def errors(self) -> list[tuple[str, float, float]]:
        """The comparisons: name, error and the allowed error. NaN is an error of infinity."""
        dtype = self.cache.spec.dtype
        exact = self._reference(torch.float32)
        allowed = max(TOLERANCE[dtype], 2 * relative_error(self._reference(dtype), exact))
        return [
            ("attention", relative_error(self.attend(), exact), allowed),
            ("stored rows", self._stored_difference(), 0.5),
        ]

    def _reference(self, dtype: torch.dtype) -> torch.Tensor:
        """Torch's attention in some dtype, over a cache of the used blocks alone."""
        used = sorted({block for table, _, _ in self._spans for block in table})
        cache = KVCache(replace(self.cache.spec, dtype=dtype), len(used), self.cache.tensor.device)
        cache.tensor[:, :, : len(used)] = self.cache.tensor[:, :, used[0] : used[-1] + 1].to(dtype)
        spans = [([block - used[0] for block in table], start, count) for table, start, count in self._spans]
        call = self._call
        if call.sinks is not None:
            call = replace(call, sinks=call.sinks.to(dtype))
        metadata = make_metadata(spans, BLOCK_SIZE, cache.tensor.device)
        return SDPABackend(cache).attend(self._query.to(dtype), 0, metadata, call)

    def _stored_difference(self) -> float:
        """Elements of the cache in which a store by Triton and one by torch differ."""
        shape = (2, self._query.shape[1], self.cache.spec.num_kv_heads, self.cache.spec.head_dim)
        generator = torch.Generator(self._query.device).manual_seed(1)
        drawn = torch.randn(shape, device=self._query.device, generator=generator).to(self._query.dtype)
        new = drawn.transpose(1, 2)
        before = [tensor[self._metadata.slot_mapping].clone() for tensor in self.cache.layer(0)]
        self._backend.store(new[0], new[1], 0, self._metadata)
        difference = 0
        for tensor, written, old in zip(self.cache.layer(0), drawn, before, strict=True):
            difference += int((tensor[self._metadata.slot_mapping] != written).sum())
            tensor[self._metadata.slot_mapping] = old
        return float(difference)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference over the norm of ``want``, the largest of all rows; infinite if a value is NaN."""
    difference = (got.float() - want.float()).flatten(1).norm(dim=1) / want.float().flatten(1).norm(dim=1)
    worst = difference.max().item()
    return worst if worst == worst else float("inf")
