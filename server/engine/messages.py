"""The messages between the API process and the engine process: msgspec structs, never pickle.

The body of a frame is MessagePack, tagged with the struct's name.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, StrEnum

import msgspec

from server.config import EngineSettings
from server.engine.frames import frame
from server.engine.stats import EngineStats
from server.engine.types import (
    AdapterSource,
    GenerateRequest,
    Inspection,
    ModelInfo,
    RequestFailure,
    SoftPromptSource,
    TokenEvent,
)

DEVICE_FAILED_STATUS = 3
"""Exit status of an engine process whose device failed."""


class Start(msgspec.Struct, tag=True, frozen=True):
    """The first message: load the model. The reply is Ready or StartFailed, after any number of Progress."""

    settings: EngineSettings


class AbortRequest(msgspec.Struct, tag=True, frozen=True):
    """End a sequence now; ignored if it has ended already."""

    request_id: str


class Pin(msgspec.Struct, tag=True, frozen=True):
    """Keep a soft prompt's rows in host memory until Unpin. Pinning twice is the same as once."""

    soft_prompt: SoftPromptSource


class Unpin(msgspec.Struct, tag=True, frozen=True):
    """End a pin; ignored if there is none."""

    soft_prompt: SoftPromptSource


class PinAdapter(msgspec.Struct, tag=True, frozen=True):
    """Keep an adapter in host memory until UnpinAdapter. Pinning twice is the same as once."""

    adapter: AdapterSource


class UnpinAdapter(msgspec.Struct, tag=True, frozen=True):
    """End an adapter's pin; ignored if there is none."""

    adapter: AdapterSource


class Inspect(msgspec.Struct, tag=True, frozen=True):
    """Compare a soft prompt with the model. Exactly one Inspected of the same id follows, after any number of steps.

    Attributes:
        inspection_id: Unique among the inspections in flight.
        soft_prompt: The soft prompt; its file must stay until the reply.
        num_nearest: Vocabulary tokens to find for each virtual token, at least 1.
    """

    inspection_id: int
    soft_prompt: SoftPromptSource
    num_nearest: int


class InspectAdapter(msgspec.Struct, tag=True, frozen=True):
    """Measure an adapter beside the model. Exactly one Inspected of the same id follows, after any number of steps.

    Attributes:
        inspection_id: Unique among the inspections in flight.
        adapter: The adapter; its files must stay until the reply.
    """

    inspection_id: int
    adapter: AdapterSource


class Watch(msgspec.Struct, tag=True, frozen=True):
    """Send a BatchPicture now, and after steps during the next seconds; each Watch extends that."""

    seconds: float


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop after the current step."""


class Stage(StrEnum):
    """What the engine does before it is ready, in words for people."""

    LOADING = "loading the model"
    COMPILING = "compiling kernels, which are kept for the next start"
    CHECKING = "checking that results equal the model's own"


OnStage = Callable[[Stage], None]
"""Called at the beginning of each stage."""


def skip(_stage: Stage) -> None:
    """Show no stage."""


class Progress(msgspec.Struct, tag=True, frozen=True):
    """A stage of the start begins. Any number of them come before Ready or StartFailed."""

    stage: Stage


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded and the cache is sized."""

    model: ModelInfo


class StartFailed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start with these settings; the process ends."""

    message: str


class StepOutputs(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The events of one step, and the engine's state after it.

    Attributes:
        events: The new events, in order.
        stats: The engine's state.
        num_received: Messages that the step loop has received since Ready.
        has_work: Whether another step starts at once.
    """

    events: list[TokenEvent]
    stats: EngineStats
    num_received: int
    has_work: bool


