"""An engine that answers from a script."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from prompt_store.types import ModuleShape
from server.engine.interface import PROBE_PREFIX
from server.engine.messages import AdapterInspection, BatchPicture, InspectedModule
from server.engine.stats import EngineStats
from server.engine.types import (
    AdapterSource,
    Capability,
    FinishReason,
    GenerateRequest,
    InspectedLayer,
    InspectedRow,
    Inspection,
    Logprobs,
    ModelInfo,
    NormRange,
    SoftPromptSource,
    TokenEvent,
)
from server.errors import EngineNotReadyError, UnsupportedByEngineError
from tests.support.byte_tokenizer import EOS
from tests.support.probes import FakeProbes

BASE = "tiny"
WIDTH, CONTEXT = 8, 256
MODULES = {
    f"model.layers.{layer}.self_attn.{name}": ModuleShape("linear", WIDTH, WIDTH)
    for layer in range(2)
    for name in ("q_proj", "v_proj")
}
"""The products of the scripted model that an adapter may change."""


EMPTY_PICTURE = BatchPicture(
    step=0, sequences=[], runs=[], num_blocks=10, num_used_blocks=0, num_idle_blocks=0, block_map=bytes(10)
)


def logprobs_of(token_id: int, num_top: int) -> Logprobs:
    """Made-up logprobs: the token is the likeliest, and the ids after it follow."""
    return Logprobs(-token_id / 512, [((token_id + rank) % 258, -token_id / 512 - rank) for rank in range(num_top)])


def scores(request: GenerateRequest, new: list[int], *, is_first: bool) -> dict[str, Any]:
    """The logprobs in an event: of new tokens, and of the prompt in the first event, if requested."""
    num_top, num_prompt_top = request.params.logprobs, request.params.prompt_logprobs
    of_new = None if num_top is None else [logprobs_of(token_id, num_top) for token_id in new]
    if num_prompt_top is None or not is_first:
        return {"logprobs": of_new}
    of_prompt: list[Logprobs | None] = [
        logprobs_of(token_id, num_prompt_top) for token_id in request.prompt_token_ids
    ]
    if request.soft_prompt is None:
        of_prompt[0] = None
    return {"logprobs": of_new, "prompt_logprobs": of_prompt[request.params.prompt_logprobs_start :]}


def head_of(request: GenerateRequest) -> list[float] | None:
    """Made-up logits of a head: 0 for the last label, and lower for the others with longer texts."""
    if not request.params.classify:
        return None
    heads = [source.num_labels for source in (request.soft_prompt, request.adapter) if source is not None]
    (num_labels,) = [head for head in heads if head is not None]
    return [-float((num_labels - 1 - index) * len(request.prompt_token_ids)) for index in range(num_labels)]


class FakeEngine(FakeProbes):
    """Answers every request with ``reply``, one byte a token, then the end-of-sequence token."""

    def __init__(self) -> None:
        super().__init__()
        self.reply = "hello world"
        self.step_seconds = 0.0
        self.tokens_per_event = 1
        self.queue_seconds: float | None = None
        """What the first event says about queue and prefill."""
        self.stall_after: int | None = None
        """Tokens after which nothing more comes until the request is aborted."""
        self.fail_after: int | None = None
        self.failure: Exception | None = None
        self.start_failure: Exception | None = None
        self.start_gate = threading.Event()
        self.start_gate.set()
        self.alive = False
        self.outage: str | None = None
        self.since = 0.0
        self._subscribers: list[Callable[[], None]] = []
        self.draining = False
        self.stopped = False
        self.requests: list[GenerateRequest] = []
        self.capabilities: tuple[Capability, ...] = tuple(Capability)
        self.prepared: list[SoftPromptSource] = []
        self.prepared_adapters: list[AdapterSource] = []
        self.prepare_failure: Exception | None = None
        self.pinned: dict[str, SoftPromptSource] = {}
        self.pinned_adapters: dict[str, AdapterSource] = {}
        self.inspected: list[SoftPromptSource] = []
        self.inspected_adapters: list[AdapterSource] = []
        self.inspect_failure: Exception | None = None
        self.ended: list[tuple[str, str]] = []
        """Request id and ending (stop, length, abort, error), once for each request."""
        self.exposition = ""
        self.picture = EMPTY_PICTURE
        self.stats = EngineStats(num_blocks=10, num_used_blocks=5, max_batch_distinct_prompts=3)

    @property
    def model(self) -> ModelInfo:
        if not self.alive:
            raise EngineNotReadyError("the model is still being loaded")
        return ModelInfo(
            architecture="TinyForCausalLM",
            dtype="float32",
            device="cpu",
            embedding_width=WIDTH,
            num_layers=2,
            num_kv_heads=2,
            head_dim=4,
            vocab_size=258,
            max_model_len=CONTEXT,
            block_size=16,
            num_blocks=10,
            block_bytes=4096,
            eos_token_ids=(EOS,),
            capabilities=self.capabilities,
            modules=MODULES if Capability.ADAPTERS in self.capabilities else {},
        )

    @property
    def is_ready(self) -> bool:
        return self.alive and not self.draining and self.outage is None

    async def look(self) -> BatchPicture:
        if Capability.BATCH_PICTURE not in self.capabilities:
            raise UnsupportedByEngineError(self.model.refusal(Capability.BATCH_PICTURE))
        return self.picture

    def subscribe(self, on_restarted: Callable[[], None]) -> None:
        self._subscribers.append(on_restarted)

    def on_restarted(self) -> None:
        """Tell all subscribers."""
        for tell in self._subscribers:
            tell()

    def _is_stalled(self) -> bool:
        return self.stall_after is not None and not self.draining

    @property
    def in_flight(self) -> int:
        return len(self.requests) - len(self.ended)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        if not self.is_ready:
            raise EngineNotReadyError("the engine does not accept requests now")
        missing = self.model.missing(request)
        if missing is not None:
            raise UnsupportedByEngineError(self.model.refusal(missing))
        if request.request_id.startswith(PROBE_PREFIX):
            self.try_out(request)
            yield TokenEvent(request_id=request.request_id, token_ids=[], finish_reason=FinishReason.LENGTH)
            return
        self.requests.append(request)
        ending = "abort"
        try:
            tokens = [*self.reply.encode(), *([] if request.params.ignore_eos else [EOS])]
            tokens = tokens[: request.params.max_tokens]
            num_sent = 0
            if not tokens:
                await asyncio.sleep(self.step_seconds)
                ending = "length" if self.failure is None else "error"
                if self.failure is not None:
                    raise self.failure
                yield TokenEvent(
                    request_id=request.request_id,
                    finish_reason=FinishReason.LENGTH,
                    num_cached_tokens=2,
                    class_logits=head_of(request),
                    **scores(request, [], is_first=True),
                )
            while num_sent < len(tokens):
                if self.failure is not None and num_sent >= (self.fail_after or 0):
                    ending = "error"
                    raise self.failure
                if self.stall_after is not None and num_sent >= self.stall_after:
                    while self._is_stalled():  # noqa: ASYNC110 - set by another thread
                        await asyncio.sleep(0.005)
                    if self.draining:
                        yield TokenEvent(request_id=request.request_id, finish_reason=FinishReason.ABORT)
                        return
                await asyncio.sleep(self.step_seconds)
                new = tokens[num_sent : num_sent + self.tokens_per_event]
                num_sent += len(new)
                stop = new[-1] if new[-1] == EOS or new[-1] in request.params.stop_token_ids else None
                reason = None
                if stop is not None:
                    reason = FinishReason.STOP
                elif num_sent == len(tokens):
                    reason = FinishReason.LENGTH
                if reason is not None:
                    ending = reason.value
                seconds = self.queue_seconds if num_sent == len(new) else None
                yield TokenEvent(
                    request_id=request.request_id,
                    token_ids=new,
                    finish_reason=reason,
                    stop_token_id=stop,
                    num_cached_tokens=2,
                    queue_seconds=seconds,
                    prefill_seconds=seconds,
                    step=num_sent,
                    **scores(request, new, is_first=num_sent == len(new)),
                )
                if reason is not None:
                    return
        finally:
            self.ended.append((request.request_id, ending))

    async def prepare(self, soft_prompt: SoftPromptSource | None, adapter: AdapterSource | None = None) -> None:
        if not self.is_ready:
            raise EngineNotReadyError("the engine does not accept requests now")
        await asyncio.sleep(self.step_seconds)
        if self.prepare_failure is not None:
            raise self.prepare_failure
        self.prepared += [] if soft_prompt is None else [soft_prompt]
        self.prepared_adapters += [] if adapter is None else [adapter]

    def pin(self, source: SoftPromptSource | AdapterSource) -> None:
        if isinstance(source, AdapterSource):
            self.pinned_adapters[source.identity] = source
        else:
            self.pinned[source.identity] = source

    def unpin(self, source: SoftPromptSource | AdapterSource) -> None:
        del (self.pinned_adapters if isinstance(source, AdapterSource) else self.pinned)[source.identity]

    async def inspect(self, soft_prompt: SoftPromptSource, *, num_nearest: int) -> Inspection:
        if self.inspect_failure is not None:
            raise self.inspect_failure
        assert Path(soft_prompt.path).exists()  # noqa: ASYNC240 - the file is in memory
        self.inspected.append(soft_prompt)
        if soft_prompt.is_key_values:
            layer = InspectedLayer(NormRange(2.0, 1.0, 3.0), NormRange(5.0, 4.0, 6.0))
            return Inspection(layers=[layer] * self.model.num_layers)
        nearest = [(token_id, 1 - rank / 100) for rank, token_id in enumerate(range(97, 97 + num_nearest))]
        rows = [InspectedRow(float(index), nearest) for index in range(soft_prompt.num_virtual_tokens)]
        return Inspection(rows=rows, vocabulary_norm_mean=1.5, vocabulary_norm_std=0.25)

    async def inspect_adapter(self, adapter: AdapterSource) -> AdapterInspection:
        if self.inspect_failure is not None:
            raise self.inspect_failure
        assert Path(adapter.path).exists()  # noqa: ASYNC240 - the files are in memory
        assert Path(adapter.config_path).exists()  # noqa: ASYNC240 - the files are in memory
        self.inspected_adapters.append(adapter)
        return AdapterInspection(
            [
                InspectedModule(name=name, rank=2, scale=0.5, frobenius_norm=1.0, spectral_norm=0.75, share=0.125)
                for name in MODULES
            ]
        )

    async def start(self) -> None:
        while not self.start_gate.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.005)
        if self.start_failure is not None:
            raise self.start_failure
        self.alive = True

    async def drain(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while self.in_flight and time.monotonic() < deadline:  # noqa: ASYNC110 - a count, not an event
            await asyncio.sleep(0.005)
        self.draining = True
        while self.in_flight:  # noqa: ASYNC110 - a count, not an event
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self.alive = False
        self.stopped = True
