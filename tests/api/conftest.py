"""A scripted engine, a tokenizer of bytes, and servers around them."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from safetensors.numpy import save_file

from prompt_store.opening import open_store
from prompt_store.store import PromptStore
from server.app import PreludeServer, bind, create_app, url_of
from server.config import EngineSettings, HttpSettings, Settings, StoreSettings
from server.engine.interface import GenerateRequest, TokenEvent
from server.engine.types import (
    EngineStats,
    FinishReason,
    InspectedLayer,
    InspectedRow,
    Inspection,
    Logprobs,
    ModelInfo,
    NormRange,
    SoftPromptSource,
)
from server.errors import EngineNotReadyError
from tests.api.byte_tokenizer import EOS, ByteTokenizer
from tests.api.probes import FakeProbes
from tests.waiting import wait_until

BASE = "tiny"
WIDTH, CONTEXT = 8, 256


def logprobs_of(token_id: int, num_top: int) -> Logprobs:
    """As if the token itself were the likeliest, and those after it the next."""
    return Logprobs(-token_id / 512, [((token_id + rank) % 258, -token_id / 512 - rank) for rank in range(num_top)])


def scores(
    request: GenerateRequest, new: list[int], *, is_first: bool
) -> tuple[list[Logprobs] | None, list[Logprobs | None] | None]:
    """The logprobs that a request asks for: of new tokens, and of the prompt's in the first event."""
    num_top, num_prompt_top = request.params.logprobs, request.params.prompt_logprobs
    of_new = None if num_top is None else [logprobs_of(token_id, num_top) for token_id in new]
    if num_prompt_top is None or not is_first:
        return of_new, None
    of_prompt: list[Logprobs | None] = [
        logprobs_of(token_id, num_prompt_top) for token_id in request.prompt_token_ids
    ]
    if request.soft_prompt is None:
        of_prompt[0] = None
    return of_new, of_prompt[request.params.prompt_logprobs_start :]


def head_of(request: GenerateRequest) -> list[float] | None:
    """As if a head gave its last label the most, and the others the less the longer the text."""
    if not request.params.classify:
        return None
    num_labels = request.soft_prompt.num_labels
    return [-float((num_labels - 1 - index) * len(request.prompt_token_ids)) for index in range(num_labels)]


class FakeEngine(FakeProbes):
    """Answers every request with ``reply``, one byte a token, then the end-of-sequence token."""

    def __init__(self) -> None:
        super().__init__()
        self.reply = "hello world"
        self.step_seconds = 0.0
        self.tokens_per_event = 1
        self.queue_seconds: float | None = None
        """What the first event says about queue and prefill."""
        self.stall_after: int | None = None
        """Tokens after which nothing more comes until the request is aborted."""
        self.fail_after: int | None = None
        self.failure: Exception | None = None
        self.start_failure: Exception | None = None
        self.start_gate = threading.Event()
        self.start_gate.set()
        self.alive = False
        self.outage: str | None = None
        self.on_restarted: Callable[[], None] | None = None
        self.draining = False
        self.stopped = False
        self.requests: list[GenerateRequest] = []
        self.prepared: list[SoftPromptSource] = []
        self.prepare_failure: Exception | None = None
        self.pinned: dict[str, SoftPromptSource] = {}
        self.inspected: list[SoftPromptSource] = []
        self.inspect_failure: Exception | None = None
        self.ended: list[tuple[str, str]] = []
        """Request id and ending (stop, length, abort, error), once for each request."""
        self.stats = EngineStats(num_blocks=10, num_used_blocks=5, max_batch_distinct_prompts=3)

    @property
    def model(self) -> ModelInfo:
        if not self.alive:
            raise EngineNotReadyError("the model is still being loaded")
        return ModelInfo(
            architecture="TinyForCausalLM",
            dtype="float32",
            device="cpu",
            embedding_width=WIDTH,
            num_layers=2,
            num_kv_heads=2,
            head_dim=4,
            vocab_size=258,
            max_model_len=CONTEXT,
            block_size=16,
            num_blocks=10,
            eos_token_ids=(EOS,),
        )

    @property
    def is_ready(self) -> bool:
        return self.alive and not self.draining and self.outage is None

    def subscribe(self, on_restarted: Callable[[], None]) -> None:
        self.on_restarted = on_restarted

    @property
    def in_flight(self) -> int:
        return len(self.requests) - len(self.ended)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        if not self.is_ready:
            raise EngineNotReadyError("the engine does not accept requests now")
        self.requests.append(request)
        ending = "abort"
        try:
            tokens = [*self.reply.encode(), *([] if request.params.ignore_eos else [EOS])]
            tokens = tokens[: request.params.max_tokens]
            num_sent = 0
            if not tokens:
                await asyncio.sleep(self.step_seconds)
                ending = "length" if self.failure is None else "error"
                if self.failure is not None:
                    raise self.failure
                scored = scores(request, [], is_first=True)
                yield TokenEvent([], FinishReason.LENGTH, None, 2, None, None, *scored, head_of(request))
            while num_sent < len(tokens):
                if self.failure is not None and num_sent >= (self.fail_after or 0):
                    ending = "error"
                    raise self.failure
                if self.stall_after is not None and num_sent >= self.stall_after:
                    while self.stall_after is not None and not self.draining:  # noqa: ASYNC110 - set by another thread
                        await asyncio.sleep(0.005)
                    if self.draining:
                        yield TokenEvent([], FinishReason.ABORT, None, 0)
                        return
                await asyncio.sleep(self.step_seconds)
                new = tokens[num_sent : num_sent + self.tokens_per_event]
                num_sent += len(new)
                stop = new[-1] if new[-1] == EOS or new[-1] in request.params.stop_token_ids else None
                reason = None
                if stop is not None:
                    reason = FinishReason.STOP
                elif num_sent == len(tokens):
                    reason = FinishReason.LENGTH
                if reason is not None:
                    ending = reason.value
                seconds = self.queue_seconds if num_sent == len(new) else None
                scored = scores(request, new, is_first=num_sent == len(new))
                yield TokenEvent(new, reason, stop, 2, seconds, seconds, *scored)
                if reason is not None:
                    return
        finally:
            self.ended.append((request.request_id, ending))

    async def prepare(self, soft_prompt: SoftPromptSource) -> None:
        if not self.is_ready:
            raise EngineNotReadyError("the engine does not accept requests now")
        await asyncio.sleep(self.step_seconds)
        if self.prepare_failure is not None:
            raise self.prepare_failure
        self.prepared.append(soft_prompt)

    def pin(self, soft_prompt: SoftPromptSource) -> None:
        self.pinned[soft_prompt.identity] = soft_prompt

    def unpin(self, soft_prompt: SoftPromptSource) -> None:
        del self.pinned[soft_prompt.identity]

    async def inspect(self, soft_prompt: SoftPromptSource, *, num_nearest: int) -> Inspection:
        if self.inspect_failure is not None:
            raise self.inspect_failure
        assert Path(soft_prompt.path).exists()  # noqa: ASYNC240 - it lies in memory
        self.inspected.append(soft_prompt)
        if soft_prompt.is_key_values:
            layer = InspectedLayer(NormRange(2.0, 1.0, 3.0), NormRange(5.0, 4.0, 6.0))
            return Inspection(layers=[layer] * self.model.num_layers)
        nearest = [(token_id, 1 - rank / 100) for rank, token_id in enumerate(range(97, 97 + num_nearest))]
        rows = [InspectedRow(float(index), nearest) for index in range(soft_prompt.num_virtual_tokens)]
        return Inspection(rows=rows, vocabulary_norm_mean=1.5, vocabulary_norm_std=0.25)

    async def start(self) -> None:
        while not self.start_gate.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.005)
        if self.start_failure is not None:
            raise self.start_failure
        self.alive = True

    async def drain(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while self.in_flight and time.monotonic() < deadline:  # noqa: ASYNC110 - a count, not an event
            await asyncio.sleep(0.005)
        self.draining = True
        while self.in_flight:  # noqa: ASYNC110 - a count, not an event
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self.alive = False
        self.stopped = True


class CountingStore:
    """A real store that counts its leases."""

    def __init__(self, store: PromptStore) -> None:
        self._store = store
        self.leased: list[object] = []
        self.released: list[object] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def lease(self, ref: Any, access: Any = None) -> Any:
        leased = self._store.lease(ref, access)
        self.leased.append(leased)
        return leased

    def release(self, leased: Any) -> None:
        self.released.append(leased)
        self._store.release(leased)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def store_path() -> Iterator[Path]:
    """In memory where the system has a directory for that: hundreds of stores would wait for the disk."""
    memory = Path("/dev/shm")  # noqa: S108 - the directory made in it has a random name
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory) / "store"


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
def make_app(engine: FakeEngine, tokenizer: ByteTokenizer, store: CountingStore) -> Callable[[Settings], FastAPI]:
    def make(settings: Settings) -> FastAPI:
        return create_app(settings, engine=engine, tokenizer=tokenizer, store=store)  # type: ignore[arg-type]

    return make


