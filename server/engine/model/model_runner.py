"""The frozen model: loading it, checking that paged attention serves it exactly, and running one step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from server.config import EngineSettings
from server.engine.attention.backend import AttentionBackend, AttentionMetadata, SDPABackend, make_metadata
from server.engine.attention.decode_batch import MAX_ROWS, DecodeBatch, DecodeBuffers, DecodeGraphs, make_recorder
from server.engine.attention.kv_cache import KVCache, KVCacheSpec, num_blocks_for
from server.engine.attention.transfers import queue_copy, to_device
from server.engine.cpu.compiled import set_num_threads
from server.engine.cpu.cpu_attention import make_backend
from server.engine.cpu.fused_layers import bind, fuse_layers
from server.engine.cpu.packed_linear import can_pack, has_fast_bfloat16, pack_linears
from server.engine.cuda.triton_attention import TritonBackend
from server.engine.model.classification_head import head_logits
from server.engine.model.exactness import PROBE_TOLERANCE, ExactnessCheck, check_kernels
from server.engine.model.generation_config import read_generation_config
from server.engine.model.model_shape import config_value
from server.engine.model.prompt_scoring import PromptScorer
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.sampling.ensembles import merge_ensembles
from server.engine.sampling.sampler import Sampler
from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.types import Logprobs, ModelInfo, StepOutput
from server.errors import EngineStartError

logger = logging.getLogger(__name__)

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names that configurations of mixtures have for the number of experts."""


