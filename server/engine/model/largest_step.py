"""Measures the memory of the largest step, and gives keys and values what it leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from server.config import EngineSettings
from server.engine.adapters.backend import AdapterBackend
from server.engine.adapters.weights import AdapterWeights, PartChange
from server.engine.attention.kv_cache import KVCache
from server.engine.attention.memory import GIB, DeviceMemory, MemoryProfile, MemoryReading
from server.engine.model.paged_model import PagedModel
from server.engine.model.prompt_scoring import PromptScorer
from server.engine.sampling.sampler import Sampler
from server.engine.scheduling.plan import Chunk
from server.engine.scheduling.sequence import Sequence
from server.engine.types import GenerateRequest, SamplingParams
from server.errors import EngineStartError

logger = logging.getLogger(__name__)

TOP_KS = (50, 0)
"""A top-k that few candidates cover, and none: flat logits are then drawn again from the sorted vocabulary."""

NUM_LOGPROBS = 20
"""Logprobs of each token, at most what the API allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestStep:
    """A step with all the rows, sequences and sampling parameters that the settings allow.

    As many rows as possible are of long chunks at the end of the context. Each other sequence is a decode of one
    token. The rows are embeddings, every sequence samples with all parameters that take memory, and the long texts
    are scored. All of them use the same blocks, so a small cache suffices.

    Not included are the tables of rules and grammars, which are small, and the copies of soft prompts of keys and
    values. Decodes are short, because only torch's attention takes memory for each of their keys.

    Attributes:
        paged_model: The model with its cache.
        sampler: Chooses the tokens.
        scorer: Scores the texts, if it can.
        embed: Token ids [1, rows] to embeddings [1, rows, width].
        max_model_len: Positions of one sequence.
        max_num_seqs: Sequences of a step.
        max_num_batched_tokens: Rows of a step.
        make_adapter: Makes an adapter, which all rows then have; None for a step without adapters.
    """

    paged_model: PagedModel
    sampler: Sampler
    scorer: PromptScorer
    embed: Callable[[torch.Tensor], torch.Tensor]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    make_adapter: Callable[[], AdapterWeights] | None = None

    def chunks(self) -> list[Chunk]:
        """The chunks of the step, decodes first; their blocks repeat."""
        cache = self.paged_model.backend.cache
        num_seqs = min(self.max_num_seqs, self.max_num_batched_tokens)
        remaining = self.max_num_batched_tokens - num_seqs
        chunks: list[Chunk] = []
        for index in range(num_seqs):
            num_tokens = 1 + min(remaining, self.max_model_len - 1)
            remaining -= num_tokens - 1
            stop = self.max_model_len if num_tokens > 1 else 1
            num_blocks = -(-stop // cache.spec.block_size)
            chunks.append(
                Chunk(
                    [block % cache.num_blocks for block in range(num_blocks)],
                    stop - num_tokens,
                    num_tokens,
                    self._sequence(str(index), stop, stop - num_tokens, is_scored=num_tokens > 1),
                    shared=list(range(num_tokens // cache.spec.block_size)),
                )
            )
        return chunks[::-1]

    @torch.inference_mode()
    def run(self) -> None:
        """Run the step; the content of the cache is lost."""
        cache, chunks = self.paged_model.backend.cache, self.chunks()
        seqs = [chunk.seq for chunk in chunks if chunk.seq is not None]
        cache.copy_blocks([(0, cache.spare_block)] * len(chunks))  # a partial block of a soft prompt for each
        num_rows = sum(chunk.num_tokens for chunk in chunks)
        last_rows: list[int] = []
        row = 0
        for chunk in chunks:
            row += chunk.num_tokens
            last_rows.append(row - 1)
        spans = [(chunk.block_table, chunk.start, chunk.num_tokens) for chunk in chunks]
        embeds = self.embed(torch.zeros(1, num_rows, dtype=torch.long, device=cache.tensor.device))
        adapters = None if self.make_adapter is None else [self.make_adapter()] * len(chunks)
        with self.scorer.watching(chunks) as kept:
            logits = self.paged_model.forward(spans, {"inputs_embeds": embeds}, last_rows, adapters)
        if kept and self.scorer.is_exact:
            self.scorer.score(chunks, kept[0], lambda _: logits[:1], adapters)
        blocks = [chunk.block_table[index] for chunk in chunks for index in chunk.shared]
        are_finite = cache.are_finite(blocks) if blocks else None
        masks = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)  # as large as those of grammars
        logits.zero_()
        for top_k in TOP_KS:
            params = _params(top_k)
            sampled = [Sequence(_request(seq.request_id, [0], params)) for seq in seqs]
            self.sampler.choose(logits, sampled)
        del are_finite, masks

    def _sequence(self, request_id: str, length: int, first: int, *, is_scored: bool) -> Sequence:
        """A text of some length, scored from the token behind its first computed position if it is."""
        prompt_logprobs = NUM_LOGPROBS if is_scored and self.scorer.is_exact else None
        params = _params(0, prompt_logprobs=prompt_logprobs, prompt_logprobs_start=first + 1)
        return Sequence(_request(request_id, [0] * length, params))


def _params(top_k: int, *, prompt_logprobs: int | None = None, prompt_logprobs_start: int = 0) -> SamplingParams:
    return SamplingParams(
        max_tokens=1,
        top_k=top_k,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={0: 1.0},
        logprobs=NUM_LOGPROBS,
        prompt_logprobs=prompt_logprobs,
        prompt_logprobs_start=prompt_logprobs_start,
        seed=0,
    )


def _request(request_id: str, token_ids: list[int], params: SamplingParams) -> GenerateRequest:
    return GenerateRequest(request_id=request_id, prompt_token_ids=token_ids, params=params)


def widest_adapter(backend: AdapterBackend, dtype: torch.dtype, rank: int) -> AdapterWeights:
    """An adapter that takes as much memory in a pass as any: of a rank, on the product of the most modules."""
    product = max(backend.products, key=lambda one: (len(one.parts), one.in_features, one.index))
    a = torch.zeros(rank, product.in_features, dtype=dtype)
    changes = [
        PartChange(part.start, part.size, a, torch.zeros(part.size, rank, dtype=dtype)) for part in product.parts
    ]
    return backend.place(backend.pack({product.index: changes}))


def measure(
    memory: DeviceMemory, without_graphs: MemoryReading, step: LargestStep, adapter_bytes: int = 0
) -> MemoryProfile:
    """Run the largest step, and divide the memory in use.

    Args:
        memory: Reads the memory.
        without_graphs: The memory with the model and a cache, before graphs were recorded.
        step: The largest step, over the same cache.
        adapter_bytes: What is kept for adapters.

    Raises:
        EngineStartError: If the step needs more than there is.
    """
    before = memory.settle()
    try:
        step.run()
    except torch.OutOfMemoryError as error:
        raise EngineStartError(
            f"the largest step does not fit into the {before.free / GIB:.2f} GiB that are free of "
            f"{before.total / GIB:.2f} GiB, with the model loaded ({error}); lower --max-num-batched-tokens, "
            "--max-num-seqs or --max-model-len"
        ) from error
    peak = memory.read().peak
    after = memory.settle()
    cache_bytes = step.paged_model.backend.cache.tensor.nbytes
    weights = without_graphs.reserved - cache_bytes
    graphs = max(0, without_graphs.free - before.free)  # other processes may release memory meanwhile
    return MemoryProfile(
        total=after.total,
        outside=after.total - after.free - cache_bytes - weights - graphs,
        weights=weights,
        step=peak - after.allocated,
        graphs=graphs,
        adapters=adapter_bytes,
    )


def resize_to_fit(
    cache: KVCache, memory: DeviceMemory, profile: MemoryProfile, settings: EngineSettings, max_model_len: int
) -> None:
    """Give a cache what the profile leaves; no graph may use it.

    Raises:
        EngineStartError: If that is too little, or cannot be allocated.
    """
    try:
        num_blocks = profile.num_blocks(
            cache.spec,
            utilization=settings.gpu_memory_utilization,
            max_model_len=max_model_len,
            max_num_seqs=settings.max_num_seqs,
        )
    except ValueError as error:
        raise EngineStartError(str(error)) from error
    memory.settle()  # so that the memory of released graphs is free
    try:
        cache.resize(num_blocks)
    except torch.OutOfMemoryError as error:
        raise EngineStartError(
            f"{num_blocks * cache.spec.block_bytes / GIB:.2f} GiB of keys and values cannot be allocated ({error}); "
            "lower --gpu-memory-utilization"
        ) from error


def report(memory: DeviceMemory, profile: MemoryProfile, cache: KVCache, settings: EngineSettings) -> None:
    """Log how the memory is divided, and a warning if the largest step does not fit into what is left of it."""
    logger.info("%s", profile.summary(cache.spec, cache.num_blocks))
    left = memory.settle().free
    if left < profile.step + profile.adapters:
        logger.warning(
            "the largest step and adapters need %.2f GiB, and %.2f GiB are free: it may fail; lower %s",
            (profile.step + profile.adapters) / GIB,
            left / GIB,
            "--gpu-memory-utilization" if settings.kv_cache_memory is None else "--kv-cache-memory",
        )
