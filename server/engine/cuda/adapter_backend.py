"""Adapters on GPUs: two launches for each product, whatever adapters the rows have."""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from server.engine.adapters.backend import AdaptedRows, AdapterBackend, DecodeAdapters, PlainAdapters, change_inputs
from server.engine.adapters.classification_head import ClassificationHead
from server.engine.adapters.products import Product
from server.engine.adapters.weights import AdapterWeights, Changes, PartChange
from server.engine.attention.transfers import CopyStream, Mark, pins, queue_copy
from server.engine.cuda.triton_launcher import use_prebuilt

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]

ALIGNMENT = 256
"""Bytes. Every matrix of an adapter starts at a multiple."""

SMALL_TILE, LARGE_TILE = 16, 64
"""Rows of a tile: the fewest that tensor cores multiply, and those of passes in which adapters have many rows."""

BLOCK_K, BLOCK_RANK = 128, 32
"""Columns of the input and ranks that a program computes at once."""

BLOCK_COLUMNS = {SMALL_TILE: 128, LARGE_TILE: 64}
"""Columns of the output that a program computes at once, for each size of tiles: registers have room for no more."""

MAX_SHARES = 8
"""Programs that divide the input's columns of a tile; ``expand`` reads what all of them have written."""

PROGRAMS_PER_PROCESSOR = 4
"""Programs that keep one multiprocessor of the GPU busy."""

MAX_REPLAYED_RANK = 256
"""Rank of the adapters that recorded passes have room for."""

PIECE_BYTES = 4 * 2**20
"""Bytes of a piece of pinned memory. The copies of a step may queue behind two of them, about 0.3 ms over PCIe 4."""

NUM_STAGED = 2
"""Pieces of pinned memory, which take turns."""


def load_kernels() -> ModuleType:
    """Import the kernels' module; late, because it imports Triton.

    Raises:
        ImportError: If Triton is not installed.
    """
    use_prebuilt()
    return importlib.import_module("server.engine.cuda.adapter_kernels")


class PackedAdapter(AdapterWeights):
    """An adapter in the layout of ``adapter_kernels``, in host memory.

    Args:
        products: The products that it changes.
        memory: [bytes] uint8: the table, then all matrices.
        table: [parts, fields] int64, a view of the memory; its addresses count from the memory's first byte.
        rank: Its largest rank.
        input_gains: Where the gains of inputs are: the change without its tensor, and the first byte, by product.
        head: The classification head, or None.
    """

    __slots__ = ("input_gains", "memory", "rank", "table")

    def __init__(
        self,
        products: frozenset[int],
        memory: torch.Tensor,
        table: Integers,
        rank: int,
        input_gains: dict[int, list[tuple[PartChange, int, int]]],
        head: ClassificationHead | None,
    ) -> None:
        super().__init__(products, memory.nbytes + (0 if head is None else head.nbytes), head)
        self.memory, self.table, self.rank, self.input_gains = memory, table, rank, input_gains


class PlacedAdapter(AdapterWeights):
    """An adapter on the device.

    Args:
        packed: Its layout.
        memory: [bytes] uint8, the same bytes with the addresses of the device.
    """

    __slots__ = ("_memory", "address", "input_gains", "number", "rank")

    _numbers = itertools.count(1)

    def __init__(self, packed: PackedAdapter, memory: torch.Tensor) -> None:
        super().__init__(packed.products, packed.nbytes, packed.head)
        self._memory = memory
        self.address = memory.data_ptr()
        self.rank = packed.rank
        self.number = next(self._numbers)
        """Of no other adapter, while an address is used again."""
        self.input_gains = {
            index: [
                PartChange(change.start, change.size, input_gain=memory[first:stop].view(torch.float32))
                for change, first, stop in gains
            ]
            for index, gains in packed.input_gains.items()
        }


@dataclass(frozen=True, slots=True)
class _Step:
    """The tiles of a pass, as ``adapter_kernels`` reads them.

    Attributes:
        tiles: [tiles, TILE_FIELDS] int64, on the device.
        order: [rows] int64, on the device.
        num_rows: Rows that may have adapters.
        tile_rows: Rows of a tile.
        max_rank: The largest rank that a tile may have.
        input_gains: By product, the gains of inputs and the rows of each adapter that has some.
    """

    tiles: torch.Tensor
    order: torch.Tensor
    num_rows: int
    tile_rows: int
    max_rank: int
    input_gains: dict[int, list[tuple[Sequence[PartChange], torch.Tensor]]] = field(default_factory=dict)


