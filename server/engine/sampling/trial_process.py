"""Compiles grammars to measure their cost, each in a forked process that is killed if it exceeds its limits.

Run as ``python -m server.engine.sampling.trial_process FD``, where FD is one end of a socket pair. The first message
is the tokenizer; the others are grammars, one at a time. The kernel limits the processor time and the memory of a
child, because llguidance cannot be interrupted. The process ends when the other end of the connection closes.

No thread is started before a fork, and torch is not imported, so a fork takes a millisecond.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec
from llguidance import LLMatcher, LLTokenizer

from server.engine.frames import frame, receive
from server.engine.sampling.grammar_check import STACK_BYTES, GrammarError, compile_grammar

MEMORY_BYTES = 256 * 1024 * 1024
"""Maximum memory of a grammar, beyond that of the process. Few take more than 30 MB."""

_WALL_FACTOR, _WALL_SECONDS = 20, 30
"""A child is also ended after ``factor * cpu_seconds + seconds`` of wall time, with room for a busy machine."""

NOTHING = frame(b"")
"""An empty frame."""


class Vocabulary(msgspec.Struct, array_like=True):
    """The data of a tokenizer.

    Attributes:
        tokenizer: The fast tokenizer as JSON.
        size: Number of tokens, at least the width of the logits.
        ends: End-of-sequence tokens.
    """

    tokenizer: str
    size: int
    ends: list[int]


class Trial(msgspec.Struct, array_like=True):
    """A grammar to compile.

    Attributes:
        lark: The grammar, in llguidance's Lark syntax.
        cpu_seconds: Maximum processor time.
        memory_bytes: Maximum memory, beyond that of the process.
    """

    lark: str
    cpu_seconds: float
    memory_bytes: int = MEMORY_BYTES


class Verdict(msgspec.Struct, array_like=True):
    """The result of a trial.

    Attributes:
        error: The grammar's error; None if it was compiled, or the child was killed.
        num_bytes: Memory of the compiled grammar.
        killed_by: The signal that killed the child; None if it was not killed.
    """

    error: str | None = None
    num_bytes: int = 0
    killed_by: int | None = None


def make_tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    """Create llguidance's tokenizer; equal in every process."""
    return LLTokenizer(vocabulary.tokenizer, n_vocab=vocabulary.size, eos_token=vocabulary.ends)


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message as a frame."""
    return frame(msgspec.msgpack.encode(message))


class _Child:
    """A forked process that compiles one grammar.

    Args:
        tokenizer: The model's tokens.
        trial: The grammar.
    """

    def __init__(self, tokenizer: LLTokenizer, trial: Trial) -> None:
        self.pipe, writer = os.pipe()
        self.deadline = time.monotonic() + _WALL_FACTOR * trial.cpu_seconds + _WALL_SECONDS
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self.pipe)
                _try_out(tokenizer, trial, writer)
                status = 0
            finally:
                os._exit(status)  # also after a panic of llguidance, which is not an Exception
        os.close(writer)

    def kill(self) -> None:
        """Kill the process."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def verdict(self) -> Verdict:
        """The child's verdict; blocks until it has ended, which is the case once its pipe is readable."""
        with os.fdopen(self.pipe, "rb") as reader:
            written = reader.read()
        _, status = os.waitpid(self.pid, 0)
        if written:
            return msgspec.msgpack.decode(written, type=Verdict)
        return Verdict(killed_by=os.WTERMSIG(status) if os.WIFSIGNALED(status) else signal.SIGABRT)


def _try_out(tokenizer: LLTokenizer, trial: Trial, writer: int) -> None:
    """Compile a grammar within limits, in the child."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # Rust's panic messages; the verdict has the error
    room = _memory()[0] + STACK_BYTES + trial.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    verdict = Verdict(killed_by=signal.SIGABRT)

    def work() -> None:
        nonlocal verdict
        # Compile a trivial grammar first, so that one-time allocations are not counted.
        LLMatcher(tokenizer, 'start: "a"', log_level=0).compute_bitmask()
        before = _memory()[1]
        signal.setitimer(signal.ITIMER_PROF, trial.cpu_seconds)  # SIGPROF ends the process
        try:
            compiled = compile_grammar(tokenizer, trial.lark)
        except GrammarError as error:
            verdict = Verdict(error=str(error))
        else:
            verdict = Verdict(num_bytes=max(0, _memory()[1] - before))
            del compiled

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with os.fdopen(writer, "wb") as out:
        out.write(msgspec.msgpack.encode(verdict))


def _memory() -> tuple[int, int]:
    """Address space and resident memory of this process, in bytes."""
    size, resident = Path("/proc/self/statm").read_text().split()[:2]
    return int(size) * resource.getpagesize(), int(resident) * resource.getpagesize()


def serve(connection: socket.socket) -> None:
    """Compile grammars one at a time until the connection closes.

    Args:
        connection: A stream socket. An empty frame cancels the running trial.
    """
    body = receive(connection)
    if body is None:
        return
    vocabulary = msgspec.msgpack.decode(body, type=Vocabulary)
    tokenizer = make_tokenizer(vocabulary)
    while (body := receive(connection)) is not None:
        if body:  # an empty frame came after the trial had ended
            child = _Child(tokenizer, msgspec.msgpack.decode(body, type=Trial))
            is_open = _wait(child, connection)
            verdict = child.verdict()
            if not is_open:
                return
            connection.sendall(encode(verdict))


def _wait(child: _Child, connection: socket.socket) -> bool:
    """Wait for a child, and kill it on a timeout or a cancellation; returns whether the connection is open."""
    poll = select.poll()
    poll.register(child.pipe, select.POLLIN)
    poll.register(connection, select.POLLIN)
    ready = [fd for fd, _ in poll.poll(max(0.0, child.deadline - time.monotonic()) * 1000)]
    if child.pipe in ready:
        return True
    child.kill()
    return connection.fileno() not in ready or receive(connection) is not None


def main() -> None:
    """Entry point of the process."""
    # Ctrl-C reaches all processes of the terminal; the engine ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with socket.socket(fileno=int(sys.argv[1])) as connection, suppress(ConnectionError):
        serve(connection)


if __name__ == "__main__":
    main()
