"""Platforms for tests, passed to an engine instead of the machine's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.engine.attention.backend import AttentionBackend, SDPABackend
from server.engine.attention.decode_batch import Recorder
from server.engine.model.exactness import check_kernels
from server.engine.model.platform import MakeBackend, Platform

HOST = torch.device("cpu")


class PlainPlatform(Platform):
    """The model's own layers, with the given attention backends and recorder.

    With ``overlaps_host`` the engine keeps the order of a device that computes beside the host.
    """

    def __init__(
        self,
        backends: Sequence[MakeBackend] = (SDPABackend,),
        recorder: Recorder | None = None,
        device: torch.device = HOST,
        *,
        overlaps_host: bool = False,
    ) -> None:
        super().__init__(device, backends)
        self._recorder = recorder
        self.overlaps_host = overlaps_host

    def check_kernels(self, backend: AttentionBackend, num_heads: int) -> None:
        if type(backend) is not SDPABackend:
            check_kernels(backend, num_heads)

    def recorder(self) -> Recorder | None:
        return self._recorder
