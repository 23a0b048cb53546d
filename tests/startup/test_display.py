"""A start as it is shown on a terminal, in a file and in the log."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from prompt_store.types import StoreTotals
from server import logs
from server.engine.messages import Stage
from server.engine.types import ModelInfo
from server.startup.display import StartDisplay
from server.startup.summary import Summary

MODEL = ModelInfo(
    architecture="LlamaForCausalLM",
    dtype="float32",
    device="cpu",
    embedding_width=8,
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=100,
    max_model_len=100,
    block_size=16,
    num_blocks=1400,
    block_bytes=2**20,
    eos_token_ids=(0,),
    num_threads=2,
)
SUMMARY = Summary(name="llama", model=MODEL, totals=StoreTotals(), location="/srv/store", has_keys=False)

STAGES = ["starting", *Stage]


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def start(display: StartDisplay) -> None:
    with display:
        display.url = "http://127.0.0.1:8000"
        for stage in Stage:
            display.enter(stage)
        display.show(SUMMARY)


def test_a_file_gets_a_line_for_each_stage_and_at_most_eight_at_the_end() -> None:
    console = Console(file=io.StringIO(), width=40)
    start(StartDisplay(console))
    lines = shown(console).splitlines()
    num_stages = len(STAGES)
    assert lines[:num_stages] == [f"{stage} …" for stage in STAGES]
    assert lines[num_stages].startswith("Ready after ")
    assert lines[num_stages + 1 :] == [f"  {line}" for line in SUMMARY.lines("http://127.0.0.1:8000")]
    assert len(lines) - num_stages <= 8


def test_a_terminal_shows_the_stages_in_one_line_that_goes_away() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    start(StartDisplay(console))
    text = shown(console)
    assert Stage.CHECKING in text
    erase = "\x1b[2K"
    assert erase in text[text.rindex(Stage.CHECKING) :], "the line of the stage stays"
    assert Stage.CHECKING not in text[text.rindex("Ready after ") :]


def test_a_failed_start_ends_the_line() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with pytest.raises(ValueError, match="no model"), StartDisplay(console) as display:
        display.enter(Stage.LOADING)
        raise ValueError("no model")
    assert shown(console).endswith("\x1b[?25h") or shown(console).endswith("\x1b[2K"), "the cursor is shown again"


def test_a_closed_output_does_not_end_the_server() -> None:
    script = (
        "import os; from rich.console import Console; from server.startup.display import StartDisplay\n"
        "from tests.startup.test_display import start; start(StartDisplay(Console())); os.write(2, b'goes on')"
    )
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"goes on")


def test_the_log_gets_a_line_for_each_stage_and_fact(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    start(StartDisplay())
    assert caplog.messages == [*Stage, *SUMMARY.lines("http://127.0.0.1:8000")]


def test_a_json_log_has_fields_instead_of_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logs, "is_json", lambda: True)
    start(StartDisplay())
    assert caplog.messages == list(Stage)


def test_log_lines_go_to_the_standard_error_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.configure("INFO", "text")
        replaced = io.StringIO()
        monkeypatch.setattr("sys.stderr", replaced)
        logging.getLogger("server.test").info("hello")
        assert replaced.getvalue().endswith("INFO server.test: hello\n")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
