"""The frozen model with its cache: starts it, checks that it is served exactly, and runs steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from server.config import EngineSettings
from server.engine.adapters.base_digests import base_digests
from server.engine.adapters.classification_head import ClassificationHead
from server.engine.adapters.loader import AdapterLoader, held_adapter_bytes
from server.engine.adapters.reading import AdapterReader
from server.engine.adapters.replays import DecodeReplays
from server.engine.adapters.weights import AdapterWeights
from server.engine.attention.backend import ATTENTION
from server.engine.attention.decode_batch import MAX_ROWS, DecodeBuffers
from server.engine.attention.kv_cache import KVCache, KVCacheSpec, num_blocks_for
from server.engine.attention.transfers import queue_copy, queue_to_host, to_device
from server.engine.messages import OnStage, Stage, skip
from server.engine.model.adapter_check import AdapterCheck
from server.engine.model.classification_head import head_logits
from server.engine.model.exactness import PROBE_TOLERANCE, ExactnessCheck, probe_blocks
from server.engine.model.generation_config import read_generation_config
from server.engine.model.largest_step import LargestStep, measure, report, resize_to_fit, widest_adapter
from server.engine.model.loading import check_utilization, eos_token_ids_of, load_model, max_model_len_of
from server.engine.model.model_shape import config_value
from server.engine.model.paged_model import Adapters, PagedModel
from server.engine.model.platform import MakeBackend, Platform, choose_platform
from server.engine.model.prompt_scoring import PromptScorer
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.sampling.ensembles import merge_ensembles
from server.engine.sampling.sampler import NO_TOKEN, Choice, Sampler
from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.types import ALL_CAPABILITIES, Capability, GenerateRequest, Logprobs, ModelInfo, StepOutput
from server.errors import EngineStartError

logger = logging.getLogger(__name__)

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names of the number of experts in configurations of mixtures."""


