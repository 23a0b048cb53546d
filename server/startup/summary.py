"""What a server serves, in at most seven lines."""

from __future__ import annotations

from dataclasses import dataclass

from prompt_store.types import StoreTotals
from server.engine.types import ModelInfo

_WIDTH = 14
"""Columns of a line's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a server serves.

    Attributes:
        name: The model's name in the API.
        model: The model.
        totals: What the store holds.
        location: Where the store is: a directory or a URL.
        has_keys: Whether clients need an API key.
        is_open: Whether clients on other machines need none.
    """

    name: str
    model: ModelInfo
    totals: StoreTotals
    location: str
    has_keys: bool
    is_open: bool = False

    @property
    def fields(self) -> dict[str, object]:
        """The facts for a program, as fields of a log line."""
        model = self.model
        return {
            "model": self.name,
            "architecture": model.architecture,
            "engine": model.engine,
            "device": model.device,
            "dtype": model.dtype,
            "num_threads": model.num_threads or None,
            "max_model_len": model.max_model_len,
            "cache_bytes": self._num_bytes or None,
            "cache_tokens": self._num_tokens,
            "cache_full_sequences": self._num_full_sequences,
            "stored": self.totals.num_prompts,
            "store": self.location,
            "has_keys": self.has_keys,
        }

    def lines(self, url: str | None) -> list[str]:
        """The facts for people.

        Args:
            url: Where the server listens, if that is known.
        """
        model = self.model
        threads = f", {_count(model.num_threads, 'thread')}" if model.num_threads else ""
        engine = "" if model.engine == "native" else f", engine {model.engine}"
        memory = f"{self._num_bytes / 2**30:.2f} GiB, " if self._num_bytes else ""
        tokens = f"{self._num_tokens:,} tokens"
        sequences = _count(self._num_full_sequences, "sequence")
        num_stored = self.totals.num_prompts
        stored = f"{num_stored:,} soft prompts and adapters" if num_stored else "no soft prompts and adapters yet,"
        facts = {
            "model": f"{self.name}: {model.architecture}, {model.dtype}, {model.device}{threads}{engine}",
            "keys/values": f"{memory}{tokens}: {sequences} of {model.max_model_len:,} tokens",
            "stored": f"{stored} in {self.location}",
            "API keys": self._access,
        }
        if url is not None:
            facts |= {"serving": url, "open": f"{url}/console, or {url}/docs for the API"}
        return [f"{name:{_WIDTH}}{text}" for name, text in facts.items()]

    @property
    def _num_bytes(self) -> int:
        return self.model.num_blocks * self.model.block_bytes

    @property
    def _num_tokens(self) -> int:
        return self.model.num_blocks * self.model.block_size

    @property
    def _num_full_sequences(self) -> int:
        return self.model.num_blocks // -(-self.model.max_model_len // self.model.block_size)

    @property
    def _access(self) -> str:
        if self.has_keys:
            return "required"
        if self.is_open:
            return "none, and OPEN: every machine that reaches this one may do everything"
        return "none; only programs on this machine can connect"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
