"""Fixtures of the tests of grammars: a tokenizer, and compilers for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.sampling.grammars import GrammarCompiler
from tests.support.engine.grammars import make_compiler, save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def compiler(folder: Path) -> Iterator[GrammarCompiler]:
    compiler = make_compiler(folder)
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def endless(folder: Path) -> Iterator[GrammarCompiler]:
    """For a model without an end of sequence."""
    compiler = make_compiler(folder, eos_token_ids=())
    yield compiler
    compiler.close()
