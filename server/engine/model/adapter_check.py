"""The startup check that adapters are served exactly: a made-up adapter against the model's own pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from prompt_store.types import ModuleShape
from server.engine.adapters.backend import AdapterBackend, PlainAdapters
from server.engine.adapters.modules import module_shapes, watch_calls
from server.engine.adapters.products import Product, find_products
from server.engine.adapters.replays import DecodeReplays
from server.engine.adapters.weights import AdapterWeights, PartChange
from server.engine.model.exactness import PROBE_TOLERANCE
from server.engine.model.paged_model import PagedModel

logger = logging.getLogger(__name__)

NUM_ROWS, NUM_KEPT = 13, 5
"""Rows of the texts, or of the context if it is shorter, and rows whose logits are computed. No layer of a model has
these numbers of rows by chance."""

RANK = 3
"""Of the made-up adapter: odd, so that padding of ranks shows."""

SHARES = (0.1, 0.3, 1.0)
"""How large each of its changes is, as a share of the product's output: the first that shows in the logits."""

MakeBackend = Callable[[Sequence[Product], torch.device, torch.dtype], AdapterBackend]


class AdapterCheck:
    """Finds the modules that adapters can change, and checks them.

    The constructor runs the model's own modules, so it comes before any layer is fused. It makes an adapter up, which
    changes every module that can be changed, and computes the model's logits with it by hooks.

    Args:
        model: As loaded, with an attention of transformers.
        max_model_len: Positions of a sequence.
        vocab_size: Number of token ids.
        has_experts: Whether it is a mixture of experts.

    Attributes:
        modules: The modules of the base that hold weights, by name.
        off: Why the model is served without adapters; None if it is not.
    """

    def __init__(self, model: PreTrainedModel, *, max_model_len: int, vocab_size: int, has_experts: bool) -> None:
        self.off: str | None = None
        self.modules: dict[str, ModuleShape] = {}
        self._dtype: torch.dtype = model.dtype
        self._has_experts = has_experts
        self._made_up: dict[str, PartChange] = {}
        self._expected = torch.empty(0)
        self._weights: AdapterWeights | None = None
        length = min(NUM_ROWS, max_model_len)
        self._ids = (torch.arange(length) * 6673 % vocab_size).to(model.device)[None]
        self._kept = torch.arange(length, device=model.device)[-NUM_KEPT:]
        try:
            self._find(model)
        except Exception as error:  # a model of an unknown form is served without adapters
            self._refuse(f"its own pass with an adapter fails ({type(error).__name__}: {error})")

    def _find(self, model: PreTrainedModel) -> None:
        self.modules = module_shapes(model)
        with watch_calls(model, self.modules, self._ids.shape[1], len(self._kept)) as watch:
            bare = self._own_logits(model)
        supported = {name: shape for name, shape in self.modules.items() if shape.unsupported is None}
        if not supported:
            self._refuse("its pass calls no linear layer with all of its rows")
            return
        for share in SHARES:
            generator = torch.Generator().manual_seed(0)
            self._made_up = {
                name: _made_up(shape, share * watch.ratios[name], self._dtype, generator)
                for name, shape in supported.items()
            }
            with self._hooked(model):
                adapted = self._own_logits(model)
            self._expected = torch.cat([bare, adapted])
            if (adapted - bare).abs().max() > 2 * self._allowed():
                return
        self._refuse("an adapter on all of its modules does not change its logits")

    def connect(self, model: PreTrainedModel, paged: PagedModel, make: MakeBackend) -> None:
        """Let a served model have adapters, if it is exact with them; else set ``off``.

        If the platform's backend is not, torch's operations are tried.

        Args:
            model: The model; its layers may be fused.
            paged: The same model with its cache, of at least 2 blocks or 2 texts; the content of its first blocks is
                overwritten.
            make: Makes the backend, of the model's products and its device.
        """
        if self.off is not None:
            return
        products: Sequence[Product] = ()
        backend: AdapterBackend | None = None
        try:
            products = self._products(model)
            backend = make(products, model.device, model.dtype)
            self._try(paged, backend)
            return
        except Exception as error:  # of any kind: all but adapters is served
            reason = str(error) or type(error).__name__
        if products and not isinstance(backend, PlainAdapters):
            logger.warning("adapters run by torch's operations, which is slower: %s", reason)
            try:
                self._try(paged, PlainAdapters(products, model.device))
                return
            except Exception as error:
                reason = str(error) or type(error).__name__
        self._refuse(reason)

    def _products(self, model: PreTrainedModel) -> Sequence[Product]:
        """The products of the served model.

        Raises:
            NotImplementedError: If a module that adapters can change is in none.
        """
        products = find_products(model, self.modules)
        lost = sorted(self._made_up.keys() - {part.name for product in products for part in product.parts})
        if lost:
            raise NotImplementedError(f"{lost[0]} is not called by name in its served form")
        return products

    def _try(self, paged: PagedModel, backend: AdapterBackend) -> None:
        """Let a model have a backend, if it is exact with it.

        Raises:
            Exception: Of any kind, if it is not, or fails.
        """
        paged.adapter_backend = backend
        try:
            self._run(paged, backend)
        except Exception:
            paged.adapter_backend = None
            raise

    def release(self) -> None:
        """Release the made-up adapter and the references."""
        self._made_up, self._expected, self._weights = {}, torch.empty(0), None

    @torch.inference_mode()
    def check_replays(self, paged: PagedModel, graphs: DecodeReplays) -> None:
        """Compare recorded passes of every size with the references, after ``connect``.

        Raises:
            NotImplementedError: If they differ.
        """
        weights = self._weights
        kept, tables, expected = self._forward(paged, weights)
        last = int(self._ids[0, kept[-1]])
        for size in graphs.sizes:
            rows = [index % 2 == 0 for index in range(size)]  # with the adapter, without, and so on
            replayed = graphs.run(
                [last] * size,
                [kept[-1]] * size,
                [tables[has_adapter] for has_adapter in rows],
                size,
                [weights if has_adapter else None for has_adapter in rows],
            )
            for has_adapter in {*rows}:
                own = [index for index, other in enumerate(rows) if other is has_adapter]
                self._compare_rows(replayed[own], expected[int(has_adapter), -1:], has_adapter=has_adapter)

    @torch.inference_mode()
    def _run(self, paged: PagedModel, backend: AdapterBackend) -> None:
        """Compare a bare text, and the same text with the made-up adapter, in one flat batch and as decodes."""
        changes: dict[int, list[PartChange]] = {}
        for product in backend.products:
            for part in product.parts:
                made_up = self._made_up[part.name]
                placed = PartChange(part.start, part.size, made_up.a, made_up.b, made_up.scale * product.scale)
                changes.setdefault(product.index, []).append(placed)
        self._weights = backend.place(backend.pack(changes))
        kept, tables, expected = self._forward(paged, self._weights)
        if not paged.can_decode(2):
            return
        last = int(self._ids[0, kept[-1]])
        decoded = paged.launch_decodes([last, last], [kept[-1]] * 2, tables, 2, [None, self._weights])
        self._compare(decoded[:, None], expected[:, -1:])

    def _forward(
        self, paged: PagedModel, weights: AdapterWeights | None
    ) -> tuple[list[int], list[list[int]], torch.Tensor]:
        """Compare both texts in one flat batch, which writes their keys and values.

        Returns:
            The rows whose logits are compared, the block tables, and the logits [bare and adapted, rows, vocabulary].
        """
        cache = paged.backend.cache
        size, length = cache.spec.block_size, self._ids.shape[1]
        per_seq = -(-length // size)
        if 2 * per_seq > cache.num_blocks:
            length = cache.num_blocks // 2 * size
            per_seq = cache.num_blocks // 2
        kept = [row for row in self._kept.tolist() if row < length]
        tables = [list(range(per_seq)), list(range(per_seq, 2 * per_seq))]
        ids = self._ids[:, :length]
        expected = self._expected.view(2, len(self._kept), -1)[:, : len(kept)]
        if not kept:
            raise NotImplementedError("the cache is too small to check it")
        got = paged.forward(
            [(table, 0, length) for table in tables],
            {"input_ids": torch.cat([ids, ids], dim=1)},
            [*kept, *[row + length for row in kept]],
            [None, weights],
        )
        self._compare(got.view(expected.shape), expected)
        return kept, tables, expected

    def _compare(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        """Logits [bare and adapted, rows, vocabulary]."""
        for has_adapter in (False, True):
            self._compare_rows(got[int(has_adapter)], expected[int(has_adapter)], has_adapter=has_adapter)

    def _compare_rows(self, got: torch.Tensor, expected: torch.Tensor, *, has_adapter: bool) -> None:
        """Logits [rows, vocabulary] of texts with the adapter, or without."""
        by_row = (got.float() - expected.float()).abs().amax(dim=-1)
        difference = by_row.quantile(0.25).item() if self._is_lenient else by_row.max().item()
        if not difference <= self._allowed():
            what = "a text with an adapter" if has_adapter else "a text beside one with an adapter"
            raise NotImplementedError(
                f"the logits of {what} differ from its own by {difference:.3g}, more than rounding explains "
                f"({self._allowed():.3g})"
            )

    @property
    def _is_lenient(self) -> bool:
        """Whether rounding may send a row to another expert; see ``ExactnessCheck``."""
        return self._has_experts and self._dtype != torch.float32

    def _allowed(self) -> float:
        factor = 2.0 if self._is_lenient else 1.0
        return factor * PROBE_TOLERANCE[self._dtype] * self._expected.float().std().item()

    def _own_logits(self, model: PreTrainedModel) -> torch.Tensor:
        positions = torch.arange(self._ids.shape[1], device=self._ids.device)[None]
        with torch.inference_mode():
            logits: torch.Tensor = model(
                input_ids=self._ids, position_ids=positions, use_cache=False, logits_to_keep=self._kept
            ).logits
        return logits[0]

    @contextmanager
    def _hooked(self, model: PreTrainedModel) -> Iterator[None]:
        with ExitStack() as stack:
            for name, change in self._made_up.items():
                module = model.get_submodule(name)
                handle = module.register_forward_hook(_adding(module, change, self.modules[name].kind))
                stack.callback(handle.remove)
            yield

    def _refuse(self, reason: str) -> None:
        self.off = f"adapters are not served for this model: {reason}"
        logger.warning("%s", self.off)


def _made_up(shape: ModuleShape, size: float, dtype: torch.dtype, generator: torch.Generator) -> PartChange:
    """A random change whose output is ``size`` times as large as the module's input."""
    rows = torch.randn(RANK, shape.in_features, generator=generator)
    if shape.kind != "embedding":
        rows *= shape.in_features**-0.5
    columns = torch.randn(shape.out_features, RANK, generator=generator) * RANK**-0.5
    # Divided by two, which a scale restores.
    return PartChange(0, shape.out_features, rows.to(dtype), (columns * size / 2).to(dtype), scale=2.0)


def _adding(module: nn.Module, change: PartChange, kind: str) -> Callable[..., torch.Tensor]:
    """A hook that adds a change to a module's output."""
    if change.a is None or change.b is None:
        raise AssertionError("a made-up change has both factors")
    a, b = change.a, change.b
    scale = change.scale * float(getattr(module, "embed_scale", 1.0) if kind == "embedding" else 1.0)

    def add(_module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        own_a, own_b = a.to(output.device).float(), b.to(output.device).float()
        low = own_a.t()[arguments[0]] if kind == "embedding" else arguments[0].float() @ own_a.t()
        return (output.float() + scale * low @ own_b.t()).to(output.dtype)

    return add
