"""Adapters on CPUs: one compiled call for each product, whatever adapters the rows have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from server.engine.adapters.backend import AdaptedRows, AdapterBackend, PlainAdapters, change_inputs
from server.engine.adapters.classification_head import ClassificationHead
from server.engine.adapters.products import Product
from server.engine.adapters.weights import AdapterWeights, Changes, PartChange
from server.engine.cpu import adapter_kernels as kernels
from server.engine.cpu.bf16_dot import has_bf16_dot
from server.engine.cpu.compiled import KINDS, elements
from server.engine.cpu.cpu_attention import Integers, balance
from server.engine.cpu.vector_code import LANES, LINE_BYTES

logger = logging.getLogger(__name__)

SERIAL_WORK = 1 << 18
"""Elements of adapters times rows, of one product, up to which one thread is faster than several."""

_READING = 6
"""How many rows take as long to compute as the reading of their adapter takes."""


class CPUWeights(AdapterWeights):
    """An adapter in the layout of ``adapter_kernels``, in one piece of memory.

    Args:
        products: The products that it changes.
        memory: Everything that the table refers to.
        table: [products, fields] int64: see ``adapter_kernels``.
        parts: [parts, fields] int64.
        gains: The changes that are gains of the input, by product.
        head: The classification head, or None.
    """

    __slots__ = ("_memory", "_parts", "_table", "address", "gains", "size")

    def __init__(
        self,
        products: frozenset[int],
        memory: torch.Tensor,
        table: Integers,
        parts: Integers,
        gains: dict[int, list[PartChange]],
        head: ClassificationHead | None,
    ) -> None:
        nbytes = memory.nbytes + table.nbytes + parts.nbytes
        nbytes += sum(change.nbytes for changes in gains.values() for change in changes)
        super().__init__(products, nbytes + (0 if head is None else head.nbytes), head)
        self._memory, self._table, self._parts = memory, table, parts
        self.address: int = table.ctypes.data
        self.gains = gains
        self.size = memory.nbytes / max(1, len(products))
        """Mean bytes of a product's matrices."""


