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
    trials.close()
    trials.release()


def test_what_a_grammar_takes_is_measured(trials: GrammarTrials) -> None:
    small = trials.try_out("start: /[a-c]+/", 10)
    large = trials.try_out('start: %json {"type": "integer", "multipleOf": 49999}', 10)
    assert small < 1 << 20 < large


@pytest.mark.parametrize("text", ["start: /(/", "start: absent", "start: a\na: a a"])
def test_a_wrong_grammar_is_refused_in_words(trials: GrammarTrials, text: str) -> None:
    with pytest.raises(GrammarError, match=r"\w+"):
        trials.try_out(text, 10)
    assert trials.try_out('start: "a"', 10) >= 0


def test_a_grammar_that_the_compiler_crashes_on_is_refused(trials: GrammarTrials) -> None:
    schema = '{"type": "integer", "minimum": -9223372036854775808, "maximum": -9223372036854775808}'
    with pytest.raises(GrammarError, match="the grammar compiler crashes on it"):
        trials.try_out(f"start: %json {schema}", 10)
    assert trials.try_out('start: "a"', 10) >= 0


def test_a_grammar_that_takes_too_long_is_killed_and_the_next_is_not(trials: GrammarTrials) -> None:
    for _ in range(2):
        with pytest.raises(TooSlowError):
            trials.try_out(BOMB, 0.1)
    assert trials.try_out('start: "a"', 10) >= 0


def test_a_grammar_that_takes_too_much_memory_is_killed(vocabulary: Vocabulary) -> None:
    trials = GrammarTrials(vocabulary, memory_bytes=24 << 20)
    with pytest.raises(GrammarError, match="more than 24 MiB of memory"):
        trials.try_out(BOMB, 300)
    assert trials.try_out('start: "a"', 10) >= 0
    trials.release()


def test_a_trial_that_is_cancelled_ends(trials: GrammarTrials) -> None:
    for _ in range(2):
        trials.prepare()
        ended = threading.Event()

        def work(ended: threading.Event = ended) -> None:
            with pytest.raises(CancelledTrialError):
                trials.try_out(BOMB, 10_000)
            ended.set()

        thread = threading.Thread(target=work)
        thread.start()
        wait_until(lambda: trials._is_running, 60)
        trials.cancel()
        thread.join()
        assert ended.is_set()
    with pytest.raises(CancelledTrialError):  # cancelled before it began
        trials.try_out('start: "a"', 10)
    trials.prepare()
    assert trials.try_out('start: "a"', 10) >= 0


def test_a_process_that_has_ended_is_started_again(trials: GrammarTrials) -> None:
    trials.try_out('start: "a"', 10)
    first = present(trials._process)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert trials.try_out('start: "a"', 10) >= 0
    assert trials._process is not first


def test_a_process_that_cannot_work_is_an_error(trials: GrammarTrials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GrammarError, match="crashed twice"):
        trials.try_out('start: "a"', 10)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(GrammarError, match="cannot be started"):
        trials.try_out('start: "a"', 10)


def test_closing_ends_what_is_being_tried_out(vocabulary: Vocabulary) -> None:
    trials = GrammarTrials(vocabulary)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            trials.try_out(BOMB, 10_000)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: trials._is_running, 60)
    process = present(trials._process)
    trials.close()
    thread.join()
    assert isinstance(raised[0], CancelledTrialError)
    trials.release()
    assert process.returncode is not None
    with pytest.raises(CancelledTrialError):
        trials.try_out('start: "a"', 10)


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
        trials.try_out(BOMB, 0.05)
    trials.try_out('start: "a"', 10)
    pid = present(trials._process).pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if children.exists():
        assert children.read_text() == ""
