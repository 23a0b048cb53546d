"""The engine's data types. Plain data: no torch, no HTTP."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from prompt_store.types import ADAPTER_PARTS, ModuleShape
from server.engine.constraints import Constraint
from server.engine.generation_defaults import GenerationDefaults

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

    ADAPTERS = "adapters"
    CLASSIFICATION_HEADS = "classification_heads"
    BATCH_PICTURE = "batch_picture"
    INSPECTION = "inspection"
    KEY_VALUES = "key_values"
    MEAN_ENSEMBLES = "mean_ensembles"
    STRUCTURED_OUTPUT = "structured_output"

    @property
    def description(self) -> str:
        """The capability in words, for errors."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    Capability.ADAPTERS: "LoRA adapters",
    Capability.CLASSIFICATION_HEADS: "classification by a soft prompt's head",
    Capability.BATCH_PICTURE: "pictures of the running batch",
    Capability.INSPECTION: "inspection of soft prompts",
    Capability.KEY_VALUES: "soft prompts of keys and values",
    Capability.MEAN_ENSEMBLES: "ensembles by the mean",
    Capability.STRUCTURED_OUTPUT: "structured output",
}
ALL_CAPABILITIES = tuple(one for one in Capability if one is not Capability.ADAPTERS)


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


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA or IA3 adapter as the engine receives it: its identity, and the files of PEFT that hold it.

    Attributes:
        digest: Content digest, hex; never a name.
        path: A local safetensors file with its tensors.
        config_path: A local ``adapter_config.json``: scales and ranks follow from it.
        num_parameters: Elements of all tensors that change products; its size in memory follows from them.
        num_labels: Labels of the classification head in the same file; None without a head.
    """

    digest: str
    path: str
    config_path: str
    num_parameters: int
    num_labels: int | None = None

    @property
    def identity(self) -> str:
        """The key of its weights."""
        return self.digest


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One member of an ensemble: a soft prompt, an adapter, both, or the bare base.

    Attributes:
        soft_prompt: The soft prompt before the text, or None.
        adapter: The adapter that changes the model's products for the text and the soft prompt, or None.
    """

    soft_prompt: SoftPromptSource | None = None
    adapter: AdapterSource | None = None


class GenerateRequest(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """One text to continue. The API creates it, it crosses to the engine process, and its ``Sequence`` keeps it.

    Attributes:
        request_id: Unique among the requests in flight.
        prompt_token_ids: The prompt; at least one token.
        params: How to sample.
        soft_prompt: The soft prompt before the text, or None.
        adapter: The adapter that changes the model's products for the text and the soft prompt, or None.
        others: An ensemble's other members. Each token is drawn from the mean of the members' distributions.
        salt: The tenant. Tenants share no cached text, and they take turns.
        priority: -100 to 100; lower is more urgent.
        is_batch: Whether it is of the service tier ``batch``, which takes only what other requests leave.
        timeout: Seconds until the request fails if it has not started to run; None is no limit.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    soft_prompt: SoftPromptSource | None = None
    adapter: AdapterSource | None = None
    others: tuple[Member, ...] = ()
    salt: str = ""
    priority: int = 0
    is_batch: bool = False
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
        step: Number of the engine's step that computed the tokens, from 1; None if the engine does not number them.
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
    step: int | None = None


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
        block_bytes: Bytes of one block over all layers; 0 if the engine does not report them.
        hidden_size: Width of the last hidden states; None if it equals ``embedding_width``.
        generation_defaults: The checkpoint's defaults for fields that a request leaves out.
        engine: The engine's name.
        capabilities: What the engine can do with this model; requests for anything else are refused.
        modules: Shapes of the base's products and embeddings by the module's name in transformers. Every tensor of an
            adapter belongs to one. Empty if the engine serves no adapters.
        adapters_off: Why the engine serves no adapters; None if it does.
        base_digests: Hex sha256 of the embeddings and the head by name, in the serving dtype, row by row: adapters
            may hold copies of them, which PEFT adds. Empty if the engine does not know them.
        adapter_parts: What the engine applies of an adapted module (``AdaptedModule.tensors``); adapters with
            any other part are refused.
        max_adapter_parameters: Elements of the largest adapter that the engine's memory for adapters ever holds.
        num_threads: CPU threads of the model; 0 if it is on another device, or the engine does not know it.
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
    block_bytes: int = 0
    hidden_size: int | None = None
    generation_defaults: GenerationDefaults = GenerationDefaults()
    engine: str = "native"
    capabilities: tuple[Capability, ...] = ALL_CAPABILITIES
    modules: dict[str, ModuleShape] = {}
    adapters_off: str | None = None
    base_digests: dict[str, str] = {}
    adapter_parts: tuple[str, ...] = ADAPTER_PARTS
    max_adapter_parameters: int = 0
    num_threads: int = 0

    def missing(self, request: GenerateRequest) -> Capability | None:
        """A capability that a request needs and this engine lacks; None if there is none."""
        params = request.params
        members = (Member(soft_prompt=request.soft_prompt, adapter=request.adapter), *request.others)
        soft_prompts = [member.soft_prompt for member in members]
        needs = {
            Capability.ADAPTERS: any(member.adapter is not None for member in members),
            Capability.CLASSIFICATION_HEADS: params.classify,
            Capability.MEAN_ENSEMBLES: bool(request.others),
            Capability.KEY_VALUES: any(source is not None and source.is_key_values for source in soft_prompts),
            Capability.STRUCTURED_OUTPUT: params.constraint is not None,
        }
        return next((name for name, needed in needs.items() if needed and name not in self.capabilities), None)

    def refusal(self, capability: Capability) -> str:
        """Why a request that needs a missing capability is refused."""
        why = f": {self.adapters_off}" if capability is Capability.ADAPTERS and self.adapters_off else ""
        return (
            f"engine {self.engine} does not support {capability.description} for {self.architecture} "
            f"(capability {capability.value}){why}"
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
