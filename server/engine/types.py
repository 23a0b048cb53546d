"""The engine's own nouns. Plain data: no torch, no HTTP."""

from __future__ import annotations

from enum import StrEnum
from functools import partial

import msgspec

from prompt_store.histogram import LOAD_SECONDS_BOUNDS, Histogram
from server.engine.constraints import Constraint
from server.engine.generation_defaults import GenerationDefaults
from server.engine.stats import (
    BATCH_SIZE_BOUNDS,
    BATCH_TOKENS_BOUNDS,
    DISTINCT_PROMPTS_BOUNDS,
    STEP_SECONDS_BOUNDS,
)

MIN_PRIORITY, MAX_PRIORITY = -100, 100
"""The most and the least urgent priority."""

SMALLEST_TEMPERATURE = 2.0**-126
"""The smallest normal number of float32; what is below it, or its reciprocal, is 0 or infinite on some device."""


class FinishReason(StrEnum):
    """Why a sequence ended; the values are the API's words, except for the last five, which are errors there."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    CONSTRAINT = "constraint"
    NOT_FINITE = "not_finite"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen, and when to stop.

    Attributes:
        max_tokens: New tokens at most; 0 only computes the prompt.
        min_tokens: New tokens before which nothing in ``stop_token_ids`` and no end of sequence is chosen.
        temperature: The logits are divided by it. 0 is greedy, and so is what float32 cannot divide by.
        top_p: Smallest set of tokens whose probabilities reach this sum; 1 keeps all.
        top_k: Most likely tokens that are kept; 0 keeps all.
        min_p: Tokens less likely than this share of the likeliest one are left out; 0 keeps all.
        presence_penalty: Taken off the logit of every token that was generated before.
        frequency_penalty: Taken off for each time that it was generated.
        repetition_penalty: Divides a positive logit, and multiplies a negative one, of every token of text so far.
        logit_bias: Added to the logits of these token ids.
        logprobs: For each new token its log-probability and those of so many likeliest ones; None for neither.
        prompt_logprobs: The same for the text's own tokens.
        prompt_logprobs_start: The first token of the text that they are wanted for; what is computed for those
            before it may come from the prefix cache.
        classify: Whether the soft prompt's own head reads the text's last hidden state.
        seed: Seeds this sequence's own random numbers; None draws them from the operating system.
        stop_token_ids: Tokens that end the sequence (the tokenizer's end-of-sequence ids come with the model).
        ignore_eos: Whether to continue after end-of-sequence tokens.
        constraint: What the text has to be; it ends where nothing more may follow, whatever ``min_tokens`` and
            ``ignore_eos`` say.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    classify: bool = False
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    constraint: Constraint | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < SMALLEST_TEMPERATURE

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits are changed before temperature, top-k, top-p and min-p."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
            or self.constraint
        )


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """How likely one token was, by the log-softmax in float32 of the model's own logits.

    Temperature, penalties, bias and cuts have no part in it.

    Attributes:
        logprob: Natural logarithm of the token's probability; never below MIN_LOGPROB.
        top: (token id, logprob) of the likeliest tokens, best first; the first is the argmax.
    """

    logprob: float
    top: list[tuple[int, float]]


MIN_LOGPROB = -9999.0
"""OpenAI's word for impossible: JSON has no infinity."""


class SoftPromptSource(msgspec.Struct, frozen=True, kw_only=True):
    """A soft prompt as it crosses to the engine: who it is, and where its tensor lies.

    Attributes:
        digest: Content digest, hex, never a name.
        num_virtual_tokens: Positions that it takes.
        is_key_values: True for keys and values of every layer, False for rows of input embeddings.
        path: A safetensors file on this machine that holds ``prompt_embeddings``.
        task_id: Which task of a multitask prompt, counted from 0; None for all others.
        num_labels: Labels of the classification head in the same file; None where there is none.
    """

    digest: str
    num_virtual_tokens: int
    is_key_values: bool
    path: str
    task_id: int | None = None
    num_labels: int | None = None

    @property
    def identity(self) -> str:
        """What its keys and values are known by: the tasks of one multitask prompt have different ones."""
        return self.digest if self.task_id is None else f"{self.digest}/{self.task_id}"