@pytest.fixture
def app(make_app: Callable[[Settings], FastAPI], settings: Settings) -> FastAPI:
    return make_app(settings)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client inside the application's event loop; the server is ready."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http,
    ):
        while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110 - as a user would wait
            await asyncio.sleep(0.001)
        yield http


class LiveServer:
    """A real server in a thread.

    Attributes:
        url: Where it is.
        server: The uvicorn server.
        thread: What it runs in.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._bound = bind(settings.http)
        self.url = url_of(self._bound)
        self.server = PreludeServer(app, settings)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._bound]})

    def wait_until_ready(self) -> None:
        wait_until(self._is_ready)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").is_success
        except httpx.TransportError:
            return False

    @contextmanager
    def running(self) -> Iterator[LiveServer]:
        with closing(self._bound):
            self.thread.start()
            try:
                yield self
            finally:
                self.server.should_exit = True
                self.thread.join(20)
                assert not self.thread.is_alive()


@pytest.fixture
def serve(make_app: Callable[[Settings], FastAPI], settings: Settings) -> Iterator[Callable[..., LiveServer]]:
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
def live(serve: Callable[..., LiveServer]) -> LiveServer:
    return serve()


@pytest.fixture
def peft_directory(tmp_path: Path) -> Callable[..., Path]:
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
def upload_parts(peft_directory: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """Arguments for an httpx POST that uploads a soft prompt."""

    def parts(name: str = "sentiment", *, seed: int = 0, **fields: Any) -> dict[str, Any]:
        rows, width = fields.pop("rows", 4), fields.pop("width", WIDTH)
        directory = peft_directory(name, seed=seed, rows=rows, width=width)
        files = [("files", (path.name, path.read_bytes())) for path in sorted(directory.iterdir())]
        return {"data": {"id": name, **fields}, "files": files}

    return parts


@pytest.fixture
async def sentiment(client: httpx.AsyncClient, upload_parts: Callable[..., dict[str, Any]]) -> str:
    """The name of an uploaded soft prompt of four virtual tokens."""
    (await client.post("/v1/prompts", **upload_parts("sentiment"))).raise_for_status()
    return "sentiment"


@pytest.fixture
def eventually() -> Callable[..., float]:
    """Wait for another thread to make a condition true."""

    return wait_until


@pytest.fixture
def other_parts(tmp_path: Path) -> Callable[..., dict[str, Any]]:
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