class _Step:
    """The rows of a pass with adapters, in the form that the kernels take; see ``adapter_kernels``."""

    def __init__(self, rows: AdaptedRows, num_threads: int) -> None:
        groups = [(adapter, own) for adapter, own in rows.groups if isinstance(adapter, CPUWeights)]
        self.groups = groups
        self.gains = {index for adapter, _ in groups for index in adapter.gains}
        self.work = sum(adapter.size * (1 + len(own) / 4) for adapter, own in groups)
        numbers = torch.cat([own for _, own in groups]) if groups else torch.empty(0, dtype=torch.int64)
        total = len(numbers)
        # Whole groups of rows that are computed together, and at least two pieces for each thread.
        most = max(1, -(-total // (2 * num_threads * kernels.MAX_ROWS))) * kernels.MAX_ROWS
        pieces, first = [], 0
        for index, (_, own) in enumerate(groups):
            for start in range(0, len(own), most):
                count = min(most, len(own) - start)
                pieces.append((_READING + count, (index, first + start, count)))
            first += len(own)
        units, bounds = balance(pieces, num_threads)
        tables = np.array([adapter.address for adapter, _ in groups], np.int64)
        self._kept = numbers, np.array(units, np.int64).reshape(-1, 3), bounds.astype(np.int64), tables
        fields = [
            num_threads,
            self._kept[2].ctypes.data,
            self._kept[1].ctypes.data,
            numbers.data_ptr(),
            tables.ctypes.data,
        ]
        self._fields = np.array(fields, np.int64)
        self.address: int = self._fields.ctypes.data


class CPUAdapters(AdapterBackend):
    """``adapter_kernels`` for all products.

    Args:
        products: The products; for bfloat16 with even widths.
        device: The CPU.
        dtype: float32, or bfloat16 if the processor multiplies it.
    """

    def __init__(self, products: Sequence[Product], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(products, device)
        self._dtype = dtype
        self._kind = KINDS[dtype]
        self._num_threads = min(torch.get_num_threads(), numba.get_num_threads())
        self._steps: tuple[_Step, _Step]

    def compile(self) -> None:
        """Compile the kernels, or read them from the disk cache.

        Raises:
            Exception: Of any kind, if Numba or LLVM fail.
        """
        fields, bounds = np.zeros(kernels.NUM_STEP_FIELDS, np.int64), np.zeros(2, np.int64)
        fields[kernels.NUM_SHARES], fields[kernels.BOUNDS] = 1, bounds.ctypes.data
        # No unit is computed, so no other address is read.
        for field in (kernels.UNITS, kernels.ROWS, kernels.TABLES):
            fields[field] = bounds.ctypes.data
        at = bounds.ctypes.data
        for kernel in (kernels.change_rows, kernels.change_rows_in_parallel, kernels.embed_rows):
            kernel(fields.ctypes.data, at, at, 1, 2, 2, 0, self._kind)

    def pack(self, changes: Changes, head: ClassificationHead | None = None) -> AdapterWeights:
        """One piece of memory with all matrices; see the base class."""
        # In NumPy, which wakes no threads: an adapter has hundreds of small matrices, and steps run meanwhile.
        pieces: list[npt.NDArray[Any]] = []
        offsets: list[int] = []
        end = 0

        def place(piece: npt.NDArray[Any]) -> int:
            """The number of a piece, whose address is known later."""
            nonlocal end
            pieces.append(piece)
            offsets.append(end)
            end += -(-piece.nbytes // LINE_BYTES) * LINE_BYTES
            return len(pieces) - 1

        table = np.zeros((len(self.products), kernels.NUM_FIELDS), np.int64)
        lines: list[list[int]] = []
        addresses: list[tuple[int, int, int]] = []  # line of the parts, field, piece
        of_table: list[tuple[int, int, int]] = []
        firsts: list[tuple[int, int]] = []
        gains: dict[int, list[PartChange]] = {}
        for index, parts in changes.items():
            product = self.products[index]
            own = [part for part in parts if part.input_gain is None]
            if len(own) < len(parts):
                gains[index] = [part for part in parts if part.input_gain is not None]
            if not own:
                continue
            ranks = [part.rank + part.rank % 2 for part in own]
            starts = [sum(ranks[:number]) for number in range(len(ranks))]
            rank = -(-sum(ranks) // LANES) * LANES
            stacked = np.zeros((rank, product.in_features), self._kind.dtype)
            scales = np.zeros(rank, np.float32)
            firsts.append((index, len(lines)))
            table[index, kernels.NUM_BLOCKS] = rank // LANES
            table[index, kernels.NUM_PARTS] = len(own)
            for part, first in zip(own, starts, strict=True):
                if part.a is not None and part.b is not None:
                    stacked[first : first + part.rank] = elements(part.a)
                    scales[first : first + part.rank] = part.scale
            # In the order in which a step reads them, because what follows is fetched ahead.
            if rank:
                is_embedding = product.kind == "embedding"
                a = stacked.T if is_embedding else _blocks_of_columns(stacked)
                of_table += [(index, kernels.SCALES, place(scales)), (index, kernels.A, place(a))]
            for part, first, padded in zip(own, starts, ranks, strict=True):
                line = [0] * kernels.NUM_PART_FIELDS
                line[kernels.START], line[kernels.SIZE] = part.start, part.size
                line[kernels.FIRST], line[kernels.RANK] = first, padded
                if part.a is not None and part.b is not None:
                    addresses.append((len(lines), kernels.B, place(_blocks_of_columns(elements(part.b)))))
                for field, vector in ((kernels.GAIN, part.gain), (kernels.BIAS, part.bias)):
                    if vector is not None:
                        addresses.append((len(lines), field, place(vector.float().numpy())))
                lines.append(line)
        memory = torch.empty(max(1, end), dtype=torch.uint8)
        base, content = memory.data_ptr(), memory.numpy()
        for piece, offset in zip(pieces, offsets, strict=True):
            content[offset : offset + piece.nbytes].view(piece.dtype).reshape(piece.shape)[...] = piece
        fields = np.array(lines, np.int64).reshape(-1, kernels.NUM_PART_FIELDS)
        for line_number, field, number in addresses:
            fields[line_number, field] = base + offsets[number]
        for index, field, number in of_table:
            table[index, field] = base + offsets[number]
        for index, line_number in firsts:
            table[index, kernels.PARTS] = fields.ctypes.data + line_number * fields.strides[0]
        return CPUWeights(frozenset(changes), memory, table, fields, gains, head)

    def begin(self, layers: AdaptedRows, kept: AdaptedRows) -> None:
        """Divide the rows among the threads; see the base class."""
        self._steps = _Step(layers, self._num_threads), _Step(kept, self._num_threads)

    def end(self) -> None:
        """Release the adapters; see the base class."""
        del self._steps

    def product(self, product: Product, rows: torch.Tensor) -> torch.Tensor:
        """The product, then one kernel; see the base class."""
        step = self._steps[product.is_head]
        given = rows.contiguous()
        if product.index in step.gains:
            users = [(one.gains[product.index], own) for one, own in step.groups if product.index in one.gains]
            out = change_inputs(product, given, users).contiguous()
        else:
            out = product.original(given).contiguous()
        width, out_width = product.in_features, product.out_features
        if product.kind == "embedding":
            kernel = kernels.embed_rows
        else:
            kernel = kernels.change_rows if step.work <= SERIAL_WORK else kernels.change_rows_in_parallel
        num_rows = out.numel() // out_width
        addresses = step.address, given.data_ptr(), out.data_ptr()
        kernel(*addresses, num_rows, width, out_width, product.index, self._kind)
        return out


def make_adapters(products: Sequence[Product], device: torch.device, dtype: torch.dtype) -> AdapterBackend:
    """The fastest backend for the dtype and the processor."""
    is_bfloat16 = dtype is torch.bfloat16
    if dtype not in KINDS or (is_bfloat16 and not has_bf16_dot()):
        return PlainAdapters(products, device)
    if is_bfloat16 and any(product.in_features % 2 and product.kind != "embedding" for product in products):
        return PlainAdapters(products, device)
    backend = CPUAdapters(products, device, dtype)
    try:
        backend.compile()
    except Exception:  # of any kind, from Numba or LLVM: torch's operations are the fallback
        logger.warning("the kernels of adapters cannot be compiled; using torch's operations", exc_info=True)
        return PlainAdapters(products, device)
    return backend


def _blocks_of_columns(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A matrix [columns, steps], of which each row is a column, in blocks of sixteen columns; padded with zeros.

    Returns:
        A view: [columns / 16, steps, 16], or for bfloat16 [columns / 16, steps / 2, 16] of pairs of two steps, which
        are copied as one number each, in half the time.
    """
    columns, steps = matrix.shape
    if steps % 2 or columns % LANES:
        matrix = np.pad(matrix, ((0, -columns % LANES), (0, steps % 2)))
    if matrix.dtype == np.uint16:
        matrix = np.ascontiguousarray(matrix).view(np.uint32)
    return matrix.reshape(len(matrix) // LANES, LANES, -1).transpose(0, 2, 1)