class TritonAdapters(AdapterBackend):
    """``adapter_kernels`` for all products.

    Args:
        products: The products of the served model.
        device: The GPU; the host in Triton's interpreter.
        dtype: The serving dtype.
        num_processors: Multiprocessors of the GPU.
        stream: Where adapters are copied to the device; None to copy them between the steps.

    Raises:
        ImportError: If Triton is not installed.
    """

    def __init__(
        self,
        products: Sequence[Product],
        device: torch.device,
        dtype: torch.dtype,
        *,
        num_processors: int = 4,
        stream: CopyStream | None = None,
    ) -> None:
        super().__init__(products, device)
        self._kernels = load_kernels()
        self._dtype = dtype
        self._precision = "ieee" if dtype is torch.float32 else "tf32"
        self._num_programs = num_processors * PROGRAMS_PER_PROCESSOR
        self._first_parts: list[int] = [*itertools.accumulate((len(one.parts) for one in products), initial=0)]
        self._stream = stream
        # Allocated once: pinning memory takes long, and stops other calls of the driver.
        self._staged: Sequence[torch.Tensor] = ()
        if stream is not None:
            self._staged = torch.empty(NUM_STAGED, PIECE_BYTES, dtype=torch.uint8, pin_memory=pins(device)).unbind()
        self._nothing = torch.zeros(16, dtype=torch.int64, device=device)
        self._no_low = torch.zeros(16, device=device)
        self._steps: tuple[_Step, _Step] | None = None

    # Adapters

    def pack(self, changes: Changes, head: ClassificationHead | None = None) -> PackedAdapter:
        """One piece of host memory with all matrices; see the base class."""
        fields = self._kernels
        lines = np.zeros((self._first_parts[-1], fields.NUM_FIELDS), np.int64)
        for product, first in zip(self.products, self._first_parts, strict=False):
            for number, part in enumerate(product.parts):
                lines[first + number, [fields.START, fields.SIZE]] = part.start, part.size
        pieces: list[tuple[int, torch.Tensor]] = []
        end = _aligned(lines.nbytes)

        def place(tensor: torch.Tensor) -> int:
            """Where a tensor will be; counted from the first byte of the memory."""
            nonlocal end
            first, end = end, _aligned(end + tensor.nbytes)
            pieces.append((first, tensor.contiguous()))
            return first

        rank, input_gains = 0, dict[int, list[tuple[PartChange, int, int]]]()
        for index, parts in changes.items():
            product = self.products[index]
            numbers = {part.start: number for number, part in enumerate(product.parts)}
            for change in parts:
                line = lines[self._first_parts[index] + numbers[change.start]]
                if change.input_gain is not None:
                    first = place(change.input_gain.float())
                    own = PartChange(change.start, change.size)
                    input_gains.setdefault(index, []).append((own, first, first + 4 * product.in_features))
                if change.a is not None and change.b is not None:
                    is_embedding = product.kind == "embedding"
                    line[fields.A] = place(change.a.to(self._dtype).t() if is_embedding else change.a.to(self._dtype))
                    line[fields.B] = place(change.b.to(self._dtype).t())
                    line[fields.RANK] = change.rank
                    line[fields.SCALE] = int(np.float32(change.scale).view(np.int32))
                    rank = max(rank, change.rank)
                for name, vector in ((fields.GAIN, change.gain), (fields.BIAS, change.bias)):
                    if vector is not None:
                        line[name] = place(vector.float())
        memory = torch.zeros(end, dtype=torch.uint8)
        table = memory[: lines.nbytes].view(torch.int64).numpy().reshape(lines.shape)
        table[...] = lines
        for first, tensor in pieces:
            memory[first : first + tensor.nbytes] = tensor.view(-1).view(torch.uint8)
        return PackedAdapter(frozenset(changes), memory, table, rank, input_gains, head)

    def place(self, weights: AdapterWeights) -> AdapterWeights:
        """Copy an adapter to the device, and wait for the copy alone; see the base class."""
        if not isinstance(weights, PackedAdapter):
            raise TypeError(f"{type(weights).__name__} is not packed by this backend")
        # Allocated for the stream of the steps: memory that is freed is used again behind the steps that read it.
        memory = torch.empty(weights.memory.shape, dtype=torch.uint8, device=self.device)
        addresses = weights.table[:, self._kernels.ADDRESSES]
        table = weights.table.copy()
        table[:, self._kernels.ADDRESSES] = np.where(addresses != 0, addresses + memory.data_ptr(), 0)
        lines = torch.from_numpy(table.reshape(-1)).view(torch.uint8)
        pieces = [(lines, memory[: len(lines)])]
        pieces += zip(
            torch.split(weights.memory[len(lines) :], PIECE_BYTES),
            torch.split(memory[len(lines) :], PIECE_BYTES),
            strict=True,
        )
        if self._stream is None:
            for piece, target in pieces:
                target.copy_(piece)
            return PlacedAdapter(weights, memory)
        marks: list[Mark] = []
        with torch.inference_mode(), self._stream.after(self._stream.mark()):
            try:
                for number, (piece, target) in enumerate(pieces):
                    if number >= NUM_STAGED:
                        marks[number - NUM_STAGED].synchronize()
                    staged = self._staged[number % NUM_STAGED][: len(piece)]
                    staged.copy_(piece)
                    target.copy_(staged, non_blocking=True)
                    marks.append(self._stream.mark())
            finally:
                self._stream.mark().synchronize()  # after an error, too: the staged pieces are used again
        return PlacedAdapter(weights, memory)

    # Passes

    def begin(self, layers: AdaptedRows, kept: AdaptedRows) -> None:
        """Copy the tiles to the device; see the base class."""
        self._steps = self._step(layers), self._step(kept)

    def end(self) -> None:
        """Release the tiles; see the base class."""
        self._steps = None

    def decodes(self, max_rows: int) -> DecodeAdapters:
        """Tables at fixed addresses; see the base class."""
        return _Decodes(self, max_rows)

    @contextmanager
    def over(self, step: _Step) -> Iterator[None]:
        """Let all products be changed by some tiles, whatever these will contain."""
        self._steps = step, step
        try:
            with self.exchanged(range(len(self.products))):
                yield
        finally:
            self._steps = None

    def product(self, product: Product, rows: torch.Tensor) -> torch.Tensor:
        """The product, then two launches, or one for embeddings; see the base class.

        Raises:
            NotImplementedError: If it has another dtype than the model.
            RuntimeError: Outside of a pass.
        """
        if self._steps is None:
            raise RuntimeError("a product with adapters outside of a pass")
        step = self._steps[product.is_head]
        given = rows.contiguous()
        gains = step.input_gains.get(product.index)
        out = (product.original(given) if gains is None else change_inputs(product, given, gains)).contiguous()
        if out.dtype != self._dtype or (product.kind != "embedding" and given.dtype != self._dtype):
            raise NotImplementedError(f"{product.parts[0].name} computes {out.dtype}, and is served in {self._dtype}")
        if len(step.tiles):
            self._change(product, step, given, out)
        return out

    def _change(self, product: Product, step: _Step, given: torch.Tensor, out: torch.Tensor) -> None:
        """Change the output of a product in place."""
        num_parts, first_part = len(product.parts), self._first_parts[product.index]
        is_embedding = product.kind == "embedding"
        num_tiles = -(-step.num_rows // step.tile_rows)  # as if one adapter had all rows
        num_programs = max(1, self._num_programs // (num_tiles * num_parts))
        num_shares, low = 1, self._no_low
        if not is_embedding:
            num_shares = min(num_programs, MAX_SHARES, -(-product.in_features // (2 * BLOCK_K)))
            low = torch.empty(num_shares * num_parts * step.num_rows * step.max_rank, device=self.device)
            self._kernels.shrink[(len(step.tiles), num_shares, num_parts)](
                given,
                step.tiles,
                step.order,
                low,
                first_part,
                product.in_features,
                step.num_rows,
                step.max_rank,
                TILE=step.tile_rows,
                BLOCK_K=BLOCK_K,
                BLOCK_RANK=BLOCK_RANK,
                num_warps=4,
            )
        block_columns = BLOCK_COLUMNS[step.tile_rows]
        num_blocks = -(-max(part.size for part in product.parts) // block_columns)
        self._kernels.expand[(len(step.tiles), min(num_programs, num_blocks), num_parts)](
            given if is_embedding else self._nothing,
            step.tiles,
            step.order,
            low,
            out,
            first_part,
            product.out_features,
            step.num_rows,
            step.max_rank,
            num_shares,
            TILE=step.tile_rows,
            BLOCK_COLUMNS=block_columns,
            BLOCK_RANK=BLOCK_RANK,
            IS_EMBEDDING=is_embedding,
            IS_ALIGNED=all(part.start % 16 == 0 and part.size % 16 == 0 for part in product.parts),
            PRECISION=self._precision,
            num_warps=4,
        )

    def _step(self, rows: AdaptedRows) -> _Step:
        """The tiles of some rows, copied to the device by one copy."""
        groups = [(adapter, own) for adapter, own in rows.groups if isinstance(adapter, PlacedAdapter)]
        num_rows = sum(len(own) for _, own in groups)
        tile_rows = LARGE_TILE if num_rows > SMALL_TILE * len(groups) else SMALL_TILE
        tiles, order = tiles_of([(adapter, own.tolist()) for adapter, own in groups], tile_rows)
        table = queue_copy(torch.from_numpy(np.concatenate([tiles.reshape(-1), order])), self.device)
        input_gains: dict[int, list[tuple[Sequence[PartChange], torch.Tensor]]] = {}
        for adapter, own in groups:
            for index, gains in adapter.input_gains.items():
                input_gains.setdefault(index, []).append((gains, own))
        return _Step(
            table[: tiles.size].view(tiles.shape),
            table[tiles.size :],
            num_rows,
            tile_rows,
            max((adapter.rank for adapter, _ in groups), default=0),
            {
                index: [(gains, queue_copy(own, self.device)) for gains, own in users]
                for index, users in input_gains.items()
            },
        )


class _Decodes(DecodeAdapters):
    """Tiles of decodes at fixed addresses.

    Args:
        backend: Computes the products.
        max_rows: Rows of the largest batch.
    """

    def __init__(self, backend: TritonAdapters, max_rows: int) -> None:
        self._backend, self._max_rows = backend, max_rows
        fields = backend._kernels.TILE_FIELDS  # noqa: SLF001 - one module
        self._num_fields: int = fields
        self._table = torch.zeros((fields + 1) * max_rows, dtype=torch.int64, device=backend.device)
        self._numbers: tuple[int, ...] = ()
        """The adapter of each row in the tables, without the last rows that have none."""

    def takes(self, adapters: Sequence[AdapterWeights | None]) -> bool:
        """Not those that change inputs, or have a rank above ``MAX_REPLAYED_RANK``; see the base class."""
        return all(
            one is None or (isinstance(one, PlacedAdapter) and one.rank <= MAX_REPLAYED_RANK and not one.input_gains)
            for one in adapters
        )

    def fill(self, adapters: Sequence[AdapterWeights | None]) -> None:
        """Copy the tiles to the device, if they changed; see the base class."""
        placed = [one if isinstance(one, PlacedAdapter) else None for one in adapters]
        while placed and placed[-1] is None:
            placed.pop()
        numbers = tuple(0 if one is None else one.number for one in placed)
        if numbers == self._numbers:
            return
        rows: dict[PlacedAdapter, list[int]] = {}
        for row, one in enumerate(placed):
            if one is not None:
                rows.setdefault(one, []).append(row)
        tiles, order = tiles_of([*rows.items()], SMALL_TILE)
        table: Integers = np.zeros(len(self._table), np.int64)
        table[: tiles.size] = tiles.reshape(-1)
        first = self._num_fields * self._max_rows
        table[first : first + len(order)] = order
        host = torch.from_numpy(table)
        self._table.copy_(host.pin_memory() if pins(self._table.device) else host, non_blocking=True)
        self._numbers = numbers

    @contextmanager
    def adapting(self, size: int) -> Iterator[None]:
        """Each row may have its own adapter; see the base class."""
        end = self._num_fields * self._max_rows
        tiles = self._table[:end].view(self._max_rows, self._num_fields)[:size]
        with self._backend.over(_Step(tiles, self._table[end:], size, SMALL_TILE, MAX_REPLAYED_RANK)):
            yield


def tiles_of(groups: Sequence[tuple[PlacedAdapter, Sequence[int]]], tile_rows: int) -> tuple[Integers, Integers]:
    """Divide the rows of each adapter into tiles.

    Args:
        groups: The numbers of the rows of each adapter.
        tile_rows: The most rows of a tile.

    Returns:
        The tiles [tiles, TILE_FIELDS], and the numbers of the rows [rows], by tile.
    """
    tiles: list[tuple[int, int, int]] = []
    first = 0
    for adapter, own in groups:
        starts = range(0, len(own), tile_rows)
        tiles += [(adapter.address, first + start, min(tile_rows, len(own) - start)) for start in starts]
        first += len(own)
    order = np.fromiter(itertools.chain.from_iterable(own for _, own in groups), np.int64, first)
    return np.array(tiles, np.int64).reshape(-1, 3), order


def make_adapters(
    products: Sequence[Product],
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_processors: int,
    stream: CopyStream | None,
) -> AdapterBackend:
    """Triton's kernels, or torch's operations without Triton; arguments are those of ``TritonAdapters``."""
    try:
        return TritonAdapters(products, device, dtype, num_processors=num_processors, stream=stream)
    except ImportError as error:
        logger.warning("adapters run by torch's operations, which is slower: %s", error)
        return PlainAdapters(products, device)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
