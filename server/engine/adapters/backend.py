"""The products of a step with adapters: the reference for every device, by torch's operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from server.engine.adapters.classification_head import ClassificationHead
from server.engine.adapters.products import Product
from server.engine.adapters.weights import AdapterWeights, Changes, PartChange, PlainWeights


class AdaptedRows:
    """The rows of a pass that have adapters.

    Args:
        adapters: The adapter of each span, or None.
        counts: The number of rows of each span; spans follow each other.

    Attributes:
        num_rows: All rows.
        groups: The rows of each adapter, ascending: [rows] int64, on the host.
    """

    def __init__(self, adapters: Sequence[AdapterWeights | None], counts: Sequence[int]) -> None:
        spans: dict[AdapterWeights, list[tuple[int, int]]] = {}
        first = 0
        for adapter, count in zip(adapters, counts, strict=True):
            if adapter is not None:
                own = spans.setdefault(adapter, [])
                if own and own[-1][1] == first:
                    own[-1] = own[-1][0], first + count
                else:
                    own.append((first, first + count))
            first += count
        self.num_rows = first
        self.groups = [
            (adapter, torch.cat([torch.arange(start, stop) for start, stop in own])) for adapter, own in spans.items()
        ]


class DecodeAdapters(ABC):
    """The adapters of decodes, at fixed addresses, so that a CUDA graph can replay passes with them.

    What the passes launch depends on the number of rows only; the adapters are read at each replay.
    """

    @abstractmethod
    def takes(self, adapters: Sequence[AdapterWeights | None]) -> bool:
        """Whether a recorded pass can have some adapters."""

    @abstractmethod
    def fill(self, adapters: Sequence[AdapterWeights | None]) -> None:
        """Set the adapters of the next replays.

        Args:
            adapters: The adapter of each row, at most the rows of the largest batch; other rows have none.
        """

    @abstractmethod
    def adapting(self, size: int) -> AbstractContextManager[None]:
        """Let the model's products be those of the rows' adapters, for the recording of a pass.

        Args:
            size: Rows of the batch.
        """


class AdapterBackend(ABC):
    """Computes the products of steps with adapters, on one device.

    Args:
        products: The products of the served model.
        device: Where its rows are.
    """

    def __init__(self, products: Sequence[Product], device: torch.device) -> None:
        self.products = tuple(products)
        self.device = device
        self._functions = [partial(self.product, product) for product in self.products]

    @abstractmethod
    def pack(self, changes: Changes, head: ClassificationHead | None = None) -> AdapterWeights:
        """An adapter in the layout of this backend, in host memory; called from any thread.

        Args:
            changes: The changes of each product; their tensors are on the host.
            head: The adapter's classification head.
        """

    def place(self, weights: AdapterWeights) -> AdapterWeights:
        """A packed adapter where the products can read it; called from any thread, and waits for the copy."""
        return weights

    def decodes(self, max_rows: int) -> DecodeAdapters | None:
        """Adapters of decodes whose passes can be recorded; None if none can.

        Args:
            max_rows: Rows of the largest batch.
        """
        del max_rows
        return None

    @abstractmethod
    def begin(self, layers: AdaptedRows, kept: AdaptedRows) -> None:
        """Prepare a pass.

        Args:
            layers: The rows of the layers.
            kept: The rows whose logits are computed.
        """

    @abstractmethod
    def product(self, product: Product, rows: torch.Tensor) -> torch.Tensor:
        """A product of all rows of the pass, with the changes of their adapters; between ``begin`` and ``end``."""

    @abstractmethod
    def end(self) -> None:
        """Release what ``begin`` has prepared."""

    @contextmanager
    def adapting(self, layers: AdaptedRows, kept: AdaptedRows) -> Iterator[None]:
        """Let the model's products be those of the rows' adapters. The arguments are those of ``begin``."""
        indices: set[int] = set().union(*(adapter.products for rows in (layers, kept) for adapter, _ in rows.groups))
        self.begin(layers, kept)
        try:
            with self.exchanged(indices):
                yield
        finally:
            self.end()

    @contextmanager
    def exchanged(self, indices: Collection[int]) -> Iterator[None]:
        """Let the model call ``product`` for some of its products."""
        try:
            for index in indices:
                self.products[index].exchange(self._functions[index])
            yield
        finally:
            for index in indices:
                self.products[index].restore()


class PlainAdapters(AdapterBackend):
    """Adapters by torch's operations in float32, one adapter after another; what other backends are compared with."""

    _rows: tuple[list[tuple[PlainWeights, torch.Tensor]], list[tuple[PlainWeights, torch.Tensor]]] = ([], [])

    def pack(self, changes: Changes, head: ClassificationHead | None = None) -> AdapterWeights:
        """The tensors; see the base class."""
        return PlainWeights(changes, head)

    def place(self, weights: AdapterWeights) -> AdapterWeights:
        """The tensors on the device; see the base class."""
        if not isinstance(weights, PlainWeights):
            raise TypeError(f"{type(weights).__name__} is not packed by this backend")
        changes = {index: [_moved(part, self.device) for part in parts] for index, parts in weights.changes.items()}
        return PlainWeights(changes, weights.head)

    def begin(self, layers: AdaptedRows, kept: AdaptedRows) -> None:
        """Move the rows' numbers to the device; see the base class."""
        self._rows = self._groups(layers), self._groups(kept)

    def end(self) -> None:
        """Forget the rows; see the base class."""
        self._rows = [], []

    def product(self, product: Product, rows: torch.Tensor) -> torch.Tensor:
        """The product, changed for each adapter; see the base class."""
        out = product.original(rows).contiguous()
        flat = out.view(-1, product.out_features)
        given = rows.reshape(-1) if product.kind == "embedding" else rows.reshape(-1, product.in_features)
        for adapter, own in self._rows[product.is_head]:
            for change in adapter.changes.get(product.index, ()):
                columns = slice(change.start, change.start + change.size)
                flat[own, columns] = changed(product, change, given[own], flat[own, columns])
        return out

    def _groups(self, rows: AdaptedRows) -> list[tuple[PlainWeights, torch.Tensor]]:
        return [(adapter, own.to(self.device)) for adapter, own in rows.groups if isinstance(adapter, PlainWeights)]


