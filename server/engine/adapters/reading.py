"""Reads adapters from the files of PEFT, and computes what depends on the base's weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from prompt_store.files.lora.adapter_layout import ADAPTER_HEAD_PATTERN, adapter_layout
from prompt_store.types import AdaptedModule
from server.engine.adapters.backend import AdapterBackend
from server.engine.adapters.classification_head import ClassificationHead, read_head
from server.engine.adapters.products import Part, Product
from server.engine.adapters.weights import AdapterWeights, PartChange, is_finite
from server.engine.types import AdapterSource

_NORMS_AT_ONCE = 1024
"""Rows of a weight whose norms are computed at once."""


class AdapterLoadError(Exception):
    """An adapter's files cannot be read, or do not match the base."""


class AdapterReader:
    """Reads adapters for one served model.

    Args:
        backend: Lays their weights out; its products are those of the model.
        dtype: The serving dtype.
        head_width: Columns of a classification head.

    Attributes:
        dtype: The serving dtype.
    """

    def __init__(self, backend: AdapterBackend, dtype: torch.dtype, *, head_width: int) -> None:
        self._backend = backend
        self.dtype = dtype
        self._head_width = head_width
        self._places: dict[str, tuple[Product, Part]] = {
            part.name: (product, part) for product in backend.products for part in product.parts
        }
        self._norms: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    @property
    def products(self) -> Sequence[Product]:
        """The products of the model, in its order."""
        return self._backend.products

    def read(self, source: AdapterSource) -> AdapterWeights:
        """Read an adapter, from any thread, without caching it; the products can read what is returned.

        Raises:
            AdapterLoadError: If its files cannot be read, or do not match the base.
        """
        return self.place(self.pack(source))

    def place(self, weights: AdapterWeights) -> AdapterWeights:
        """``AdapterBackend.place``."""
        return self._backend.place(weights)

    def pack(self, source: AdapterSource) -> AdapterWeights:
        """Read an adapter into host memory, as ``read``."""
        try:
            changes = self.changes(source)
            return self._backend.pack(changes, self._head(source))
        except AdapterLoadError:
            raise
        except Exception as error:
            raise AdapterLoadError(f"adapter {source.digest[:12]} cannot be read: {error}") from error

    def changes(self, source: AdapterSource) -> dict[int, list[PartChange]]:
        """What an adapter changes, by the index of the product; tensors are on the host.

        Raises:
            Exception: Of any kind, if its files cannot be read.
            AdapterLoadError: If they do not match the base.
        """
        fields = json.loads(Path(source.config_path).read_bytes())
        changes: dict[int, list[PartChange]] = {}
        with safe_open(source.path, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            for module in adapter_layout(fields, shapes):
                place = self._places.get(module.name)
                if place is None:
                    raise AdapterLoadError(
                        f"adapter {source.digest[:12]} changes {module.name}, which is no module of this base that "
                        "can be adapted"
                    )
                tensors = {part: file.get_tensor(name) for part, name in module.tensors.items()}
                change = self._change(source, module, tensors, *place)
                changes.setdefault(place[0].index, []).append(change)
        return changes

    def weight_norms(self, name: str) -> torch.Tensor:
        """The norm of each row of a module's weight: [out_features] float32, on the host."""
        product, part = self._places[name]
        return self._row_norms(product)[part.start : part.start + part.size]

    def _head(self, source: AdapterSource) -> ClassificationHead | None:
        if source.num_labels is None:
            return None
        width, pattern = self._head_width, ADAPTER_HEAD_PATTERN
        return read_head(source.path, num_labels=source.num_labels, width=width, pattern=pattern)

    def _change(
        self,
        source: AdapterSource,
        module: AdaptedModule,
        tensors: Mapping[str, torch.Tensor],
        product: Product,
        part: Part,
    ) -> PartChange:
        """The change of one module, from its tensors by the names of ``AdaptedModule.tensors``."""

        def checked(key: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
            tensor = tensors.get(key)
            if tensor is None:
                return None
            if tensor.numel() != torch.Size(shape).numel() or (
                len(shape) > 1 and tuple(tensor.shape) != tuple(shape)
            ):
                raise AdapterLoadError(
                    f"adapter {source.digest[:12]} has {module.tensors[key]} of shape {tuple(tensor.shape)}; this "
                    f"base needs {tuple(shape)}"
                )
            tensor = tensor.reshape(tuple(shape)).to(dtype)
            if not is_finite(tensor):  # the upload was checked in the dtype that was served then
                raise AdapterLoadError(
                    f"adapter {source.digest[:12]} holds a value in {module.tensors[key]} that is not finite in "
                    f"{str(dtype).removeprefix('torch.')}"
                )
            return tensor

        if module.gain_on_input:
            gain = checked("gain", [product.in_features], torch.float32)
            return PartChange(part.start, part.size, input_gain=gain)
        a = checked("A", [module.rank, product.in_features], self.dtype)
        b = checked("B", [part.size, module.rank], torch.float32)
        bias = checked("bias", [part.size], torch.float32)
        gain = checked("gain", [part.size], torch.float32)
        magnitude = checked("magnitude", [part.size], torch.float32)
        scale = module.scale * product.scale
        if bias is not None:
            bias = bias * scale
        if magnitude is not None and a is not None and b is not None:
            gain = magnitude / self._adapted_norms(product, part, a, b, module.scale)
            b = b * gain[:, None]
            base_bias = product.bias()
            terms = [bias * gain] if bias is not None else []
            if base_bias is not None:  # DoRA does not scale it
                own = base_bias[part.start : part.start + part.size].float().cpu()
                terms.append((1.0 - gain) * own)
            bias = sum(terms[1:], terms[0]) if terms else None
        return PartChange(
            part.start,
            part.size,
            a=a,
            b=None if b is None else b.to(self.dtype),
            scale=scale,
            gain=gain,
            bias=bias,
        )

    def _adapted_norms(
        self, product: Product, part: Part, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The norm of each row of ``W + scale * B A``: [size] float32.

        The weight W itself is not needed: the squares are those of W's rows, plus ``2 scale (W A^T) . B``, plus
        ``scale^2 (B A A^T) . B``.
        """
        with torch.inference_mode():
            crossed = product.original(a.to(product.device)).float().cpu()
            bias = product.bias()
            if bias is not None:
                crossed = crossed - bias.float().cpu()
        crossed = crossed[:, part.start : part.start + part.size].t()
        wide = a.float()
        squares = self._row_norms(product)[part.start : part.start + part.size].square()
        squares = squares + 2.0 * scale * (crossed * b).sum(1)
        squares = squares + scale * scale * ((b @ (wide @ wide.t())) * b).sum(1)
        return squares.clamp_min(0.0).sqrt()

    def _row_norms(self, product: Product) -> torch.Tensor:
        """The norm of each row of a product's weight; computed once."""
        with self._lock:
            norms = self._norms.get(product.index)
            if norms is None:
                with torch.inference_mode():
                    # In parts: a whole weight in float32 is larger than what a GPU has left.
                    parts = torch.split(product.weight(self.dtype), _NORMS_AT_ONCE)
                    norms = torch.cat([part.float().norm(dim=1).cpu() for part in parts])
                self._norms[product.index] = norms
        return norms
