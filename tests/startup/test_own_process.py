"""The API's process imports neither torch nor, before the engine has been started, transformers."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from server.demo import DEMO_MODEL
from server.startup.own_process import hide_torch

SCRIPT = """
import sys
import server.app
assert "transformers" not in sys.modules, "transformers delays the start of the engine"
assert "torch" not in sys.modules
from server.startup.own_process import hide_torch
hide_torch()
from server.tokenizer import Tokenizer
tokenizer = Tokenizer.load(sys.argv[1])
text = tokenizer.decode(tokenizer._tokenizer("Hello, world.")["input_ids"], skip_special_tokens=True)
assert sys.modules["torch"] is None
print(text, tokenizer.has_chat_template)
"""


def test_a_tokenizer_needs_no_torch() -> None:
    command = [sys.executable, "-c", SCRIPT, str(DEMO_MODEL)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello, world. True\n", ""), done.stderr


def test_torch_that_is_imported_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = ModuleType("torch")
    monkeypatch.setitem(sys.modules, "torch", torch)
    hide_torch()
    assert sys.modules["torch"] is torch
