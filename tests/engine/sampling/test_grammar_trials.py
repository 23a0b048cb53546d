from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.engine.sampling.grammar_check import GrammarError
from server.engine.sampling.grammar_trials import CancelledTrialError, GrammarTrials, TooSlowError
from server.engine.sampling.trial_process import Trial, Vocabulary, encode
from tests.support.engine.grammars import END_ID, save_tokenizer
from tests.support.presence import present
from tests.support.waiting import wait_until

BOMB = 'start: %json {"type": "integer", "multipleOf": 49999999}'


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Vocabulary(tokenizer.backend_tokenizer.to_str(), len(tokenizer), [END_ID])


@pytest.fixture
def trials(vocabulary: Vocabulary) -> Iterator[GrammarTrials]:
    trials = GrammarTrials(vocabulary)
    yield trials
    trials.release()


def try_out(trials: GrammarTrials, lark: str, cpu_seconds: float) -> int:
    return trials.try_out(lark, cpu_seconds, threading.Event())


def test_the_memory_of_a_grammar_is_measured(trials: GrammarTrials) -> None:
    small = try_out(trials, "start: /[a-c]+/", 10)
    large = try_out(trials, 'start: %json {"type": "integer", "multipleOf": 49999}', 10)
    assert small < 1 << 20 < large


@pytest.mark.parametrize("text", ["start: /(/", "start: absent", "start: a\na: a a"])
def test_an_invalid_grammar_is_refused_with_a_message(trials: GrammarTrials, text: str) -> None:
    with pytest.raises(GrammarError, match=r"\w+"):
        try_out(trials, text, 10)
    assert try_out(trials, 'start: "a"', 10) >= 0


def test_a_grammar_that_crashes_the_compiler_is_refused(trials: GrammarTrials) -> None:
    schema = '{"type": "integer", "minimum": -9223372036854775808, "maximum": -9223372036854775808}'
    with pytest.raises(GrammarError, match="the grammar compiler crashes on it"):
        try_out(trials, f"start: %json {schema}", 10)
    assert try_out(trials, 'start: "a"', 10) >= 0


def test_a_grammar_that_takes_too_long_is_killed_and_the_next_is_not(trials: GrammarTrials) -> None:
    for _ in range(2):
        with pytest.raises(TooSlowError):
            try_out(trials, BOMB, 0.1)
    assert try_out(trials, 'start: "a"', 10) >= 0


def test_a_grammar_that_takes_too_much_memory_is_killed(vocabulary: Vocabulary) -> None:
    trials = GrammarTrials(vocabulary, memory_bytes=24 << 20)
    with pytest.raises(GrammarError, match="more than 24 MiB of memory"):
        try_out(trials, BOMB, 300)
    assert try_out(trials, 'start: "a"', 10) >= 0
    trials.release()


def begin_bomb(trials: GrammarTrials, cancelled: threading.Event) -> tuple[threading.Thread, list[BaseException]]:
    """Try out a grammar that takes hours, in a thread; returns it and the list of what it raises."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            trials.try_out(BOMB, 10_000, cancelled)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: trials._running is cancelled, 60)
    return thread, raised


def test_a_trial_that_is_cancelled_ends_and_the_next_does_not(trials: GrammarTrials) -> None:
    for _ in range(2):
        cancelled = threading.Event()
        thread, raised = begin_bomb(trials, cancelled)
        trials.interrupt()  # not cancelled yet: no effect
        cancelled.set()
        trials.interrupt()
        trials.interrupt()
        thread.join()
        assert isinstance(raised[0], CancelledTrialError)
        with pytest.raises(CancelledTrialError):  # cancelled before it began
            trials.try_out('start: "a"', 10, cancelled)
        trials.interrupt()
        assert try_out(trials, 'start: "a"', 10) >= 0


def test_a_process_that_has_ended_is_started_again(trials: GrammarTrials) -> None:
    try_out(trials, 'start: "a"', 10)
    first = present(trials._process)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert try_out(trials, 'start: "a"', 10) >= 0
    assert trials._process is not first


def test_a_process_that_cannot_work_is_an_error(trials: GrammarTrials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GrammarError, match="crashed twice"):
        try_out(trials, 'start: "a"', 10)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(GrammarError, match="cannot be started"):
        try_out(trials, 'start: "a"', 10)


def test_killing_ends_the_running_trial(trials: GrammarTrials) -> None:
    cancelled = threading.Event()
    thread, raised = begin_bomb(trials, cancelled)
    process = trials._process
    assert process is not None
    cancelled.set()
    trials.kill()
    thread.join()
    assert isinstance(raised[0], CancelledTrialError)
    trials.release()
    assert process.returncode is not None


@pytest.mark.parametrize("lark", [None, 'start: "a"', BOMB])
def test_the_process_does_not_outlive_its_connection(vocabulary: Vocabulary, lark: str | None) -> None:
    trials = GrammarTrials(vocabulary)
    with trials._start() as connection:
        connection.sendall(encode(vocabulary))
        if lark is not None:
            connection.sendall(encode(Trial(lark, 10_000)))
    assert present(trials._process).wait(60) == 0


def test_no_child_is_left_behind(trials: GrammarTrials) -> None:
    with pytest.raises(TooSlowError):
        try_out(trials, BOMB, 0.05)
    try_out(trials, 'start: "a"', 10)
    pid = present(trials._process).pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if children.exists():
        assert children.read_text() == ""
