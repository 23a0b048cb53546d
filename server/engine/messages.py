"""The messages between the API process and the engine process: msgspec structs, never pickle.

The body of a frame is MessagePack, tagged with the struct's name.
"""

from __future__ import annotations

import msgspec

from server.config import EngineSettings
from server.engine.frames import frame
from server.engine.types import (
    EngineStats,
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
    """The first message: load the model. The reply is Ready or StartFailed."""

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


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop after the current step."""


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


class Inspected(msgspec.Struct, tag=True, frozen=True):
    """The outcome of an inspection."""

    inspection_id: int
    outcome: Inspection | RequestFailure


ToEngine = Start | GenerateRequest | AbortRequest | Pin | Unpin | Inspect | Shutdown
FromEngine = Ready | StartFailed | StepOutputs | Inspected

encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """Encode one message as a frame.

    Raises:
        ValueError: If the message exceeds the frame limit.
    """
    return frame(encoder.encode(message))
