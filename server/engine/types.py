"""The engine's data types. Plain data: no torch, no HTTP."""

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
"""The most urgent and the least urgent priority."""

SMALLEST_TEMPERATURE = 2.0**-126
"""The smallest normal number of float32. Some devices flush smaller ones to 0, and their reciprocals to infinity."""


class FinishReason(StrEnum):
    """Why a text is finished. The values are the API's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class ErrorCode(StrEnum):
    """Which error ended a request. ``async_engine.ERRORS`` maps each code to its exception."""

    FAILED = "failed"
    NOT_FINITE = "not_finite"
    REFUSED = "refused"
    CONSTRAINT = "constraint"
    WAIT_TIMEOUT = "wait_timeout"


class Capability(StrEnum):
    """What an engine may be able to do with a model."""

    CLASSIFICATION_HEADS = "classification_heads"
    INSPECTION = "inspection"
    KEY_VALUES = "key_values"
    MEAN_ENSEMBLES = "mean_ensembles"
    STRUCTURED_OUTPUT = "structured_output"

    @property
    def description(self) -> str:
        """The capability in words, for errors."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    Capability.CLASSIFICATION_HEADS: "classification by a soft prompt's head",
    Capability.INSPECTION: "inspection of soft prompts",
    Capability.KEY_VALUES: "soft prompts of keys and values",
    Capability.MEAN_ENSEMBLES: "ensembles by the mean",
    Capability.STRUCTURED_OUTPUT: "structured output",
}
ALL_CAPABILITIES = tuple(Capability)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the next token, and when to stop.

    Attributes:
        max_tokens: Maximum number of new tokens; 0 only computes the prompt.
        min_tokens: New tokens before ``stop_token_ids`` and the end of sequence may be chosen.
        temperature: Divides the logits. 0, and anything too small for float32, is greedy.
        top_p: Keeps the smallest set of tokens whose probabilities reach this sum; 1 keeps all.
        top_k: Keeps this many of the most likely tokens; 0 keeps all.
        min_p: Drops tokens less likely than this share of the most likely one; 0 keeps all.
        presence_penalty: Subtracted from the logit of every token that was generated before.
        frequency_penalty: Subtracted once for each time that the token was generated.
        repetition_penalty: Divides a positive logit, and multiplies a negative one, of every token in the text.
        logit_bias: Token id to the value added to its logit.
        logprobs: For each new token, return its log-probability and those of this many most likely tokens; None
            returns neither.
        prompt_logprobs: The same for the prompt's tokens.
        prompt_logprobs_start: Index of the first prompt token to score. The prefix cache may supply those before it.
        classify: Whether to apply the soft prompt's classification head to the last hidden state of the prompt.
        seed: Seeds the random numbers of this sequence; None draws the seed from the operating system.
        stop_token_ids: Tokens that end the sequence, besides the model's end-of-sequence ids.
        ignore_eos: Whether to continue after end-of-sequence tokens.
        constraint: Constrains the generated text. The text ends when nothing more may follow, regardless of
            ``min_tokens`` and ``ignore_eos``.
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
        """Whether the most likely token is always chosen."""
        return self.temperature < SMALLEST_TEMPERATURE

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything changes the logits before temperature, top-k, top-p and min-p."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
            or self.constraint
        )


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """How likely one token was: the log-softmax, in float32, of the model's unmodified logits.

    Attributes:
        logprob: Natural logarithm of the token's probability; at least ``MIN_LOGPROB``.
        top: (token id, logprob) of the most likely tokens, best first; the first is the argmax.
    """

    logprob: float
    top: list[tuple[int, float]]


MIN_LOGPROB = -9999.0
"""OpenAI's value for an impossible token, because JSON has no infinity."""


