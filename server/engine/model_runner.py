"""The frozen model: loading it, checking that paged attention serves it exactly, and running one step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from server.config import EngineSettings
from server.engine.attention import AttentionBackend, make_metadata
from server.engine.cpu_attention import make_backend
from server.engine.exactness import PROBE_TOLERANCE, ExactnessCheck
from server.engine.fused_layers import bind, fuse_layers
from server.engine.heads import head_logits
from server.engine.kv_cache import KVCache, KVCacheSpec, num_blocks_for
from server.engine.packed_linear import can_pack, has_fast_bfloat16, pack_linears
from server.engine.prompt_scoring import PromptScorer
from server.engine.sampler import Sampler
from server.engine.scheduler import Chunk, StepPlan
from server.engine.soft_prompts import SoftPromptLoader
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
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        try:
            config = self._start(settings, fuses=True)
        except _FusedModelError as error:
            logger.warning("layers are not fused, for fused: %s", error)
            config = self._start(settings, fuses=False)
        eos_token_ids = _eos_token_ids(config, self.model.generation_config)
        self.sampler = Sampler(eos_token_ids)
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
            vocab_size=config.vocab_size,
            max_model_len=_max_model_len(settings.max_model_len, config),
            block_size=settings.block_size,
            num_blocks=self.cache.num_blocks,
            eos_token_ids=eos_token_ids,
            hidden_size=config.hidden_size,
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
            A new token (or NOT_FINITE) for each chunk that samples, and the logprobs that were asked for.
        """
        for run in plan.key_value_fills:
            self.cache.fill(run.blocks, soft_prompts.rows(run.source))
        self.cache.copy_blocks(plan.block_copies)
        if not plan.chunks:
            return StepOutput([])
        spans = [(chunk.block_table, chunk.start, chunk.num_tokens) for chunk in plan.chunks]
        last_rows: list[int] = []
        row = 0
        for chunk in plan.chunks:
            row += chunk.num_tokens
            if chunk.samples:
                last_rows.append(row - 1)
        # A step that only prefills still needs the pass, for its keys and values; one row of logits is least.
        with self._scorer.watching(plan.chunks) as kept:
            logits = self._forward(spans, self._inputs(plan.chunks, soft_prompts), last_rows or [row - 1])
        scores: dict[str, list[Logprobs | None]] = {}
        class_logits: dict[str, list[float]] = {}
        if kept:
            class_logits = head_logits(plan.chunks, kept[0][0], soft_prompts.head)
            scores = self._scorer.score(
                plan.chunks, kept[0], lambda chunk: self._boundary_logits(chunk, soft_prompts)
            )
        seqs = [chunk.seq for chunk in plan.chunks if chunk.seq is not None and chunk.samples]
        tokens = self.sampler.sample(logits, seqs) if seqs else []
        return StepOutput(tokens, self.sampler.logprobs(logits, seqs, tokens), scores, class_logits)

    def close(self) -> None:
        """Take the backend out of transformers' tables."""
        self.backend.close()

    def _start(self, settings: EngineSettings, *, fuses: bool) -> PreTrainedConfig:
        """Load the model, make its cache, and check that they give what the model gives by itself."""
        self.model, config = _load(settings, self.device)
        self.dtype: torch.dtype = self.model.dtype
        num_heads = getattr(config, "num_attention_heads", None)
        if num_heads is None:
            raise EngineStartError(f"{type(self.model).__name__} cannot be served: it has no attention heads")
        max_model_len = _max_model_len(settings.max_model_len, config)
        has_experts = any(getattr(config, name, None) for name in EXPERT_COUNTS)
        check = ExactnessCheck(self.model, config.vocab_size, max_model_len, has_experts=has_experts)
        num_fused = 0
        if can_pack(self.device, self.dtype):
            num_fused = fuse_layers(self.model) if fuses else 0
            pack_linears(self.model)
        self.cache_spec = KVCacheSpec(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
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
        self.backend: AttentionBackend = make_backend(self.cache)
        self.model.set_attn_implementation(self.backend.name)
        try:
            bind(self.model, self.backend)
            with torch.inference_mode():
                check.run(
                    lambda spans, ids, rows: self._forward(spans, {"input_ids": ids}, rows),
                    num_blocks=num_blocks,
                    block_size=settings.block_size,
                    num_layers=self.cache_spec.num_layers,
                    layers=self.backend.layers,
                )
        except EngineStartError as error:
            self.backend.close()
            if num_fused:
                raise _FusedModelError(str(error)) from error
            raise
        return config

    def _inputs(self, chunks: Sequence[Chunk], soft_prompts: SoftPromptLoader) -> dict[str, torch.Tensor]:
        """Token ids [1, rows], or embeddings [1, rows, width] where soft prompts' rows stand among them."""
        token_ids: list[int] = []
        splices: list[tuple[int, torch.Tensor]] = []
        for chunk in chunks:
            if chunk.seq is not None:
                first = chunk.start - chunk.seq.num_virtual_tokens
                token_ids += chunk.seq.token_ids[first : first + chunk.num_tokens]
            elif chunk.run is not None:
                rows = soft_prompts.rows(chunk.run.source)[chunk.start : chunk.stop]
                splices.append((len(token_ids), rows))
                token_ids += [0] * chunk.num_tokens
        ids = torch.tensor([token_ids], device=self.device)
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
            return self._forward([(chunk.block_table, position, 1)], {"inputs_embeds": rows[None]}, [0])
        finally:
            self.cache.tensor[:, :, block] = kept

    def _forward(
        self,
        spans: Sequence[tuple[Sequence[int], int, int]],
        inputs: dict[str, torch.Tensor],
        logit_rows: Sequence[int],
    ) -> torch.Tensor:
        """Logits [len(logit_rows), vocabulary] of one flat batch."""
        self.backend.begin(make_metadata(spans, self.cache_spec.block_size, self.device))
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in spans])
        try:
            logits: torch.Tensor = self.model(
                **inputs,
                position_ids=positions[None].to(self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(logit_rows, device=self.device),
            ).logits
        finally:
            self.backend.end()
        return logits[0]


class _FusedModelError(Exception):
    """The model with fused layers is not what it was without."""


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EngineStartError("--device cuda: torch finds no CUDA device")
    return torch.device(wanted)


def _load(settings: EngineSettings, device: torch.device) -> tuple[PreTrainedModel, PreTrainedConfig]:
    try:
        config = AutoConfig.from_pretrained(settings.model, revision=settings.revision, trust_remote_code=False)
        dtype: torch.dtype | str = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
        if dtype == "auto" and device.type == "cpu" and not _is_fast(config.dtype):
            dtype = torch.float32
        model = AutoModelForCausalLM.from_pretrained(
            settings.model,
            revision=settings.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,  # not said, transformers asks on the terminal, and takes a yes
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise EngineStartError(f"cannot load the model {settings.model!r}: {error}") from error
    if device.type == "cpu" and not _is_fast(model.dtype):
        logger.warning("this CPU has no fast products of %s; --dtype float32 would be faster", model.dtype)
    module: nn.Module = model
    module.to(device).eval().requires_grad_(False)
    return model, config.get_text_config(decoder=True)


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
            raise EngineStartError("the model does not say how long its context is: give --max-model-len")
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