def changed(product: Product, change: PartChange, given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The output of one module with one adapter.

    Args:
        product: The product with the module.
        change: The adapter's change.
        given: The product's input: [rows, in_features], or token ids [rows].
        out: The module's output without the adapter, [rows, size].

    Returns:
        [rows, size], in the dtype of ``out``.
    """
    if change.input_gain is not None:
        scaled = (given.float() * change.input_gain).to(given.dtype)
        return product.original(scaled)[:, change.start : change.start + change.size]
    total = out.float()
    if change.gain is not None:
        total = total * change.gain
    if change.a is not None and change.b is not None:
        low = change.a.t()[given].float() if product.kind == "embedding" else given.float() @ change.a.float().t()
        total = total + (low * change.scale) @ change.b.float().t()
    if change.bias is not None:
        total = total + change.bias
    return total.to(out.dtype)


def change_inputs(
    product: Product, rows: torch.Tensor, users: Sequence[tuple[Sequence[PartChange], torch.Tensor]]
) -> torch.Tensor:
    """A product of rows of which some are multiplied by the gains of their adapters.

    Args:
        product: The product.
        rows: [..., in_features], contiguous.
        users: For each adapter, its changes with gains of the input, and the numbers of its rows.
    """
    if len(product.parts) > 1:  # the parts have different inputs
        out = product.original(rows).contiguous()
        flat, given = out.view(-1, product.out_features), rows.view(-1, product.in_features)
        for changes, own in users:
            for change in changes:
                columns = slice(change.start, change.start + change.size)
                flat[own, columns] = changed(product, change, given[own], flat[own, columns])
        return out
    scaled = rows.clone()
    flat = scaled.view(-1, product.in_features)
    for changes, own in users:
        for change in changes:
            if change.input_gain is not None:
                flat[own] = (flat[own].float() * change.input_gain).to(flat.dtype)
    return product.original(scaled)


def _moved(change: PartChange, device: torch.device) -> PartChange:
    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    return PartChange(
        change.start,
        change.size,
        moved(change.a),
        moved(change.b),
        change.scale,
        moved(change.gain),
        moved(change.bias),
        moved(change.input_gain),
    )
