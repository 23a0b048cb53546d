"""A tokenizer for the tests' tiny models, and helpers that follow a grammar with it."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from server.engine.constraints import Constraint, ConstraintKind
from server.engine.sampling.grammars import GrammarCompiler, Matcher, TokenMasks, load_tokenizer
from tests.support.engine.harness import VOCABULARY

END = "<end>"
END_ID = 0


def save_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Printable ASCII, a line end and a few longer tokens; smaller than the model's vocabulary."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    merges = [("t", "r"), ("tr", "u"), ("tru", "e"), ("Ġ", "a"), ('"', ":"), ("a", "b"), ("ab", "ab"), ("1", "2")]
    vocabulary = {END: END_ID, "<other>": 1}
    for token in [*letters, *("".join(pair) for pair in merges)]:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([END, "<other>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    assert len(fast) < VOCABULARY
    fast.save_pretrained(path)
    return fast


def constraint(kind: str, text: str = "", **more: bool) -> Constraint:
    return Constraint(kind=ConstraintKind(kind), text=text, **more)


def make_compiler(
    path: Path, *, eos_token_ids: tuple[int, ...] = (END_ID,), vocab_size: int = VOCABULARY
) -> GrammarCompiler:
    return GrammarCompiler(
        lambda: load_tokenizer(str(path), None), vocab_size=vocab_size, eos_token_ids=eos_token_ids
    )


def compiled(compiler: GrammarCompiler, wanted: Constraint) -> Matcher:
    """A matcher of a constraint that can be compiled."""
    matcher = compiled_or_error(compiler, wanted)
    assert isinstance(matcher, Matcher), matcher
    return matcher


def compiled_or_error(compiler: GrammarCompiler, wanted: Constraint) -> Matcher | str:
    """A matcher, or the constraint's error."""
    matcher = compiler.matcher(wanted)
    deadline = time.monotonic() + 60
    while matcher is None:
        assert time.monotonic() < deadline
        for ended, failure in compiler.take_compiled():
            assert ended == wanted
            if failure is not None:
                return failure.message
        matcher = compiler.matcher(wanted)
        time.sleep(0.0005)
    return matcher


def allowed_ids(masks: TokenMasks, matcher: Matcher, vocab_size: int = VOCABULARY) -> list[int]:
    import torch

    return masks.allowed([matcher], vocab_size, torch.device("cpu"))[0].nonzero()[:, 0].tolist()


def follow(matcher: Matcher, rng: random.Random, *, longest: int = 400, patience: int = 30) -> list[int]:
    """Random allowed tokens until nothing may follow; after ``patience`` tokens, the end as soon as it is allowed."""
    masks = TokenMasks()
    token_ids: list[int] = []
    while not matcher.is_finished and len(token_ids) < longest:
        allowed = allowed_ids(masks, matcher)
        if not allowed:
            break
        token = END_ID if END_ID in allowed and len(token_ids) > patience else rng.choice(allowed)
        matcher.advance(token)
        token_ids.append(token)
    return token_ids