class SoftPromptSource(msgspec.Struct, frozen=True, kw_only=True):
    """A soft prompt as the engine receives it: its identity, and the file that holds its tensor.

    Attributes:
        digest: Content digest, hex; never a name.
        num_virtual_tokens: Positions that it takes.
        is_key_values: True for keys and values of every layer, False for rows of input embeddings.
        path: A local safetensors file with the tensor ``prompt_embeddings``.
        task_id: Index of the task, for a multitask prompt; None for all others.
        num_labels: Labels of the classification head in the same file; None without a head.
    """

    digest: str
    num_virtual_tokens: int
    is_key_values: bool
    path: str
    task_id: int | None = None
    num_labels: int | None = None

    @property
    def identity(self) -> str:
        """The key of its keys and values; the tasks of one multitask prompt have different keys."""
        return self.digest if self.task_id is None else f"{self.digest}/{self.task_id}"


class GenerateRequest(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """One text to continue. The API creates it, it crosses to the engine process, and its ``Sequence`` keeps it.

    Attributes:
        request_id: Unique among the requests in flight.
        prompt_token_ids: The prompt; at least one token.
        params: How to sample.
        soft_prompt: The soft prompt before the text, or None.
        others: The soft prompts of an ensemble's other members. Each token is drawn from the mean of the members'
            distributions.
        salt: The tenant. Tenants share no cached text, and they take turns.
        priority: -100 to 100; lower is more urgent.
        timeout: Seconds until the request fails if it has not started to run; None is no limit.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    soft_prompt: SoftPromptSource | None = None
    others: tuple[SoftPromptSource | None, ...] = ()
    salt: str = ""
    priority: int = 0
    timeout: float | None = None


class RequestFailure(msgspec.Struct, tag=True, frozen=True):
    """The error that ended a request."""

    code: ErrorCode
    message: str


class TokenEvent(msgspec.Struct, kw_only=True, array_like=True):
    """New tokens of one request. Only the last event has a finish reason or a failure; it has exactly one of them.

    Attributes:
        request_id: The request.
        token_ids: New tokens since the last event; empty only if the request ended without one.
        finish_reason: Set in the last event of a finished text.
        num_cached_tokens: Prompt tokens found in the prefix cache, summed over the members of an ensemble.
        stop_token_id: The token that ended the text, if one did; it is the last of ``token_ids``.
        logprobs: One for each of ``token_ids``, if requested.
        queue_seconds: From arrival at the engine to the first blocks; in the first event only.
        prefill_seconds: From the first blocks to the first token; in the first event only.
        prompt_logprobs: One for each prompt token from ``SamplingParams.prompt_logprobs_start``, if requested; in the
            first event only. The first may be None.
        class_logits: The logit of each label, if requested; in the first event only.
        failure: The error that ended the request. ``Engine.generate`` raises it instead of yielding the event.
    """

    request_id: str
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    stop_token_id: int | None = None
    logprobs: list[Logprobs] | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    class_logits: list[float] | None = None
    failure: RequestFailure | None = None


class StepOutput(msgspec.Struct, frozen=True):
    """The result of a forward pass.

    Attributes:
        tokens: A new token for each chunk that samples, in order; one for all members of an ensemble. Negative values
            mean that there is none (see ``sampler``).
        logprobs: One for each of ``tokens``, None where not requested; empty if no sequence requested any.
        prompt_logprobs: By request id, what this step appends to the sequence's ``prompt_logprobs``.
        class_logits: By request id, the logits of classification heads.
        spoiled: By the chunk's index in the plan: index in the block table of the first of its ``shared`` blocks that
            holds a non-finite key or value.
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
    """Soft prompts in host memory. Counters count from the engine's start.

    Attributes:
        resident: Soft prompts in memory, in use or not; each task of a multitask prompt counts.
        resident_bytes: Bytes of their rows.
        hits: Uses that found the rows in memory or being read.
        misses: Uses that started a read.
        evictions: Soft prompts evicted to stay within the budget.
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
    """The engine's state after a step. Counters count from the engine's start.

    Attributes:
        num_running: Sequences that hold blocks and take part in steps.
        num_waiting: Sequences that wait for blocks, for a slot, for their soft prompt's file or for their grammar.
        num_blocks: Number of key/value blocks.
        block_size: Tokens per block.
        num_used_blocks: Blocks that a sequence references.
        num_cached_blocks: Blocks that hold only an idle, reusable prefix.
        num_preemptions: Preemptions of running sequences.
        num_timeouts: Sequences that ended because they had not run by their deadline.
        prefix_cache_queries: Prompt tokens looked up in the prefix cache.
        prefix_cache_hits: Prompt tokens found there.
        prompt_tokens: Prompt tokens of admitted sequences.
        generation_tokens: Generated tokens.
        virtual_tokens: Virtual tokens of admitted sequences.
        soft_prompts_resident: Soft prompts whose keys and values are on the device.
        soft_prompt_bytes: Bytes of their blocks.
        soft_prompt_loads: Soft prompts filled into blocks.
        soft_prompt_evictions: Soft prompts evicted from blocks.
        soft_prompt_hits: Sequences that found their soft prompt in blocks, or being filled into them.
        soft_prompt_misses: Sequences that had to allocate blocks for their soft prompt.
        host: Soft prompts in host memory.
        steps: Forward passes.
        step_seconds: Wall time per pass, over ``STEP_SECONDS_BOUNDS``.
        batch_size: Sequences per pass, over ``BATCH_SIZE_BOUNDS``.
        batch_tokens: Tokens computed per pass, over ``BATCH_TOKENS_BOUNDS``.
        batch_distinct_prompts: Distinct soft prompts per pass, over ``DISTINCT_PROMPTS_BOUNDS``.
        max_batch_distinct_prompts: Maximum number of distinct soft prompts in one pass.
        restarts: Restarts of the engine process. Counted in the API process.
        step_timeouts: Engine processes killed because a step hung. Counted in the API process.
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
    """The resident model.

    Attributes:
        architecture: The class name in transformers.
        dtype: The serving dtype.
        device: ``cpu`` or ``cuda``.
        embedding_width: Width of an input embedding.
        num_layers: Decoder layers with keys and values.
        num_kv_heads: Key/value heads per layer.
        head_dim: Width of a head.
        vocab_size: Tokens with an embedding and a logit; all token ids are below it.
        max_model_len: Maximum positions of one sequence, including virtual tokens.
        block_size: Positions per block.
        num_blocks: Blocks of the key/value cache.
        eos_token_ids: Tokens that end a text.
        hidden_size: Width of the last hidden states; None if it equals ``embedding_width``.
        generation_defaults: The checkpoint's defaults for fields that a request leaves out.
        engine: The engine's name.
        capabilities: What the engine can do with this model; requests for anything else are refused.
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
    engine: str = "native"
    capabilities: tuple[Capability, ...] = ALL_CAPABILITIES

    def missing(self, request: GenerateRequest) -> Capability | None:
        """A capability that a request needs and this engine lacks; None if there is none."""
        params, members = request.params, (request.soft_prompt, *request.others)
        needs = {
            Capability.CLASSIFICATION_HEADS: params.classify,
            Capability.MEAN_ENSEMBLES: bool(request.others),
            Capability.KEY_VALUES: any(source is not None and source.is_key_values for source in members),
            Capability.STRUCTURED_OUTPUT: params.constraint is not None,
        }
        return next((name for name, needed in needs.items() if needed and name not in self.capabilities), None)

    def refusal(self, capability: Capability) -> str:
        """Why a request that needs a missing capability is refused."""
        return (
            f"engine {self.engine} does not support {capability.description} for {self.architecture} "
            f"(capability {capability.value})"
        )


class InspectedRow(msgspec.Struct, frozen=True, array_like=True):
    """One virtual token of a soft prompt made of embeddings.

    Attributes:
        norm: Euclidean norm of its row.
        nearest: (token id, cosine similarity) of the vocabulary tokens with the most similar input embeddings, best
            first.
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


class Inspection(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A soft prompt compared with the model.

    Attributes:
        rows: One per virtual token, for a soft prompt made of embeddings.
        vocabulary_norm_mean: Mean norm of the model's input embeddings; None for keys and values.
        vocabulary_norm_std: Standard deviation of those norms; None for keys and values.
        layers: One per layer, for a soft prompt made of keys and values.
    """

    rows: list[InspectedRow] = []
    vocabulary_norm_mean: float | None = None
    vocabulary_norm_std: float | None = None
    layers: list[InspectedLayer] = []