class ModelRunner:
    """One model with its key/value cache.

    Args:
        settings: The model and the memory to use.
        platform: The device; None for the one in the settings.
        on_stage: Called at the beginning of each stage of the start.

    Attributes:
        info: Facts about the loaded model.
        cache_spec: The shape of its keys and values.
        embed_tokens: The input embeddings: token ids [...] to [..., embedding width], with the model's scale.
        adapter_reader: Reads adapters for this model; None if none are served.
        held_adapter_bytes: Memory for the adapters of running sequences; 0 if none are served.
        adapters: Has the weights of the adapters in a plan. Set by the engine.

    Raises:
        EngineStartError: If the model cannot be loaded or served exactly, or memory is short.
    """

    adapters: AdapterLoader | None = None

    def __init__(self, settings: EngineSettings, platform: Platform | None = None, on_stage: OnStage = skip) -> None:
        self._on_stage = on_stage
        on_stage(Stage.LOADING)
        self.platform = platform or choose_platform(settings.device)
        self.device = self.platform.device
        self.platform.set_num_threads(settings.num_threads)
        memory = self.platform.device_memory()
        check_utilization(settings.gpu_memory_utilization, is_measured=memory is not None)
        self.model, config = load_model(settings, self.platform)
        self.dtype: torch.dtype = self.model.dtype
        max_model_len = max_model_len_of(settings.max_model_len, config)
        has_experts = any(config_value(config, name) for name in EXPERT_COUNTS)
        # The check computes its references with the model's own attention and modules, so it comes first.
        check = ExactnessCheck(self.model, config, max_model_len, has_experts=has_experts)
        shape = check.shape
        adapter_check = AdapterCheck(
            self.model, max_model_len=max_model_len, vocab_size=check.vocab_size, has_experts=has_experts
        )
        self.model.set_attn_implementation(ATTENTION)
        digests = base_digests(self.model)  # before the weights are packed
        on_stage(Stage.COMPILING)
        unfuse = self.platform.prepare(self.model)
        self.cache_spec = KVCacheSpec(
            shape.num_layers, shape.num_kv_heads, shape.head_dim, settings.block_size, self.dtype
        )
        self.cache = self._make_cache(settings, max_model_len, is_measured=memory is not None)
        self._buffers = DecodeBuffers(settings.max_num_seqs, -(-max_model_len // settings.block_size), self.cache)
        num_heads = config_value(config, "num_attention_heads") or shape.num_kv_heads
        self.paged_model = self._connect(check, num_heads, unfuse)
        self.backend = self.paged_model.backend
        without_graphs = None if memory is None else memory.settle()
        self._graphs = None if settings.enforce_eager else self._record_decodes(check)
        # After the graphs, whose check reads the keys that the check of the backend has written.
        adapter_check.connect(self.model, self.paged_model, self.platform.adapter_backend)
        self._record_adapted(adapter_check)
        eos_token_ids = eos_token_ids_of(config, self.model.generation_config)
        generation = read_generation_config(
            self.model.generation_config if settings.generation_config == "auto" else None,
            vocab_size=check.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
        )
        generation.log()
        self.sampler = Sampler(eos_token_ids, generation.rules, self.platform.largest)
        self.embed_tokens: nn.Module = self.model.get_input_embeddings()
        self._scorer = PromptScorer(self.model, self.paged_model.adapting_head)
        with torch.inference_mode():
            ids = torch.arange(min(4, settings.block_size), device=self.device)
            spans, inputs = [([0], 0, len(ids))], {"input_ids": ids[None]}
            self._scorer.check(
                lambda: self.paged_model.forward(spans, inputs, range(len(ids))),
                lambda: self.paged_model.forward_base(spans, inputs),
                PROBE_TOLERANCE[self.dtype],
            )
        adapter_backend = self.paged_model.adapter_backend
        self.held_adapter_bytes = 0
        if adapter_backend is not None:
            self.held_adapter_bytes = held_adapter_bytes(settings, has_own_memory=self.platform.has_own_memory)
        if memory is not None and without_graphs is not None:
            step = LargestStep(
                paged_model=self.paged_model,
                sampler=self.sampler,
                scorer=self._scorer,
                embed=self.embed_tokens,
                max_model_len=max_model_len,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                make_adapter=None
                if adapter_backend is None
                else partial(widest_adapter, adapter_backend, self.dtype, settings.max_adapter_rank),
            )
            adapter_bytes = 0 if adapter_backend is None else settings.adapter_device_bytes
            profile = measure(memory, without_graphs, step, adapter_bytes)
            if settings.kv_cache_memory is None:
                has_graphs = self._graphs is not None
                self._graphs = None  # they use the address of the small cache
                resize_to_fit(self.cache, memory, profile, settings, max_model_len)
                self._check_served(check, self.paged_model, num_heads)
                self._graphs = self._record_decodes(check) if has_graphs else None
                self._record_adapted(adapter_check)
            report(memory, profile, self.cache, settings)
        adapter_check.release()
        if self._graphs is not None:
            logger.info("decode steps of up to %d sequences use CUDA graphs", self._graphs.sizes[-1])
        embedding_width = int(self.embed_tokens(torch.zeros(1, dtype=torch.long, device=self.device)).shape[-1])
        hidden_size = config_value(config, "hidden_size")
        self.adapter_reader: AdapterReader | None = None
        if adapter_backend is not None:
            self.adapter_reader = AdapterReader(
                adapter_backend, self.dtype, head_width=hidden_size or embedding_width
            )
        self.info = ModelInfo(
            architecture=type(self.model).__name__,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.platform.name,
            embedding_width=embedding_width,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=check.vocab_size,
            max_model_len=max_model_len,
            block_size=settings.block_size,
            num_blocks=self.cache.num_blocks,
            block_bytes=self.cache.spec.block_bytes,
            eos_token_ids=eos_token_ids,
            hidden_size=hidden_size,
            generation_defaults=generation.defaults,
            capabilities=ALL_CAPABILITIES if adapter_backend is None else (*ALL_CAPABILITIES, Capability.ADAPTERS),
            modules={} if adapter_check.off is not None else adapter_check.modules,
            adapters_off=adapter_check.off,
            max_adapter_parameters=self.held_adapter_bytes // self.dtype.itemsize,
            base_digests=digests,
            num_threads=self.platform.num_threads,
        )

    @property
    def scores_prompts(self) -> bool:
        """Whether the logits at all positions of a text can be computed."""
        return self._scorer.is_exact

    @property
    def records_adapters(self) -> bool:
        """Whether decode steps with adapters are CUDA graphs."""
        return self._graphs is not None and self._graphs.has_adapted

    def replays(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step is one CUDA graph, so that it is queued in a fraction of the time of its launches."""
        graphs = self._graphs
        return (
            graphs is not None
            and all(one.num_tokens == 1 for one in chunks)
            and graphs.takes(len(chunks), self._adapters_of(chunks))
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan, soft_prompts: SoftPromptLoader) -> Callable[[], StepOutput]:
        """Queue one step on the device. Does not wait for it.

        Args:
            plan: The fills, copies and chunks.
            soft_prompts: Has the rows of the soft prompts to fill.

        Returns:
            A function, to be called before the next launch, that waits for the step and returns a new token (or
            NOT_FINITE, or NO_TOKEN if none is wanted) for each chunk that samples, one per ensemble; the requested
            logprobs; and the chunks whose shared blocks contain a value that is not finite.
        """
        for run in plan.key_value_fills:
            self.cache.fill(run.blocks, soft_prompts.rows(run.source))
        self.cache.copy_blocks(plan.block_copies)
        chunks = plan.chunks
        if not chunks:
            return lambda: StepOutput([])
        kept: list[ModelOutput] = []
        if self._are_decodes(chunks):
            logits = self._compute_decodes(chunks)
        else:
            with self._scorer.watching(chunks) as kept:
                logits = self._launch(chunks, soft_prompts)
        are_finite = self._check_shared(chunks)
        choice = self._choose(logits, chunks)
        return partial(self._output, chunks, choice, are_finite, kept, soft_prompts)

    @torch.inference_mode()
    def _output(
        self,
        chunks: Sequence[Chunk],
        choice: Callable[[], Choice],
        are_finite: Callable[[], torch.Tensor] | None,
        kept: Sequence[ModelOutput],
        soft_prompts: SoftPromptLoader,
    ) -> StepOutput:
        """Wait for a step that was launched. What the host computes from hidden states comes here: it waits, too."""
        scores: dict[str, list[Logprobs | None]] = {}
        class_logits: dict[str, list[float]] = {}
        if kept:
            class_logits = head_logits(chunks, kept[0][0], partial(self._head, soft_prompts))
            scores = self._scorer.score(
                chunks,
                kept[0],
                lambda chunk: self._boundary_logits(chunk, soft_prompts),
                self._adapters_of(chunks),
            )
        tokens, logprobs = choice()
        spoiled = {} if are_finite is None else self._spoiled(chunks, are_finite().tolist())
        return StepOutput(tokens, logprobs, scores, class_logits, spoiled)

    def close(self) -> None:
        """Release the CUDA graphs and their memory."""
        self._graphs = None

    def _make_cache(self, settings: EngineSettings, max_model_len: int, *, is_measured: bool) -> KVCache:
        """The cache; a small one if its size follows from what the model needs, which is measured later."""
        if is_measured and settings.kv_cache_memory is None:
            return KVCache(self.cache_spec, probe_blocks(settings.block_size), self.device)
        try:
            num_blocks = num_blocks_for(
                self.cache_spec,
                memory=settings.kv_cache_memory,
                free_memory=self.platform.free_memory,
                max_model_len=max_model_len,
                max_num_seqs=settings.max_num_seqs,
            )
        except ValueError as error:
            raise EngineStartError(str(error)) from error
        return KVCache(self.cache_spec, num_blocks, self.device)

    def _connect(self, check: ExactnessCheck, num_heads: int, unfuse: Callable[[], None] | None) -> PagedModel:
        """Find the first backend that serves the model exactly; unfuse the layers if they are not exact."""
        if unfuse is not None:
            try:
                return self._attach(self.platform.backends[0], check, num_heads)
            except EngineStartError as error:
                logger.warning("layers are not fused: %s", error)
                unfuse()
        *others, last = self.platform.backends
        for make in others:
            try:
                return self._attach(make, check, num_heads)
            except EngineStartError as error:
                logger.warning("using torch's attention for this model, which is slower: %s", error)
        return self._attach(last, check, num_heads)

    def _attach(self, make: MakeBackend, check: ExactnessCheck, num_heads: int) -> PagedModel:
        """Check the model with a backend."""
        try:
            backend = make(self.cache)
        except ImportError as error:
            raise EngineStartError(f"the attention kernels cannot be imported: {error}") from error
        paged = PagedModel(self.model, backend, self._buffers)
        self.platform.bind(self.model, backend)
        self._on_stage(Stage.CHECKING)
        self._check_served(check, paged, num_heads)
        return paged

    @torch.inference_mode()
    def _check_served(self, check: ExactnessCheck, paged: PagedModel, num_heads: int) -> None:
        """Check a model with its backend and the cache as it is now."""
        backend, block_size, num_blocks = paged.backend, self.cache_spec.block_size, self.cache.num_blocks
        check.run(paged.forward, num_blocks=num_blocks, block_size=block_size, layers=backend.layers)
        check.run_soft_prompts(paged.forward, self.cache)
        check.run_decodes(paged.launch_decodes, [min(2, self._buffers.max_rows)])
        self.platform.check_kernels(backend, num_heads)

    def _record_decodes(self, check: ExactnessCheck) -> DecodeReplays | None:
        """Record decode steps; None if the device, the backend or the model does not allow it.

        Args:
            check: The check that ``_check_served`` ran last; its keys are still in the cache.

        Raises:
            EngineStartError: If the device cannot be used after a failed attempt.
        """
        record = self.platform.recorder()
        if record is None or not self.backend.is_capturable:
            return None
        max_rows = min(self._buffers.max_rows, MAX_ROWS)
        try:
            with torch.inference_mode():
                graphs = DecodeReplays(self.paged_model.forward_decodes, self._buffers, max_rows, record)
                check.run_decodes(graphs.run, graphs.sizes)
        except Exception as error:  # a model that cannot be recorded runs without graphs
            self._end_recording("decode steps", error)
            return None
        return graphs

    def _record_adapted(self, check: AdapterCheck) -> None:
        """Record decode steps with adapters, if others are recorded and the model can have adapters.

        Raises:
            EngineStartError: As ``_record_decodes``.
        """
        graphs, backend = self._graphs, self.paged_model.adapter_backend
        if graphs is None or backend is None:
            return
        try:
            with torch.inference_mode():
                if graphs.record_adapted(backend):
                    check.check_replays(self.paged_model, graphs)
        except Exception as error:
            graphs.drop_adapted()
            self._end_recording("decode steps with adapters", error)

    def _end_recording(self, what: str, error: Exception) -> None:
        """Go on after a recording that failed.

        Raises:
            EngineStartError: If the device cannot be used any more.
        """
        reason = f"{type(error).__name__}: {error}"
        try:
            self.platform.check_device()
        except Exception as fault:
            raise EngineStartError(
                f"{what} cannot be recorded in CUDA graphs ({reason}), and the device cannot be used after "
                f"the attempt ({type(fault).__name__}: {fault}); start the server with --enforce-eager"
            ) from error
        logger.warning("%s do not use CUDA graphs, which is slower: %s", what, reason)

    def _check_shared(self, chunks: Sequence[Chunk]) -> Callable[[], torch.Tensor] | None:
        """``KVCache.are_finite`` of all blocks that the chunks share with later sequences; None if there are none."""
        blocks = [chunk.block_table[index] for chunk in chunks for index in chunk.shared]
        return queue_to_host(self.cache.are_finite(blocks)) if blocks else None

    def _spoiled(self, chunks: Sequence[Chunk], are_finite: list[list[bool]]) -> dict[int, int]:
        """``StepOutput.spoiled``, from the result of ``_check_shared``."""
        spoiled: dict[int, int] = {}
        rows, block_size = iter(are_finite), self.cache_spec.block_size
        for number, chunk in enumerate(chunks):
            for index in chunk.shared:
                # Positions behind a soft prompt in its last block are arbitrary.
                if not all(next(rows)[: chunk.stop - index * block_size]):
                    spoiled.setdefault(number, index)
        return spoiled

    def _are_decodes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step consists of decodes only, and needs nothing but logits."""
        return (
            len(chunks) <= self._buffers.max_rows
            and all(chunk.num_tokens == 1 and chunk.needs_logits for chunk in chunks)
            and not self._scorer.wants(chunks)
        )

    def _compute_decodes(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits [chunks, vocabulary] of a step of decodes, by a graph if there is one."""
        seqs = [chunk.seq for chunk in chunks if chunk.seq is not None]
        token_ids = [seq.token_ids[-1] for seq in seqs]
        positions, tables = [chunk.start for chunk in chunks], [chunk.block_table for chunk in chunks]
        adapters = self._adapters_of(chunks)
        if self._graphs is not None and self._graphs.takes(len(chunks), adapters):
            return self._graphs.run(token_ids, positions, tables, adapters=adapters)
        return self.paged_model.launch_decodes(token_ids, positions, tables, len(chunks), adapters)

    def _adapters_of(self, chunks: Sequence[Chunk]) -> list[AdapterWeights | None] | None:
        """The adapter of each chunk; None if none has one."""
        adapters = self.adapters
        if adapters is None or not adapters.memory.is_used or all(chunk.adapter is None for chunk in chunks):
            return None
        return [None if (source := chunk.adapter) is None else adapters.weights(source) for chunk in chunks]

    def _head(self, soft_prompts: SoftPromptLoader, request: GenerateRequest) -> ClassificationHead:
        """The classification head of a request's soft prompt, or else of its adapter."""
        soft_prompt, adapter = request.soft_prompt, request.adapter
        if soft_prompt is not None and soft_prompt.num_labels is not None:
            return soft_prompts.head(soft_prompt)
        head = None if adapter is None or self.adapters is None else self.adapters.weights(adapter).head
        if head is None:
            raise AssertionError(f"{request.request_id} has no classification head")
        return head

    def _launch(self, chunks: Sequence[Chunk], soft_prompts: SoftPromptLoader) -> torch.Tensor:
        """Logits [chunks that need them, vocabulary] of any step; [0] or arbitrary if no chunk does."""
        last_rows: list[int] = []
        row = 0
        for chunk in chunks:
            row += chunk.num_tokens
            if chunk.needs_logits:
                last_rows.append(row - 1)
        spans = [(chunk.block_table, chunk.start, chunk.num_tokens) for chunk in chunks]
        adapters = self._adapters_of(chunks)
        inputs = self._inputs(chunks, soft_prompts, adapters)
        if not last_rows and self._scorer.base_suffices:
            self.paged_model.forward_base(spans, inputs, adapters)
            return torch.empty(0, device=self.device)
        return self.paged_model.forward(spans, inputs, last_rows or [row - 1], adapters)

    def _choose(self, logits: torch.Tensor, chunks: Sequence[Chunk]) -> Callable[[], Choice]:
        """Queue the choice of tokens and logprobs as in ``StepOutput``, from the logits of the chunks that need them.

        Returns:
            A function that waits for the result.
        """
        seqs = [chunk.seq for chunk in chunks if chunk.seq is not None and chunk.needs_logits]
        sampled = [chunk for chunk in chunks if chunk.samples and chunk.seq is not None and not chunk.seq.is_follower]
        without = [index for index, chunk in enumerate(sampled) if not chunk.needs_logits]
        chosen = self.sampler.launch(*merge_ensembles(logits, seqs)) if seqs else None

        def choice() -> Choice:
            tokens, logprobs = chosen() if chosen is not None else ([], [])
            for index in without:
                tokens.insert(index, NO_TOKEN)
                if logprobs:
                    logprobs.insert(index, None)
            return tokens, logprobs

        return choice

    def _inputs(
        self, chunks: Sequence[Chunk], soft_prompts: SoftPromptLoader, adapters: Adapters | None
    ) -> dict[str, torch.Tensor]:
        """Token ids [1, rows], or embeddings [1, rows, width] if the step computes virtual tokens."""
        token_ids: list[int] = []
        splices: list[tuple[int, torch.Tensor]] = []
        for chunk in chunks:
            source, num_virtual = chunk.soft_prompt, chunk.num_virtual_tokens
            if source is not None and num_virtual:
                rows = soft_prompts.rows(source)[chunk.start : chunk.start + num_virtual]
                splices.append((len(token_ids), queue_copy(rows, self.device)))
                token_ids += [0] * num_virtual
            if chunk.seq is not None:
                first = chunk.start + num_virtual - chunk.seq.num_virtual_tokens
                token_ids += chunk.seq.token_ids[first : first + chunk.num_tokens - num_virtual]
        ids = to_device([token_ids], self.device)
        if not splices:
            return {"input_ids": ids}
        embeds = self.paged_model.embed(ids, [chunk.num_tokens for chunk in chunks], adapters)
        for first, rows in splices:
            embeds[0, first : first + len(rows)] = rows.to(embeds)
        return {"inputs_embeds": embeds}

    def _boundary_logits(self, chunk: Chunk, soft_prompts: SoftPromptLoader) -> torch.Tensor:
        """Logits [1, vocabulary] at the last virtual token of a chunk's sequence, whose soft prompt is filled."""
        if chunk.seq is None or chunk.seq.request.soft_prompt is None:
            raise ValueError("only a sequence with a soft prompt has a last virtual token")
        position = chunk.seq.num_virtual_tokens - 1
        block = chunk.block_table[position // self.cache_spec.block_size]
        # The pass writes that position again. Other sequences share the block, and rounding may depend on the batch,
        # so the block's content is restored.
        kept = self.cache.tensor[:, :, block].clone()
        rows = soft_prompts.rows(chunk.seq.request.soft_prompt)[position:].to(self.device, self.dtype)
        try:
            # A copy, because some models scale their inputs in place.
            inputs = {"inputs_embeds": rows[None].clone()}
            return self.paged_model.forward(
                [(chunk.block_table, position, 1)], inputs, [0], self._adapters_of([chunk])
            )
        finally:
            self.cache.tensor[:, :, block] = kept