class ModelRunner:
    """One model with its key/value cache.

    Args:
        settings: What to load, and how much memory it may take.

    Attributes:
        info: What was loaded.
        cache_spec: The shape of its keys and values.
        embed_tokens: The input embeddings: token ids [...] to [..., embedding width], scaled where the model scales.

    Raises:
        EngineStartError: If the model cannot be loaded or served exactly, or memory is short.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.device = _device(settings.device)
        self._graphs: DecodeGraphs | None = None
        if self.device.type == "cpu":
            set_num_threads(settings.num_threads or torch.get_num_threads())
        elif settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        try:
            config = self._start(settings, fuses=True)
        except _FusedModelError as error:
            logger.warning("layers are not fused: %s", error)
            config = self._start(settings, fuses=False)
        eos_token_ids = _eos_token_ids(config, self.model.generation_config)
        max_model_len = _max_model_len(settings.max_model_len, config)
        generation = read_generation_config(
            self.model.generation_config if settings.generation_config == "auto" else None,
            vocab_size=self._vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
        )
        generation.log()
        self.sampler = Sampler(eos_token_ids, generation.rules)
        self._scorer = PromptScorer(self.model)
        self.embed_tokens: nn.Module = self.model.get_input_embeddings()
        with torch.inference_mode():
            ids = torch.arange(min(4, settings.block_size), device=self.device)
            self._scorer.check(
                lambda: self._forward([([0], 0, len(ids))], {"input_ids": ids[None]}, range(len(ids))),
                PROBE_TOLERANCE[self.dtype],
            )
        self.info = ModelInfo(
            architecture=type(self.model).__name__,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
            embedding_width=int(self.embed_tokens(torch.zeros(1, dtype=torch.long, device=self.device)).shape[-1]),
            num_layers=self.cache_spec.num_layers,
            num_kv_heads=self.cache_spec.num_kv_heads,
            head_dim=self.cache_spec.head_dim,
            vocab_size=self._vocab_size,
            max_model_len=max_model_len,
            block_size=settings.block_size,
            num_blocks=self.cache.num_blocks,
            eos_token_ids=eos_token_ids,
            hidden_size=config_value(config, "hidden_size"),
            generation_defaults=generation.defaults,
        )

    @property
    def scores_prompts(self) -> bool:
        """Whether this model's logits can be had for all positions of a text."""
        return self._scorer.is_exact

    @torch.inference_mode()
    def run(self, plan: StepPlan, soft_prompts: SoftPromptLoader) -> StepOutput:
        """Do one step.

        Args:
            plan: What to fill, to copy and to compute.
            soft_prompts: Where the rows of the soft prompts being filled are.

        Returns:
            A new token (or NOT_FINITE) for each chunk that samples, one for all members of an ensemble, the
            logprobs that were asked for, and which chunks left something that is not finite for others.
        """
        for run in plan.key_value_fills:
            self.cache.fill(run.blocks, soft_prompts.rows(run.source))
        self.cache.copy_blocks(plan.block_copies)
        if not plan.chunks:
            return StepOutput([])
        scores: dict[str, list[Logprobs | None]] = {}
        class_logits: dict[str, list[float]] = {}
        if self._are_decodes(plan.chunks):
            logits = self._compute_decodes(plan.chunks)
        else:
            with self._scorer.watching(plan.chunks) as kept:
                logits = self._launch(plan.chunks, soft_prompts)
            if kept:
                class_logits = head_logits(plan.chunks, kept[0][0], soft_prompts.head)
                scores = self._scorer.score(
                    plan.chunks, kept[0], lambda chunk: self._boundary_logits(chunk, soft_prompts)
                )
        are_finite = self._check_shared(plan.chunks)
        seqs = [chunk.seq for chunk in plan.chunks if chunk.seq is not None and chunk.samples]
        logits, leaders = merge_ensembles(logits, seqs)
        tokens, logprobs = self.sampler.choose(logits, leaders) if leaders else ([], [])
        # The tokens have been waited for, so this is not.
        spoiled = {} if are_finite is None else self._spoiled(plan.chunks, are_finite.tolist())
        return StepOutput(tokens, logprobs, scores, class_logits, spoiled)

    def close(self) -> None:
        """Take the backend out of transformers' tables, and let go of recorded steps and their memory."""
        self._graphs = None
        self.backend.close()

    def _start(self, settings: EngineSettings, *, fuses: bool) -> PreTrainedConfig:
        """Load the model, make its cache, and check that they give what the model gives by itself."""
        self.model, config = _load(settings, self.device)
        self.dtype: torch.dtype = self.model.dtype
        max_model_len = _max_model_len(settings.max_model_len, config)
        has_experts = any(config_value(config, name) for name in EXPERT_COUNTS)
        check = ExactnessCheck(self.model, config, max_model_len, has_experts=has_experts)
        self._vocab_size = check.vocab_size
        num_fused = 0
        if can_pack(self.device, self.dtype):
            num_fused = fuse_layers(self.model) if fuses else 0
            pack_linears(self.model)
        self.cache_spec = KVCacheSpec(
            num_layers=check.shape.num_layers,
            num_kv_heads=check.shape.num_kv_heads,
            head_dim=check.shape.head_dim,
            block_size=settings.block_size,
            dtype=self.dtype,
        )
        try:
            num_blocks = num_blocks_for(
                self.cache_spec,
                self.device,
                memory=settings.kv_cache_memory,
                max_model_len=max_model_len,
                max_num_seqs=settings.max_num_seqs,
            )
        except ValueError as error:
            raise EngineStartError(str(error)) from error
        self.cache = KVCache(self.cache_spec, num_blocks, self.device)
        num_table_blocks = -(-max_model_len // settings.block_size)
        self._buffers = DecodeBuffers(settings.max_num_seqs, num_table_blocks, self.cache)
        num_heads = config_value(config, "num_attention_heads") or check.shape.num_kv_heads
        makers = backend_makers(self.device)
        for make in makers:
            try:
                self._attach(make, check, num_heads)
                break
            except EngineStartError as error:
                if num_fused:
                    raise _FusedModelError(str(error)) from error
                if make is makers[-1]:
                    raise
                logger.warning("using torch's attention for this model, which is slower: %s", error)
        self._graphs = None if settings.enforce_eager else self._record_decodes(check)
        return config

    def _attach(self, make: Callable[[KVCache], AttentionBackend], check: ExactnessCheck, num_heads: int) -> None:
        """Switch the model to a backend, and check what they give together."""
        try:
            self.backend = make(self.cache)
        except ImportError as error:
            raise EngineStartError(f"{make.__name__} cannot be imported: {error}") from error
        self.model.set_attn_implementation(self.backend.name)
        try:
            bind(self.model, self.backend)
            with torch.inference_mode():
                block_size, num_blocks = self.cache_spec.block_size, self.cache.num_blocks
                check.run(self._forward, num_blocks=num_blocks, block_size=block_size, layers=self.backend.layers)
                check.run_soft_prompts(self._forward, self.cache)
                check.run_decodes(self._launch_decodes, [min(2, self._buffers.max_rows)])
                if isinstance(self.backend, TritonBackend):
                    check_kernels(self.backend, num_heads)
        except EngineStartError:
            self.backend.close()
            raise

    def _record_decodes(self, check: ExactnessCheck) -> DecodeGraphs | None:
        """Record decode steps where the device and the backend can; None where they cannot, or the model cannot."""
        record = make_recorder(self.device)
        if record is None or not self.backend.is_capturable:
            return None
        max_rows = min(self._buffers.max_rows, MAX_ROWS)
        try:
            with torch.inference_mode():
                graphs = DecodeGraphs(self._decode, self._buffers, max_rows, record)
                check.run_decodes(graphs.run, graphs.sizes)
        except Exception as error:  # whatever in the model cannot be recorded, each step can be launched
            reason = f"{type(error).__name__}: {error}"
            logger.warning("decode steps do not use CUDA graphs, which is slower: %s", reason)
            return None
        logger.info("decode steps of up to %d sequences use CUDA graphs", max_rows)
        return graphs

    def _check_shared(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        """``KVCache.are_finite`` of all blocks that the chunks leave to others; None where they leave none."""
        blocks = [chunk.block_table[index] for chunk in chunks for index in chunk.shared]
        return self.cache.are_finite(blocks) if blocks else None

    def _spoiled(self, chunks: Sequence[Chunk], are_finite: list[list[bool]]) -> dict[int, int]:
        """``StepOutput.spoiled``, from what ``_check_shared`` gave."""
        spoiled: dict[int, int] = {}
        rows, block_size = iter(are_finite), self.cache_spec.block_size
        for number, chunk in enumerate(chunks):
            for index in chunk.shared:
                # What is behind a soft prompt in its last block may be anybody's.
                if not all(next(rows)[: chunk.stop - index * block_size]):
                    spoiled.setdefault(number, index)
        return spoiled

    def _are_decodes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step is nothing but decodes, and logits are all that is asked of it."""
        return (
            len(chunks) <= self._buffers.max_rows
            and all(chunk.num_tokens == 1 and chunk.samples for chunk in chunks)
            and not self._scorer.wants(chunks)
        )

    def _compute_decodes(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits [chunks, vocabulary] of a step of decodes, replayed where they can be."""
        seqs = [chunk.seq for chunk in chunks if chunk.seq is not None]
        token_ids = [seq.token_ids[-1] for seq in seqs]  # their last positions are computed
        positions, tables = [chunk.start for chunk in chunks], [chunk.block_table for chunk in chunks]
        if self._graphs is not None and len(chunks) <= self._graphs.sizes[-1]:
            return self._graphs.run(token_ids, positions, tables)
        return self._launch_decodes(token_ids, positions, tables, len(chunks))

    def _launch_decodes(
        self, token_ids: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]], size: int
    ) -> torch.Tensor:
        width = self._buffers.fill(token_ids, positions, tables, size)
        return self._decode(self._buffers.batch(size, width))[: len(token_ids)]

    def _launch(self, chunks: Sequence[Chunk], soft_prompts: SoftPromptLoader) -> torch.Tensor:
        """Logits [chunks that sample, vocabulary] of any step; of its last row if none does."""
        last_rows: list[int] = []
        row = 0
        for chunk in chunks:
            row += chunk.num_tokens
            if chunk.samples:
                last_rows.append(row - 1)
        spans = [(chunk.block_table, chunk.start, chunk.num_tokens) for chunk in chunks]
        # A step that only prefills still needs the pass, for its keys and values; one row of logits is least.
        return self._forward(spans, self._inputs(chunks, soft_prompts), last_rows or [row - 1])

    def _inputs(self, chunks: Sequence[Chunk], soft_prompts: SoftPromptLoader) -> dict[str, torch.Tensor]:
        """Token ids [1, rows], or embeddings [1, rows, width] where soft prompts' rows stand among them."""
        token_ids: list[int] = []
        splices: list[tuple[int, torch.Tensor]] = []
        for chunk in chunks:
            if chunk.seq is not None:
                first = chunk.start - chunk.seq.num_virtual_tokens
                token_ids += chunk.seq.token_ids[first : first + chunk.num_tokens]
            elif chunk.run is not None:
                rows = queue_copy(soft_prompts.rows(chunk.run.source)[chunk.start : chunk.stop], self.device)
                splices.append((len(token_ids), rows))
                token_ids += [0] * chunk.num_tokens
        ids = to_device([token_ids], self.device)
        if not splices:
            return {"input_ids": ids}
        embeds: torch.Tensor = self.embed_tokens(ids)
        for first, rows in splices:
            embeds[0, first : first + len(rows)] = rows.to(embeds)
        return {"inputs_embeds": embeds}

    def _boundary_logits(self, chunk: Chunk, soft_prompts: SoftPromptLoader) -> torch.Tensor:
        """Logits [1, vocabulary] at the last virtual token of a chunk's sequence, whose soft prompt is filled."""
        if chunk.seq is None or chunk.seq.soft_prompt is None:
            raise ValueError("only a sequence with a soft prompt has a last virtual token")
        position = chunk.seq.num_virtual_tokens - 1
        block = chunk.block_table[position // self.cache_spec.block_size]
        # The pass writes that position again. Others share the block, and rounding may differ with the batch, so
        # what stands there is put back.
        kept = self.cache.tensor[:, :, block].clone()
        rows = soft_prompts.rows(chunk.seq.soft_prompt)[position:].to(self.device, self.dtype)
        try:
            # A copy, for some models scale what they are given in place.
            inputs = {"inputs_embeds": rows[None].clone()}
            return self._forward([(chunk.block_table, position, 1)], inputs, [0])
        finally:
            self.cache.tensor[:, :, block] = kept

    def _forward(
        self,
        spans: Sequence[tuple[Sequence[int], int, int]],
        inputs: dict[str, torch.Tensor],
        logit_rows: Sequence[int],
    ) -> torch.Tensor:
        """Logits [len(logit_rows), vocabulary] of one flat batch."""
        metadata = make_metadata(spans, self.cache_spec.block_size, self.device)
        positions = torch.cat([rows.query_positions.flatten() for rows in metadata.groups])
        return self._pass(metadata, positions[None], **inputs, logits_to_keep=to_device(logit_rows, self.device))

    def _decode(self, batch: DecodeBatch) -> torch.Tensor:
        """Logits [rows, vocabulary] of all rows of a batch of decodes."""
        return self._pass(batch.metadata, batch.position_ids, input_ids=batch.input_ids)

    def _pass(self, metadata: AttentionMetadata, position_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        self.backend.begin(metadata)
        try:
            logits: torch.Tensor = self.model(**inputs, position_ids=position_ids, use_cache=False).logits
        finally:
            self.backend.end()
        return logits[0]


class _FusedModelError(Exception):
    """The model with fused layers is not what it was without."""


def backend_makers(device: torch.device) -> list[Callable[[KVCache], AttentionBackend]]:
    """The backends for a device, the fastest first; the others are for models that it cannot serve."""
    return [TritonBackend, SDPABackend] if device.type == "cuda" else [make_backend]


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EngineStartError("--device cuda: torch finds no CUDA device")
    return torch.device(wanted)


def _load(settings: EngineSettings, device: torch.device) -> tuple[PreTrainedModel, PreTrainedConfig]:
    model: PreTrainedModel
    loaded: dict[str, set[str]]
    try:
        config = AutoConfig.from_pretrained(settings.model, revision=settings.revision, trust_remote_code=False)
        _check_is_causal(config)
        dtype: torch.dtype | str = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
        if dtype == "auto" and device.type == "cpu" and not _is_fast(config.dtype):
            dtype = torch.float32
        model, loaded = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            settings.model,
            revision=settings.revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,  # not said, transformers asks on the terminal, and takes a yes
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise EngineStartError(f"cannot load the model {settings.model!r}: {error}") from error
    except SafetensorError as error:
        raise EngineStartError(
            f"cannot load the model {settings.model!r}: a weights file is damaged or truncated ({error})"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers makes up random ones
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise EngineStartError(
            f"cannot load the model {settings.model!r}: its checkpoint has no weights for {missing[0]}{more}, which "
            f"{type(model).__name__} needs"
        )
    if device.type == "cpu" and not _is_fast(model.dtype):
        logger.warning("this CPU is slow at %s; --dtype float32 would be faster", model.dtype)
    module: nn.Module = model
    module.to(device).eval().requires_grad_(False)
    return model, config.get_text_config(decoder=True)


def _check_is_causal(config: PreTrainedConfig) -> None:
    """Refuse what transformers has no decoder for that reads nothing but its own text.

    Raises:
        ValueError: If that is so.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"transformers has no causal language model of the type {config.model_type!r}")
    if config.is_encoder_decoder:
        raise ValueError(f"models of the type {config.model_type!r} have an encoder beside their decoder")


def _is_fast(dtype: torch.dtype | None) -> bool:
    """Whether CPUs have fast products of a checkpoint's dtype: none of float16, and only some of bfloat16."""
    return dtype is not torch.float16 and (dtype is not torch.bfloat16 or has_fast_bfloat16())


def _max_model_len(wanted: int | None, config: PreTrainedConfig) -> int:
    own = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and own is not None:
        # Beyond it transformers rotates the whole batch by other frequencies, other sequences' rows among them.
        own = min(own, int(rope.get("original_max_position_embeddings") or own))
    if wanted is None:
        if own is None:
            raise EngineStartError(
                "the model's configuration does not state its context length: give --max-model-len"
            )
        return int(own)
    if own is not None and wanted > own:
        raise EngineStartError(f"--max-model-len {wanted} is more than the model's limit of {own} positions")
    return wanted


def _eos_token_ids(config: PreTrainedConfig, generation_config: GenerationConfig | None) -> tuple[int, ...]:
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
