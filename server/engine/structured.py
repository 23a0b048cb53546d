"""Structured output: which tokens a sequence may choose next, so that its text follows a grammar.

llguidance keeps the grammars and says what may follow. Constraints come from outside, and some of them are bombs, so
they are held by its limits and by three habits: they are compiled in threads of their own, with deep stacks, for the
compiler recurses through rules; the first mask of each is computed there, too, since what is too large fails there
first; and no text is forced in advance (``no_forcing``), since a grammar of a few characters can force a text of many
thousand, which would be tokenised within a step.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from queue import Empty, SimpleQueue

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.engine.constraints import Constraint, ConstraintKind, TokenMatcher
from server.engine.transfers import queue_copy, to_device

MAX_COMPILED = 64
"""Compiled grammars that are kept for later sequences; one takes up to 40 MB, and seldom more than one."""

MAX_ERROR_CHARS = 500
"""Of what llguidance says about a grammar: it quotes it."""

NO_WAY_ON = "no token of the model can go on as it demands"
"""What is wrong where nothing can satisfy a constraint, or nothing that the model's tokens can write."""

LIMITS = LLParserLimits(
    # 1 to 2 kB each; what has more of them is an automaton that nobody meant.
    max_lexer_states=20_000,
    # About 7 ms of one mask.
    step_lexer_fuel=100_000,
    verbose_errors=False,
)

_NUM_THREADS = 2
"""Enough that one large grammar does not stand before all others."""

_STACK_BYTES = 256 * 1024 * 1024
"""Address space, not memory. Rules in a chain overflow 8 MiB at some thousand of them; a text of 64 KiB has room for
ten thousand at most, which take a tenth of this."""

_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written as Python's ``json.dumps`` does: where white space is free, small models do not stop writing it."""

_END = "<|prelude-end-of-grammar|>"

_REGEX_SPECIAL = re.compile(r"([\\.+*?()|\[\]{}^$])")


class GrammarError(Exception):
    """A constraint cannot be used: it is no grammar, or too large, or nothing can satisfy it."""


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """The model's tokens as grammars see them.

    Attributes:
        lowlevel: llguidance's tokenizer.
        hidden_end: The token that stands for the end in a model without one; no sequence may have it.
    """

    lowlevel: LLTokenizer
    hidden_end: int | None


class Matcher:
    """Where one sequence stands in its grammar.

    Args:
        lowlevel: llguidance's matcher, which is this sequence's own.
        vocabulary: What it was compiled with.
    """

    def __init__(self, lowlevel: LLMatcher, vocabulary: GrammarVocabulary) -> None:
        self.lowlevel = lowlevel
        self.vocabulary = vocabulary

    def advance(self, token_id: int) -> None:
        """Take the sequence's next token."""
        self.lowlevel.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return not self.lowlevel.is_error() and self.lowlevel.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow but the end."""
        return self.lowlevel.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further; None while it can."""
        return _error_of(self.lowlevel)


class TokenMasks:
    """Which tokens may come next, for many sequences at once."""

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    def allowed(self, matchers: SequenceOf[TokenMatcher], vocab_size: int, device: torch.device) -> torch.Tensor:
        """Tokens that may come next: [matchers, vocab_size] of bool, on the device.

        A row has none where its grammar is complete and the model has no end of sequence, where no token can go on,
        and where the grammar has failed, which its ``error`` tells.

        Args:
            matchers: At least one ``Matcher``, all of one compiler.
            vocab_size: Width of the logits.
            device: Where they are.
        """
        own: list[LLMatcher] = [matcher.lowlevel for matcher in matchers]
        vocabulary: GrammarVocabulary = matchers[0].vocabulary
        bitmask = allocate_token_bitmask(len(own), vocabulary.lowlevel.vocab_size)
        fill_next_token_bitmask_par(self._executor, [(lowlevel, row) for row, lowlevel in enumerate(own)], bitmask)
        for row, lowlevel in enumerate(own):
            if lowlevel.is_error():  # llguidance allows the end there
                bitmask[row] = 0
        # One bit a token crosses to the device.
        packed = queue_copy(torch.from_numpy(bitmask.view(np.uint8)), device)
        bits = packed[:, :, None] & to_device([1, 2, 4, 8, 16, 32, 64, 128], device, torch.uint8)
        allowed = bits.flatten(1)[:, :vocab_size] != 0
        if vocabulary.hidden_end is not None:
            allowed[:, vocabulary.hidden_end :] = False  # nothing of the tokenizer's is behind it
        return allowed


