"""What a soft prompt looks like: norms, and which vocabulary tokens its rows are near to."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from server.engine.messages import Inspect, Inspected
from server.engine.model.model_runner import ModelRunner
from server.engine.model.soft_prompts import SoftPromptLoadError
from server.engine.types import (
    ErrorCode,
    InspectedLayer,
    InspectedRow,
    Inspection,
    NormRange,
    RequestFailure,
    SoftPromptSource,
)

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2 * 1024 * 1024
"""Elements of a float32 intermediate: 8 MiB each, whatever the vocabulary."""

_NICENESS = 10
"""On Linux a thread's own: where cores are short, the steps go first."""


class Inspector:
    """Looks at soft prompts in a thread of its own, one after the other.

    The vocabulary is gone through in chunks, which bounds memory and, on a GPU, how long a step may have to wait
    behind one.

    Args:
        runner: The model; only its input embeddings are used.
        read: Reads a soft prompt's rows, from any thread.
    """

    def __init__(self, runner: ModelRunner, read: Callable[[SoftPromptSource], torch.Tensor]) -> None:
        self._runner = runner
        self._read = read
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="inspector", initializer=_step_back)

    def inspect(self, message: Inspect, on_inspected: Callable[[Inspected], None]) -> None:
        """Begin; ``on_inspected`` is called once, from the thread, with the result or with what went wrong."""
        self._executor.submit(self._answer, message, on_inspected)

    def close(self) -> None:
        """Finish what runs, drop what waits, and end the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _answer(self, message: Inspect, on_inspected: Callable[[Inspected], None]) -> None:
        outcome: Inspection | RequestFailure
        try:
            outcome = self._inspect(message.soft_prompt, message.num_nearest)
        except SoftPromptLoadError as error:
            outcome = RequestFailure(ErrorCode.FAILED, str(error))
        except Exception as error:
            logger.exception("an inspection failed")
            outcome = RequestFailure(ErrorCode.FAILED, f"{type(error).__name__}: {error}")
        on_inspected(Inspected(message.inspection_id, outcome))

    @torch.inference_mode()
    def _inspect(self, source: SoftPromptSource, num_nearest: int) -> Inspection:
        rows = self._read(source)
        return self._layers(rows) if source.is_key_values else self._nearest(rows, num_nearest)

    def _layers(self, rows: torch.Tensor) -> Inspection:
        """Rows [tokens, layers * 2 * heads * head_dim], per token K0 V0 K1 V1 ... (peft.tuners.prefix_tuning)."""
        spec = self._runner.cache_spec
        key_values = rows.view(len(rows), spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
        layers = []
        for index in range(spec.num_layers):
            keys, values = (_range(part) for part in key_values[:, index].double().norm(dim=-1).unbind(1))
            layers.append(InspectedLayer(keys, values))
        return Inspection(layers=layers)

    def _nearest(self, rows: torch.Tensor, num_nearest: int) -> Inspection:
        """Rows [tokens, embedding width]; cosine similarity with what the model's embedding gives for each token id.

        Norms are of float64, in which squares of any float32 are finite.
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
    """Vectors [n, width] at length 1; a vector of zeros, which has no direction, stays one."""
    lengths: torch.Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny)


def _range(norms: torch.Tensor) -> NormRange:
    return NormRange(float(norms.mean()), float(norms.min()), float(norms.max()))


def _step_back() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
