"""What crosses between the API process and the engine process: msgspec structs, never pickle.

The body of a frame is MessagePack, tagged with the struct's name.
"""

from __future__ import annotations

import msgspec

from server.config import EngineSettings
from server.engine.frames import frame
from server.engine.types import EngineStats, Inspection, ModelInfo, SamplingParams, SoftPromptSource, TokenOutput


class Start(msgspec.Struct, tag=True, frozen=True):
    """The first message: load the model. Answered by Ready or StartFailed."""

    settings: EngineSettings


class AddRequest(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Admit a sequence. Exactly one output with a finish reason follows.

    Attributes:
        request_id: The caller's name for it.
        prompt_token_ids: At least one text token.
        params: How to sample.
        soft_prompt: What stands before the text, or None.
        others: The same for the other members of an ensemble, whose mean distribution each token is drawn from.
        salt: The tenant.
        priority: Lower is more urgent.
        timeout: Seconds in which it has to begin to run, or it ends; None is no limit.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    soft_prompt: SoftPromptSource | None = None
    others: list[SoftPromptSource | None] = []
    salt: str = ""
    priority: int = 0
    timeout: float | None = None


class AbortRequest(msgspec.Struct, tag=True, frozen=True):
    """End a sequence now; ignored when it has ended already."""

    request_id: str


class Pin(msgspec.Struct, tag=True, frozen=True):
    """Keep a soft prompt's rows in host memory until Unpin; twice is the same as once."""

    soft_prompt: SoftPromptSource


class Unpin(msgspec.Struct, tag=True, frozen=True):
    """Let a pinned soft prompt's rows go like others; ignored when they are not pinned."""

    soft_prompt: SoftPromptSource


class Inspect(msgspec.Struct, tag=True, frozen=True):
    """Compare a soft prompt with the model. Exactly one Inspected of the same id follows, after any number of steps.

    Attributes:
        inspection_id: The caller's name for it.
        soft_prompt: What to look at; its file has to stay until the answer.
        num_nearest: Vocabulary tokens to find for each virtual token, at least 1.
    """

    inspection_id: int
    soft_prompt: SoftPromptSource
    num_nearest: int


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop after the step under way."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded and the cache is sized."""

    model: ModelInfo


class StartFailed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start with these settings, and ends."""

    message: str


class StepOutputs(msgspec.Struct, tag=True, frozen=True):
    """What one step did, and the engine's state after it.

    Attributes:
        outputs: What is new.
        stats: The state.
        num_received: Messages that the step loop has taken since Ready.
        has_work: Whether another step begins at once.
    """

    outputs: list[TokenOutput]
    stats: EngineStats
    num_received: int
    has_work: bool


class Inspected(msgspec.Struct, tag=True, frozen=True):
    """What an inspection found, or why it could not; one of the two is set."""

    inspection_id: int
    result: Inspection | None = None
    error: str | None = None


ToEngine = Start | AddRequest | AbortRequest | Pin | Unpin | Inspect | Shutdown
FromEngine = Ready | StartFailed | StepOutputs | Inspected

encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One message as it goes over the socket.

    Raises:
        ValueError: If it is longer than a frame may be.
    """
    return frame(encoder.encode(message))