class TokenOutput(msgspec.Struct, array_like=True):
    """What one step did for one sequence.

    Attributes:
        request_id: Which sequence.
        token_ids: New tokens, in order (none, when it only ended).
        finish_reason: Set in the last output of a sequence.
        stop_token_id: The token that ended it, when one did.
        num_cached_tokens: Text tokens that cached prefixes saved, of all members of an ensemble; in the first output.
        error: What went wrong, when ``finish_reason`` is ``error``, ``refused``, ``timeout``, ``constraint`` or
            ``not_finite``.
        queue_seconds: From its arrival at the engine to its first blocks; in the first output.
        prefill_seconds: From then to its first token; in the first output.
        logprobs: One for each of ``token_ids``, where they were asked for.
        prompt_logprobs: One for each of the text's tokens from ``prompt_logprobs_start``, in the first output, where
            they were asked for.
        class_logits: What the soft prompt's head gives each label, in the first output, where it was asked for.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int | None = None
    error: str | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    class_logits: list[float] | None = None


class StepOutput(msgspec.Struct, frozen=True):
    """What a forward pass gave.

    Attributes:
        tokens: A new token for each chunk that samples, in order, one for all members of an ensemble; negative where
            there is none (see ``sampler``).
        logprobs: For each of them, None where they were not asked for; empty where nobody asked.
        prompt_logprobs: By request id, what this step adds to each sequence's ``prompt_logprobs``.
        class_logits: By request id, what heads give.
        spoiled: By the chunk's number in the plan, the first of its ``shared`` blocks that holds a key or value that
            is not finite, as an index of the block table.
    """

    tokens: list[int]
    logprobs: list[Logprobs | None] = []
    prompt_logprobs: dict[str, list[Logprobs | None]] = {}
    class_logits: dict[str, list[float]] = {}
    spoiled: dict[int, int] = {}


def _empty(bounds: tuple[float, ...]) -> Histogram:
    histogram: Histogram = msgspec.field(default_factory=partial(Histogram.empty, bounds))
    return histogram


class HostTierStats(msgspec.Struct, kw_only=True):
    """Soft prompts in host memory; counters count from the engine's start.

    Attributes:
        resident: Soft prompts held, in use or not (the tasks of one multitask prompt count each).
        resident_bytes: Bytes of their rows.
        hits: Uses that found the rows here, or being read already.
        misses: Uses that had to have them read.
        evictions: Soft prompts dropped to keep the budget.
        load_seconds: Durations of reading a soft prompt's file, over ``LOAD_SECONDS_BOUNDS``.
    """

    resident: int = 0
    resident_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    load_seconds: Histogram = _empty(LOAD_SECONDS_BOUNDS)

    @property
    def loads(self) -> int:
        """Soft prompts read from their files."""
        return self.load_seconds.count


class EngineStats(msgspec.Struct, kw_only=True):
    """The engine's state after a step; counters count from the engine's start.

    Attributes:
        num_running: Sequences that hold blocks and take part in steps.
        num_waiting: Sequences that wait for blocks, for a place, for their soft prompt's file or for their grammar.
        num_blocks: Total number of key/value blocks.
        block_size: Tokens that a block holds.
        num_used_blocks: Blocks that some sequence refers to.
        num_cached_blocks: Key/value blocks that hold only an idle, reusable prefix.
        num_preemptions: Sequences whose blocks were taken back, to be computed again.
        num_timeouts: Sequences that ended because they had not run by their deadline.
        prefix_cache_queries: Text tokens looked up in the prefix cache.
        prefix_cache_hits: Text tokens found there.
        prompt_tokens: Text tokens of admitted requests.
        generation_tokens: Tokens generated.
        virtual_tokens: Virtual tokens of admitted sequences.
        soft_prompts_resident: Soft prompts whose keys and values are on the device.
        soft_prompt_bytes: Bytes of the blocks that hold them.
        soft_prompt_loads: Times a soft prompt was filled into blocks.
        soft_prompt_evictions: Times one was dropped from them.
        soft_prompt_hits: Sequences whose soft prompt was in blocks, or being filled into them, when they came to run.
        soft_prompt_misses: Sequences for whose soft prompt blocks had to be taken.
        host: Soft prompts in host memory.
        steps: Forward passes.
        step_seconds: Wall times of the passes, over ``STEP_SECONDS_BOUNDS``.
        batch_size: Sequences in each, over ``BATCH_SIZE_BOUNDS``.
        batch_tokens: Tokens computed in each, over ``BATCH_TOKENS_BOUNDS``.
        batch_distinct_prompts: Distinct soft prompts in each, over ``DISTINCT_PROMPTS_BOUNDS``.
        max_batch_distinct_prompts: The most distinct soft prompts that any one step has mixed.
        restarts: Times that the engine's process was replaced, as its front counts them.
        step_timeouts: Times that it was killed for a step that did not end, likewise.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    block_size: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    num_preemptions: int = 0
    num_timeouts: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    virtual_tokens: int = 0
    soft_prompts_resident: int = 0
    soft_prompt_bytes: int = 0
    soft_prompt_loads: int = 0
    soft_prompt_evictions: int = 0
    soft_prompt_hits: int = 0
    soft_prompt_misses: int = 0
    host: HostTierStats = msgspec.field(default_factory=HostTierStats)
    steps: int = 0
    step_seconds: Histogram = _empty(STEP_SECONDS_BOUNDS)
    batch_size: Histogram = _empty(BATCH_SIZE_BOUNDS)
    batch_tokens: Histogram = _empty(BATCH_TOKENS_BOUNDS)
    batch_distinct_prompts: Histogram = _empty(DISTINCT_PROMPTS_BOUNDS)
    max_batch_distinct_prompts: int = 0
    restarts: int = 0
    step_timeouts: int = 0


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The resident model, as the engine measured it.

    Attributes:
        architecture: transformers' class name.
        dtype: The serving dtype.
        device: ``cpu`` or ``cuda``.
        embedding_width: Width of a row of input embeddings.
        num_layers: Decoder layers with keys and values.
        num_kv_heads: Key/value heads of a layer.
        head_dim: Width of a head.
        vocab_size: Tokens that have an embedding and a logit; token ids are below it.
        max_model_len: Positions of one sequence, virtual tokens included.
        block_size: Positions in a block.
        num_blocks: Blocks of the key/value cache.
        eos_token_ids: Tokens that end a text.
        hidden_size: Width of the last hidden states; None where it is that of the embeddings.
        generation_defaults: What requests get where they do not say otherwise, by the checkpoint.
    """

    architecture: str
    dtype: str
    device: str
    embedding_width: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    hidden_size: int | None = None
    generation_defaults: GenerationDefaults = GenerationDefaults()


class InspectedRow(msgspec.Struct, frozen=True, array_like=True):
    """One virtual token of a soft prompt made of embeddings.

    Attributes:
        norm: Euclidean norm of its row.
        nearest: (token id, cosine similarity) of the tokens whose input embeddings are most like it, best first.
    """

    norm: float
    nearest: list[tuple[int, float]]


class NormRange(msgspec.Struct, frozen=True, array_like=True):
    """Euclidean norms of many vectors."""

    mean: float
    min: float
    max: float


class InspectedLayer(msgspec.Struct, frozen=True, array_like=True):
    """One layer of a soft prompt made of keys and values: norms over its heads and virtual tokens."""

    keys: NormRange
    values: NormRange


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What a soft prompt looks like beside the model that it stands before.

    Attributes:
        rows: Each virtual token, where the soft prompt is made of embeddings.
        vocabulary_norm_mean: Mean norm of the model's own input embeddings; None for keys and values.
        vocabulary_norm_std: Their standard deviation; None likewise.
        layers: Each layer, where the soft prompt is made of keys and values.
    """

    rows: list[InspectedRow] = []
    vocabulary_norm_mean: float | None = None
    vocabulary_norm_std: float | None = None
    layers: list[InspectedLayer] = []
