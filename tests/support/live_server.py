"""A real server in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import httpx
from fastapi import FastAPI

from server.app import PreludeServer, bind, url_of
from server.config import Settings
from tests.support.waiting import wait_until


class LiveServer:
    """A real server in a thread.

    Attributes:
        url: Base URL.
        server: The uvicorn server.
        thread: The server's thread.
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
