"""Fixtures of an application over a scripted engine, in this event loop or in a separate thread."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from safetensors.numpy import save_file

from prompt_store.open_store import open_store
from prompt_store.store import PromptStore
from prompt_store.types import LeasedPrompt
from server.api.keys.limits import KeyLimiter
from server.app import create_app
from server.config import EngineSettings, HttpSettings, Settings, StoreSettings
from server.engine.process.started_process import StartedProcess
from server.startup.display import StartDisplay
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import BASE, WIDTH, FakeEngine
from tests.support.in_process import ready
from tests.support.keyed import locked
from tests.support.live_server import LiveServer
from tests.support.new_stores import new_store
from tests.support.waiting import wait_until


class MakeApp(Protocol):
    """``create_app`` with the fakes."""

    def __call__(
        self, settings: Settings, *, display: StartDisplay | None = None, process: StartedProcess | None = None
    ) -> FastAPI: ...


PeftDirectory = Callable[..., Path]
Serve = Callable[..., LiveServer]
UploadParts = Callable[..., dict[str, Any]]
WaitUntil = Callable[..., float]


class CountingStore:
    """A real store that counts its leases."""

    def __init__(self, store: PromptStore) -> None:
        self._store = store
        self.leased: list[LeasedPrompt] = []
        self.released: list[LeasedPrompt] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def lease(self, ref: Any, access: Any = None) -> Any:
        leased = self._store.lease(ref, access)
        self.leased.append(leased)
        return leased

    def lease_for_request(self, ref: Any, access: Any = None, key: Any = None) -> Any:
        leased = self._store.lease_for_request(ref, access, key)
        self.leased.append(leased)
        return leased

    def release(self, leased: Any) -> None:
        self.released.append(leased)
        self._store.release(leased)


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no limit of a key refill during a test, however slow the test is."""
    monkeypatch.setattr("server.api.keys.key_file.KeyLimiter", partial(KeyLimiter, clock=lambda: 0.0))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def store_path() -> Iterator[Path]:
    """In memory if possible, because hundreds of stores would wait for the disk."""
    memory = Path("/dev/shm")  # noqa: S108 - the directory made in it has a random name
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield new_store(Path(directory) / "store")


@pytest.fixture
def settings(store_path: Path) -> Settings:
    return Settings(
        engine=EngineSettings(model="a/tiny", max_num_seqs=4),
        served_model_name=BASE,
        store=StoreSettings(location=str(store_path), max_upload_bytes=64 * 1024),
        http=HttpSettings(port=0, max_waiting=4, max_body_bytes=64 * 1024, drain_seconds=5.0),
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[CountingStore]:
    opened = open_store(settings.store.location, max_upload_bytes=settings.store.max_upload_bytes)
    yield CountingStore(opened)
    opened.close()


@pytest.fixture
def make_app(engine: FakeEngine, tokenizer: ByteTokenizer, store: CountingStore) -> MakeApp:
    def make(
        settings: Settings, *, display: StartDisplay | None = None, process: StartedProcess | None = None
    ) -> FastAPI:
        assert process is None
        return create_app(
            settings,
            engine=engine,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            store=store,  # type: ignore[arg-type]
            display=display,
        )

    return make


@pytest.fixture
def app(make_app: MakeApp, settings: Settings, request: pytest.FixtureRequest, tmp_path: Path) -> FastAPI:
    """An application. If the test module has ``KEYS``, the text of a key file, the application uses it."""
    keys = getattr(request.module, "KEYS", None)
    return make_app(settings) if keys is None else locked(make_app, settings, tmp_path / "keys.toml", keys)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client in the application's event loop; the server is ready."""
    async with ready(app) as http:
        yield http


@pytest.fixture
def serve(make_app: MakeApp, settings: Settings) -> Iterator[Serve]:
    """Start live servers; ``serve(drain_seconds=0.1)`` changes HTTP settings."""
    with ExitStack() as stack:

        def start(*, wait: bool = True, **http: Any) -> LiveServer:
            changed = replace(settings, http=replace(settings.http, **http))
            live = stack.enter_context(LiveServer(make_app(changed), changed).running())
            if wait:
                live.wait_until_ready()
            return live

        yield start


@pytest.fixture
def live(serve: Serve) -> LiveServer:
    return serve()


@pytest.fixture
def peft_directory(tmp_path: Path) -> PeftDirectory:
    """Write a PEFT directory of prompt tuning, as PEFT saves it."""

    def write(name: str = "sentiment", *, seed: int = 0, rows: int = 4, width: int = WIDTH) -> Path:
        directory = tmp_path / f"peft-{name}-{seed}"
        directory.mkdir(exist_ok=True)
        config = {
            "base_model_name_or_path": BASE,
            "inference_mode": True,
            "num_attention_heads": 2,
            "num_layers": 2,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": rows,
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "task_type": "CAUSAL_LM",
            "token_dim": width,
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        embeddings = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
        save_file({"prompt_embeddings": embeddings}, directory / "adapter_model.safetensors")
        return directory

    return write


@pytest.fixture
def upload_parts(peft_directory: PeftDirectory) -> UploadParts:
    """Arguments for an httpx POST that uploads a soft prompt."""

    def parts(name: str = "sentiment", *, seed: int = 0, **fields: Any) -> dict[str, Any]:
        rows, width = fields.pop("rows", 4), fields.pop("width", WIDTH)
        directory = peft_directory(name, seed=seed, rows=rows, width=width)
        files = [("files", (path.name, path.read_bytes())) for path in sorted(directory.iterdir())]
        return {"data": {"id": name, **fields}, "files": files}

    return parts


@pytest.fixture
async def sentiment(client: httpx.AsyncClient, upload_parts: UploadParts) -> str:
    """The name of an uploaded soft prompt of four virtual tokens."""
    (await client.post("/v1/prompts", **upload_parts("sentiment"))).raise_for_status()
    return "sentiment"


@pytest.fixture
def eventually() -> WaitUntil:
    """Wait for another thread to make a condition true."""

    return wait_until


@pytest.fixture
def other_parts(tmp_path: Path) -> UploadParts:
    """Arguments for an httpx POST that uploads a multitask prompt of three tasks, or a key/value prefix."""

    def parts(name: str, *, peft_type: str = "MULTITASK_PROMPT_TUNING", **fields: Any) -> dict[str, Any]:
        config = {
            "base_model_name_or_path": BASE,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": 4,
            "peft_type": peft_type,
            "task_type": "CAUSAL_LM",
        }
        if peft_type == "MULTITASK_PROMPT_TUNING":
            config |= {"num_tasks": 3, "num_ranks": 1, "token_dim": WIDTH}
            shapes = {
                "prompt_embeddings": (4, WIDTH),
                "prefix_task_cols": (3, 4, 1),
                "prefix_task_rows": (3, 1, WIDTH),
            }
        else:
            shapes = {"prompt_embeddings": (4, 2 * 2 * WIDTH)}
        path = tmp_path / f"other-{name}.safetensors"
        save_file({key: np.ones(shape, np.float32) for key, shape in shapes.items()}, path)
        files = [("adapter_config.json", json.dumps(config)), ("adapter_model.safetensors", path.read_bytes())]
        return {"data": {"id": name, **fields}, "files": [("files", file) for file in files]}

    return parts
