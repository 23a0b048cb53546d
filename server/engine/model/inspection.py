"""Inspection of soft prompts and adapters: norms, and the nearest vocabulary tokens."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from server.engine.adapters.inspection import inspect_adapter
from server.engine.adapters.reading import AdapterLoadError
from server.engine.device_faults import raise_if_device_failed
from server.engine.messages import AdapterInspection, Inspect, InspectAdapter, Inspected
from server.engine.model.model_runner import ModelRunner
from server.engine.model.soft_prompts import SoftPromptLoadError
from server.engine.types import (
    Capability,
    ErrorCode,
    InspectedLayer,
    InspectedRow,
    Inspection,
    NormRange,
    RequestFailure,
    SoftPromptSource,
)
from server.errors import DeviceError

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2 * 1024 * 1024
"""Maximum elements of a float32 intermediate (8 MiB), for any vocabulary."""

_NICENESS = 10
"""Niceness of the thread (per thread on Linux), so that steps go first if cores are short."""


class Inspector:
    """Inspects soft prompts one at a time in a separate thread.

    The vocabulary is processed in chunks, which bounds memory and, on a GPU, the time that a step waits.

    Args:
        runner: The model; only its input embeddings are used.
        read: Reads a soft prompt's rows, from any thread.
        on_device_error: Called from the inspector's thread when the device has failed.

    Attributes:
        device_error: The failure of the device; None if it works.
    """

    def __init__(
        self,
        runner: ModelRunner,
        read: Callable[[SoftPromptSource], torch.Tensor],
        on_device_error: Callable[[], None],
    ) -> None:
        self.device_error: DeviceError | None = None
        self._runner = runner
        self._read = read
        self._on_device_error = on_device_error
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="inspector", initializer=_lower_priority)

    def inspect(self, message: Inspect | InspectAdapter, on_inspected: Callable[[Inspected], None]) -> None:
        """Start an inspection.

        ``on_inspected`` is called once, from the thread, with the result or an error, unless the device fails.
        """
        self._executor.submit(self._answer, message, on_inspected)

    def close(self) -> None:
        """Finish the running inspection, drop waiting ones, and end the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _answer(self, message: Inspect | InspectAdapter, on_inspected: Callable[[Inspected], None]) -> None:
        outcome: Inspection | AdapterInspection | RequestFailure
        try:
            if isinstance(message, Inspect):
                outcome = self._inspect(message.soft_prompt, message.num_nearest)
            elif self._runner.adapter_reader is None:
                outcome = RequestFailure(ErrorCode.REFUSED, self._runner.info.refusal(Capability.ADAPTERS))
            else:
                outcome = inspect_adapter(self._runner.adapter_reader, message.adapter)
        except (SoftPromptLoadError, AdapterLoadError) as error:
            outcome = RequestFailure(ErrorCode.FAILED, str(error))
        except Exception as error:
            logger.exception("an inspection failed")
            try:
                raise_if_device_failed(error, self._runner.platform.check_device)
            except DeviceError as device_error:
                self.device_error = device_error
                self._on_device_error()
                return
            outcome = RequestFailure(ErrorCode.FAILED, f"{type(error).__name__}: {error}")
        on_inspected(Inspected(message.inspection_id, outcome))

    @torch.inference_mode()
    def _inspect(self, source: SoftPromptSource, num_nearest: int) -> Inspection:
        rows = self._read(source)
        return self._layers(rows) if source.is_key_values else self._nearest(rows, num_nearest)

    def _layers(self, rows: torch.Tensor) -> Inspection:
        """Norms of rows [tokens, layers * 2 * kv_heads * head_dim], per token K0 V0 K1 V1 ... (PEFT's order)."""
        spec = self._runner.cache_spec
        key_values = rows.view(len(rows), spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
        layers = []
        for index in range(spec.num_layers):
            keys, values = (_range(part) for part in key_values[:, index].double().norm(dim=-1).unbind(1))
            layers.append(InspectedLayer(keys, values))
        return Inspection(layers=layers)

    def _nearest(self, rows: torch.Tensor, num_nearest: int) -> Inspection:
        """The nearest tokens of rows [tokens, embedding width], by cosine similarity with the input embeddings.

        Norms are float64, in which the square of any float32 is finite.
        """
        device = self._runner.device
        exact = rows.double()
        norms = exact.norm(dim=-1)
        directions = _directions(exact).float().to(device)
        vocab_size = self._runner.info.vocab_size
        chunk_size = max(1, CHUNK_ELEMENTS // max(rows.shape))
        best = torch.empty(len(rows), 0, device=device)
        best_ids = torch.empty(len(rows), 0, dtype=torch.long, device=device)
        norm_sum = square_sum = 0.0
        for start in range(0, vocab_size, chunk_size):
            ids = torch.arange(start, min(start + chunk_size, vocab_size), device=device)
            embeddings = self._runner.embed_tokens(ids).float()
            vocabulary_norms = embeddings.norm(dim=-1).double()
            norm_sum += float(vocabulary_norms.sum())
            square_sum += float(vocabulary_norms.square().sum())
            best = torch.cat([best, directions @ _directions(embeddings).T], dim=1)
            best_ids = torch.cat([best_ids, ids.expand(len(rows), -1)], dim=1)
            best, order = best.topk(min(num_nearest, best.shape[1]), dim=1)
            best_ids = best_ids.gather(1, order)
        mean = norm_sum / vocab_size
        return Inspection(
            rows=[
                InspectedRow(norm, list(zip(ids, similarities, strict=True)))
                for norm, ids, similarities in zip(
                    norms.tolist(), best_ids.tolist(), best.clamp(-1.0, 1.0).tolist(), strict=True
                )
            ],
            vocabulary_norm_mean=mean,
            vocabulary_norm_std=max(0.0, square_sum / vocab_size - mean * mean) ** 0.5,
        )


def _directions(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [n, width] scaled to length 1; zero vectors stay zero."""
    lengths: torch.Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny)


def _range(norms: torch.Tensor) -> NormRange:
    return NormRange(float(norms.mean()), float(norms.min()), float(norms.max()))


def _lower_priority() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