class InspectedModule(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What an adapter changes in one module.

    Attributes:
        name: The module's name in the base.
        rank: Rows of its A; 0 for an IA3.
        scale: Factor of B A; 1 for an IA3.
        frobenius_norm: Frobenius norm of the change of the module's weight.
        spectral_norm: Largest singular value of that change.
        share: ``frobenius_norm`` divided by the Frobenius norm of the module's weight.
    """

    name: str
    rank: int
    scale: float
    frobenius_norm: float
    spectral_norm: float
    share: float


class AdapterInspection(msgspec.Struct, tag=True, frozen=True):
    """An adapter measured beside the model: its modules, in the order of the base."""

    modules: list[InspectedModule] = []


class Inspected(msgspec.Struct, tag=True, frozen=True):
    """The outcome of an inspection: of a soft prompt by Inspect, of an adapter by InspectAdapter."""

    inspection_id: int
    outcome: Inspection | AdapterInspection | RequestFailure


MAX_MAPPED_BLOCKS = 4096
"""Maximum number of blocks in ``BatchPicture.block_map``."""

MAX_HOST_DIGESTS = 1024
"""Maximum number of digests in ``BatchPicture.host``."""


class BlockState(IntEnum):
    """The state of a block in a map."""

    FREE = 0
    IDLE = 1
    """Holds a text that no sequence uses now."""
    USED = 2
    """Used by one sequence."""
    SHARED = 3
    """Text that several sequences use."""
    PROMPT_IDLE = 4
    PROMPT_USED = 5
    PROMPT_LOADING = 6


class Phase(StrEnum):
    """What a sequence does."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"


class SequencePicture(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One sequence, or one member of an ensemble.

    Attributes:
        request_id: The request; that of an ensemble for all members.
        tenant: The tenant.
        phase: What it does.
        run: Key of its soft prompt's ``RunPicture``; None without a soft prompt.
        is_batch: Whether it is of the service tier ``batch``.
        num_virtual_tokens: Positions of the soft prompt.
        num_text_tokens: Tokens of the prompt.
        num_new_tokens: Tokens generated so far.
        num_computed: Positions whose keys and values are written.
        num_prompt_blocks: Blocks of the soft prompt that it reads.
        num_shared_blocks: Blocks of text that other sequences use, too.
        num_own_blocks: Its other blocks.
        age_seconds: Since its arrival.
        reason: Why it waits: ``place``, ``blocks``, ``soft_prompt``, ``adapter``, ``grammar`` or ``preempted``.
    """

    request_id: str
    tenant: str
    phase: Phase
    run: str | None
    is_batch: bool
    num_virtual_tokens: int
    num_text_tokens: int
    num_new_tokens: int
    num_computed: int
    num_prompt_blocks: int
    num_shared_blocks: int
    num_own_blocks: int
    age_seconds: float
    reason: str | None


class RunPicture(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A soft prompt on the device.

    Attributes:
        key: The identity of its keys and values.
        digest: Its content digest.
        task_id: The task of a multitask prompt.
        num_blocks: Its blocks.
        num_users: Sequences that use it or wait for it.
        state: ``used``, ``idle`` or ``loading``.
    """

    key: str
    digest: str
    task_id: int | None
    num_blocks: int
    num_users: int
    state: str


class AdapterPicture(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """An adapter on the device.

    Attributes:
        digest: Its content digest.
        num_users: Sequences that use it or wait for it.
        is_loaded: False while it is read.
    """

    digest: str
    num_users: int
    is_loaded: bool


class BatchPicture(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The batch between two steps. It holds no text.

    Attributes:
        step: Number of steps so far.
        sequences: Running ones first, at most ``batch_picture.MAX_ROWS``.
        runs: The soft prompts on the device.
        adapters: The adapters on the device.
        host: Digests of the soft prompts and adapters in host memory, at most ``MAX_HOST_DIGESTS``.
        num_blocks: All blocks.
        num_used_blocks: Blocks that a sequence references.
        num_idle_blocks: Blocks that hold only an idle, reusable prefix.
        block_map: A ``BlockState`` for each block, or for every n-th if there are more than ``MAX_MAPPED_BLOCKS``.
    """

    step: int
    sequences: list[SequencePicture]
    runs: list[RunPicture]
    adapters: list[AdapterPicture] = []
    host: list[str] = []
    num_blocks: int
    num_used_blocks: int
    num_idle_blocks: int
    block_map: bytes


ToEngine = (
    Start
    | GenerateRequest
    | AbortRequest
    | Pin
    | Unpin
    | PinAdapter
    | UnpinAdapter
    | Inspect
    | InspectAdapter
    | Watch
    | Shutdown
)


class Exposition(msgspec.Struct, tag=True, frozen=True):
    """Metrics that the engine has beside ``EngineStats``, in Prometheus' text format; they replace earlier ones."""

    text: str


FromEngine = Progress | Ready | StartFailed | StepOutputs | Inspected | Exposition | BatchPicture

encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """Encode one message as a frame.

    Raises:
        ValueError: If the message exceeds the frame limit.
    """
    return frame(encoder.encode(message))