class GrammarCompiler:
    """Compiles constraints beside the steps and gives each sequence a matcher of its own.

    Identical constraints are compiled once; the least recently used are forgotten first. All methods are called from
    the engine's thread; only the compiling happens elsewhere.

    Args:
        load_tokenizer: Loads the model's tokenizer; called once, from a compiling thread, when the first constraint
            comes. It may raise OSError or ValueError.
        vocab_size: Width of the logits.
        eos_token_ids: The model's ends of sequence.
        on_compiled: Called from a compiling thread after each grammar, to wake the engine.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], PreTrainedTokenizerBase],
        *,
        vocab_size: int,
        eos_token_ids: SequenceOf[int],
        on_compiled: Callable[[], None] = lambda: None,
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._on_compiled = on_compiled
        self._compiled: OrderedDict[Constraint, Matcher] = OrderedDict()
        self._compiling: set[Constraint] = set()
        self._done: SimpleQueue[tuple[Constraint, Future[Matcher]]] = SimpleQueue()
        self._vocabulary: GrammarVocabulary | None = None
        self._vocabulary_lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> Matcher | None:
        """A new sequence's matcher, or None where the grammar is being compiled; ``take_compiled`` will tell."""
        template = self._compiled.get(constraint)
        if template is not None:
            self._compiled.move_to_end(constraint)
            return Matcher(template.lowlevel.deep_copy(), template.vocabulary)
        if constraint not in self._compiling:
            self._compiling.add(constraint)
            future = self._executor.submit(self._compile, constraint)
            future.add_done_callback(lambda done: self._announce(constraint, done))
        return None

    def take_compiled(self) -> list[tuple[Constraint, str | None]]:
        """Constraints whose compiling has ended since the last call, each with what is wrong with it or None.

        Those that are right have matchers at least until the next call.
        """
        while len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        ended: list[tuple[Constraint, str | None]] = []
        while True:
            try:
                constraint, future = self._done.get_nowait()
            except Empty:
                return ended
            self._compiling.discard(constraint)
            error = future.exception()
            if error is None:
                self._compiled[constraint] = future.result()
            ended.append((constraint, None if error is None else str(error)))

    def forget(self, constraint: Constraint) -> None:
        """Compile it anew for the next sequence: the automaton that its matchers share has reached a limit."""
        self._compiled.pop(constraint, None)

    def close(self) -> None:
        """End the compiling threads."""
        if "_executor" in self.__dict__:
            self._executor.shutdown(wait=True, cancel_futures=True)

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar-compiler")
        # The stack size is a setting of the process, for threads that are started from here on.
        usual = threading.stack_size(_STACK_BYTES)
        try:
            barrier = threading.Barrier(_NUM_THREADS)
            for _ in range(_NUM_THREADS):
                executor.submit(barrier.wait)
        finally:
            threading.stack_size(usual)
        return executor

    def _announce(self, constraint: Constraint, future: Future[Matcher]) -> None:
        self._done.put((constraint, future))
        self._on_compiled()

    def _compile(self, constraint: Constraint) -> Matcher:
        """Compile a constraint, in a compiling thread.

        Raises:
            GrammarError: If it cannot be used.
        """
        vocabulary = self._load_vocabulary()
        lowlevel = LLMatcher(vocabulary.lowlevel, lark_of(constraint), log_level=0, limits=LIMITS)
        template = Matcher(lowlevel, vocabulary)
        trial = Matcher(lowlevel.deep_copy(), vocabulary)
        if template.error is None:
            trial.lowlevel.compute_bitmask()
        error = template.error or trial.error
        if error is not None:
            raise GrammarError(error)
        return template

    def _load_vocabulary(self) -> GrammarVocabulary:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            return self._vocabulary

    def _make_vocabulary(self) -> GrammarVocabulary:
        try:
            tokenizer = self._load_tokenizer()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise GrammarError(f"the model's tokenizer cannot be loaded: {error}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise GrammarError(
                f"structured output needs a fast tokenizer, and the model's is a {type(tokenizer).__name__}"
            )
        known = min(len(tokenizer), self._vocab_size)
        ends = [token_id for token_id in self._eos_token_ids if token_id < known]
        hidden_end = None
        if not ends:  # llguidance needs one
            tokenizer.add_tokens([AddedToken(_END, special=True)], special_tokens=True)
            hidden_end = tokenizer.get_vocab()[_END]
            ends = [hidden_end]
        lowlevel = from_tokenizer(tokenizer, n_vocab=max(len(tokenizer), self._vocab_size), eos_token=ends)
        return GrammarVocabulary(lowlevel, hidden_end)


def load_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerBase:
    """A model's tokenizer, for ``GrammarCompiler``; code that came with the model is never run."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        model, revision=revision, trust_remote_code=False
    )
    return tokenizer


def lark_of(constraint: Constraint) -> str:
    """A constraint as llguidance's dialect of Lark.

    Raises:
        GrammarError: If its text is not what its kind says.
    """
    text = constraint.text
    match constraint.kind:
        case ConstraintKind.GRAMMAR:
            body = text
        case ConstraintKind.REGEX:
            body = f"start: /{regex_to_lark(text)}/"
        case ConstraintKind.CHOICE:
            choices = "|".join(_REGEX_SPECIAL.sub(r"\\\1", choice) for choice in json.loads(text))
            body = f"start: /{regex_to_lark(choices, '')}/"
        case ConstraintKind.JSON_OBJECT:
            body = _json_grammar({"type": "object"}, is_lenient=False)
        case ConstraintKind.JSON_SCHEMA:
            schema = json.loads(text)
            if not isinstance(schema, dict):
                raise GrammarError("a JSON schema has to be an object")
            body = _json_grammar(schema, is_lenient=constraint.is_lenient)
    return f'{body}\n%llguidance {{"no_forcing": true}}\n'


def _json_grammar(schema: dict[str, object], *, is_lenient: bool) -> str:
    # Lenient: what llguidance does not know is left out, and oneOf is taken for anyOf.
    options = {**_LAYOUT, "lenient": is_lenient, "coerce_one_of": is_lenient}
    return f"start: %json {json.dumps({**schema, 'x-guidance': options})}"


def _error_of(lowlevel: LLMatcher) -> str | None:
    if not lowlevel.is_error():
        return None
    # What stands before the quoted grammar and the parser's state.
    text = " ".join(re.split(r"\n +1 \| |\n<", lowlevel.get_error(), maxsplit=1)[0].split())
    if text.startswith("NoExtension"):
        return NO_WAY_ON
    if len(text) > MAX_ERROR_CHARS:  # it quotes the constraint in the middle
        text = f"{text[: MAX_ERROR_CHARS // 2]} ... {text[5 - MAX_ERROR_CHARS // 2 :]}"
    return text or "it is too complex"
