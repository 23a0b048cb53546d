"""Trial compilations of grammars in another process, where their cost is limited."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress

import msgspec

from server.engine.frames import receive
from server.engine.sampling.grammar_check import GrammarError
from server.engine.sampling.trial_process import MEMORY_BYTES, NOTHING, Trial, Verdict, Vocabulary, encode


class TooSlowError(Exception):
    """A grammar exceeds its processor time."""


class CancelledTrialError(Exception):
    """The trial was cancelled, because no sequence waits for it."""


class GrammarTrials:
    """A process that compiles grammars, one at a time; started with the first trial, and again if it has ended.

    ``try_out`` is called from one thread, ``interrupt`` and ``kill`` from any.

    Args:
        vocabulary: The data of the process's tokenizer.
        memory_bytes: Maximum memory of a grammar.
    """

    def __init__(self, vocabulary: Vocabulary, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._vocabulary = vocabulary
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._running: threading.Event | None = None
        """The running trial, by the event that cancels it."""

    def try_out(self, lark: str, cpu_seconds: float, cancelled: threading.Event) -> int:
        """Compile a grammar in the process; returns its size in bytes, compiled.

        Args:
            lark: The grammar.
            cpu_seconds: Maximum processor time.
            cancelled: Cancels the trial; ``interrupt`` or ``kill`` has to follow if the trial is running.

        Raises:
            GrammarError: If it is invalid, takes too much memory, or the process cannot be started.
            TooSlowError: If it takes more than ``cpu_seconds``.
            CancelledTrialError: If it was cancelled.
        """
        for _ in range(2):  # the process may have ended while it was idle
            body = self._exchange(encode(Trial(lark, cpu_seconds, self._memory_bytes)), cancelled)
            if cancelled.is_set():
                raise CancelledTrialError
            if body is not None:
                return self._bytes_of(msgspec.msgpack.decode(body, type=Verdict))
            self.release()
        raise GrammarError("the process that tests grammars crashed twice on this one")

    def interrupt(self) -> None:
        """End the running trial if it has been cancelled."""
        with self._lock:
            self._end_if_cancelled()

    def kill(self) -> None:
        """Kill the process, after the running trial has been cancelled."""
        with self._lock:
            if self._process is not None:
                self._process.kill()  # wakes the thread that waits for the verdict

    def release(self) -> None:
        """End the process and close the connection, from the thread of ``try_out`` or after its end."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            if self._connection is not None:
                self._connection.close()
            self._process = self._connection = None

    def _exchange(self, frame: bytes, cancelled: threading.Event) -> bytes | None:
        """Send a grammar and wait for its verdict; None if the process has ended or the trial was cancelled."""
        with self._lock:
            if cancelled.is_set():
                return None
            connection = self._connection
            if connection is None:
                frame = encode(self._vocabulary) + frame
                try:
                    connection = self._connection = self._start()
                except OSError as error:
                    raise GrammarError(
                        f"the process that tests grammars cannot be started: {error.strerror}"
                    ) from error
        try:
            connection.sendall(frame)
            with self._lock:
                self._running = cancelled
                self._end_if_cancelled()
            return receive(connection)
        except OSError:
            return None
        finally:
            with self._lock:
                self._running = None

    def _end_if_cancelled(self) -> None:
        if self._running is not None and self._running.is_set() and self._connection is not None:
            with suppress(OSError):  # the process has ended, and the trial with it
                self._connection.sendall(NOTHING)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as stack:
            stack.callback(ours.close)
            command = [sys.executable, "-m", "server.engine.sampling.trial_process", str(theirs.fileno())]
            self._process = subprocess.Popen(  # noqa: S603 (our own module, with our own interpreter)
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
            stack.pop_all()
        return ours

    def _bytes_of(self, verdict: Verdict) -> int:
        """The memory of a compiled grammar.

        Raises:
            GrammarError: If it is invalid, takes too much memory, or crashes the compiler.
            TooSlowError: If it exceeded its processor time.
        """
        if verdict.killed_by in (signal.SIGPROF, signal.SIGKILL):
            raise TooSlowError
        if verdict.killed_by == signal.SIGSEGV:  # such as an endless recursion, by a bound of -2**63
            raise GrammarError("the grammar compiler crashes on it: make it simpler")
        if verdict.killed_by is not None:
            limit = self._memory_bytes >> 20
            raise GrammarError(f"it takes more than {limit} MiB of memory to compile: make it smaller")
        if verdict.error is not None:
            raise GrammarError(verdict.error)
        return verdict.num_bytes
