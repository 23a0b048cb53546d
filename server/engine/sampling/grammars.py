"""Structured output: masks of the tokens that keep a sequence's text within its grammar.

llguidance compiles grammars and computes masks. Constraints are untrusted, and some are made to exhaust the server,
so there are limits beyond llguidance's own:

- Each grammar is first compiled in another process (``grammar_trials``), which is killed if it takes too much time or
  memory. A grammar that passes is compiled here, in a thread with a deep stack, because the compiler is recursive.
- There are two compiling threads (lanes). A grammar that takes long starts again in the slow lane, so that it does
  not delay quick ones. In both lanes, tenants take turns.
- The processor time of masks is charged to each sequence; a sequence that spends too much fails alone.
- No text is forced in advance (``no_forcing``), because a short grammar can force a text of many thousand
  characters, which would be tokenised within a step.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer, regex_to_lark
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.engine.attention.transfers import queue_copy, to_device
from server.engine.background_jobs import BackgroundJobs
from server.engine.constraints import Constraint, ConstraintKind, TokenMatcher
from server.engine.sampling.grammar_check import STACK_BYTES, GrammarError, compile_grammar, error_of
from server.engine.sampling.grammar_trials import CancelledTrialError, GrammarTrials, TooSlowError
from server.engine.sampling.trial_process import Vocabulary, make_tokenizer
from server.engine.types import ErrorCode, RequestFailure

logger = logging.getLogger(__name__)

MAX_COMPILED = 64
"""Maximum number of cached compiled grammars. One takes up to 40 MB, but rarely more than 1 MB."""

MAX_COMPILED_BYTES = 256 * 1024 * 1024
"""Maximum memory of the cached grammars when they were compiled. In use, each grows by at most 10 to 40 MB."""

MAX_REFUSED = 64
"""Maximum number of remembered constraints that took too long to compile, so that each is tried once."""

MAX_WAITING = 256
"""Maximum number of different constraints of one tenant that are being compiled."""

MAX_WAITING_SLOW = 32
"""Maximum number of a tenant's constraints that wait in the slow lane."""

QUICK_SECONDS, SLOW_SECONDS = 0.05, 3.0
"""Maximum processor time to compile a grammar, in each lane. Most take 0.001 s, schemas of 64 KiB 0.2 s."""

BURST_SECONDS, TOKEN_SECONDS = 0.5, 0.002
"""Processor time for a sequence's masks: a budget for the whole sequence, and an allowance per token. A mask rarely
takes more than 0.001 s; with ambiguous grammars it takes longer with each token, up to a second."""

METERED_SECONDS = 0.01
"""If a step's masks take longer than this, those of the next step are computed and charged one by one."""

TOO_SLOW = RequestFailure(
    ErrorCode.CONSTRAINT,
    f"it takes more than {SLOW_SECONDS:g} seconds of processor time to compile: make it smaller",
)
TOO_MANY_SLOW = RequestFailure(
    ErrorCode.WAIT_TIMEOUT,
    f"it takes long to compile, and {MAX_WAITING_SLOW} such structures of this client wait already; try again later",
)
TOO_COSTLY = "it takes too long to find which tokens it allows: make it simpler and less ambiguous"

_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The layout of Python's ``json.dumps``; if white space is free, small models do not stop writing it."""

_END = "<|prelude-end-of-grammar|>"

_REGEX_SPECIAL = re.compile(r"([\\.+*?()|\[\]{}^$])")


class TooManyGrammarsError(Exception):
    """A tenant has reached its limit of constraints that are being compiled."""


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """The model's tokens, for grammars.

    Attributes:
        lowlevel: llguidance's tokenizer.
        hidden_end: An added end-of-sequence token for a model without one, which no sequence may choose.
        source: The data from which another process creates the same tokenizer.
    """

    lowlevel: LLTokenizer
    hidden_end: int | None
    source: Vocabulary


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A compiled grammar, of which sequences get copies, and its memory."""

    matcher: Matcher
    num_bytes: int


class Matcher:
    """One sequence's state in its grammar.

    Args:
        lowlevel: The sequence's llguidance matcher.
        vocabulary: The vocabulary of its grammar.
    """

    def __init__(self, lowlevel: LLMatcher, vocabulary: GrammarVocabulary) -> None:
        self.lowlevel = lowlevel
        self.vocabulary = vocabulary
        self._seconds_left = BURST_SECONDS

    def advance(self, token_id: int) -> None:
        """Advance by the sequence's next token."""
        begun = time.thread_time()
        self.lowlevel.consume_token(token_id)
        self.charge(time.thread_time() - begun - TOKEN_SECONDS)

    def charge(self, seconds: float) -> None:
        """Charge processor time to the sequence; if its budget is spent, it has failed permanently."""
        if self._seconds_left > 0:
            self._seconds_left = min(self._seconds_left - seconds, BURST_SECONDS)

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return self.error is None and self.lowlevel.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether only the end of the text may follow."""
        return self.lowlevel.is_stopped()

    @property
    def error(self) -> str | None:
        """The error after which no token can follow; None if there is none."""
        return TOO_COSTLY if self._seconds_left <= 0 else error_of(self.lowlevel)


class TokenMasks:
    """Masks of the allowed next tokens, for many sequences at once.

    llguidance computes masks in parallel, without the time of each. If that takes long, the following masks are
    computed one by one and charged to their sequences, until none of them takes long.
    """

    def __init__(self) -> None:
        self._is_metered = False

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    def allowed(self, matchers: SequenceOf[TokenMatcher], vocab_size: int, device: torch.device) -> torch.Tensor:
        """The allowed next tokens: [matchers, vocab_size] bool, on the device.

        A row has no token if its grammar is complete and the model has no end-of-sequence token, if no token
        satisfies the grammar, or if the grammar has failed (``error``).

        Args:
            matchers: At least one ``Matcher``, all from one compiler.
            vocab_size: Width of the logits.
            device: Device of the logits.
        """
        vocabulary: GrammarVocabulary = matchers[0].vocabulary
        bitmask = allocate_token_bitmask(len(matchers), vocabulary.lowlevel.vocab_size)
        if self._is_metered or len(matchers) == 1:
            self._is_metered = self._fill_metered(matchers, bitmask)
        else:
            begun = time.perf_counter()
            rows: list[tuple[LLMatcher, int]] = [(matcher.lowlevel, row) for row, matcher in enumerate(matchers)]
            fill_next_token_bitmask_par(self._executor, rows, bitmask)
            self._is_metered = time.perf_counter() - begun > METERED_SECONDS
        for row, matcher in enumerate(matchers):
            if matcher.error is not None:  # llguidance allows the end here
                bitmask[row] = 0
        # One bit per token is copied to the device.
        packed = queue_copy(torch.from_numpy(bitmask.view(np.uint8)), device)
        bits = packed[:, :, None] & to_device([1, 2, 4, 8, 16, 32, 64, 128], device, torch.uint8)
        allowed = bits.flatten(1)[:, :vocab_size] != 0
        if vocabulary.hidden_end is not None:
            allowed[:, vocabulary.hidden_end :] = False  # the tokenizer has no token behind it
        return allowed

    @staticmethod
    def _fill_metered(matchers: SequenceOf[TokenMatcher], bitmask: npt.NDArray[np.int32]) -> bool:
        """Compute and charge masks one by one; returns whether one of them took long."""
        longest = 0.0
        for row, matcher in enumerate(matchers):
            if matcher.error is None:
                begun = time.thread_time()
                fill_next_token_bitmask(matcher.lowlevel, bitmask, row)
                seconds = time.thread_time() - begun
                matcher.charge(seconds)
                longest = max(longest, seconds)
        return longest > TOKEN_SECONDS


class _Lane:
    """A compiling thread and its process for trials.

    Args:
        cpu_seconds: Maximum processor time to compile a grammar.
        on_ended: Called from the thread after each job.
    """

    def __init__(self, cpu_seconds: float, on_ended: Callable[[], None]) -> None:
        self.cpu_seconds = cpu_seconds
        # A result is the grammar or its error; None if the job was cancelled or has moved to another lane.
        self.jobs = BackgroundJobs[Constraint, _Compiled | RequestFailure | None](
            "grammar-compiler", on_ended=on_ended, stack_bytes=STACK_BYTES
        )
        self.trials: GrammarTrials | None = None


class GrammarCompiler:
    """Compiles constraints beside the step loop, and creates each sequence's matcher.

    Identical constraints are compiled once; the cache evicts the least recently used. All methods are called from the
    engine's thread; compiling has its own threads.

    Args:
        load_tokenizer: Loads the model's tokenizer; called once, from a compiling thread, for the first constraint.
            It may raise OSError or ValueError.
        vocab_size: Width of the logits.
        eos_token_ids: The model's end-of-sequence tokens.
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
        self._compiled: OrderedDict[Constraint, _Compiled] = OrderedDict()
        self._refused: OrderedDict[Constraint, RequestFailure] = OrderedDict()
        self._compiling: dict[Constraint, str] = {}
        self._vocabulary: GrammarVocabulary | None = None
        self._vocabulary_lock = threading.Lock()
        self._quick, self._slow = (_Lane(seconds, on_compiled) for seconds in (QUICK_SECONDS, SLOW_SECONDS))
        self._refused_again: list[tuple[Constraint, RequestFailure]] = []
        """Remembered refusals, for the next ``take_compiled``."""

    def matcher(self, constraint: Constraint, tenant: str = "") -> Matcher | None:
        """A matcher for a new sequence; None while the grammar is being compiled (see ``take_compiled``).

        Raises:
            TooManyGrammarsError: If too many of the tenant's constraints are being compiled.
        """
        known = self._compiled.get(constraint)
        if known is not None:
            self._compiled.move_to_end(constraint)
            return Matcher(known.matcher.lowlevel.deep_copy(), known.matcher.vocabulary)
        if constraint in self._compiling:
            return None
        if sum(owner == tenant for owner in self._compiling.values()) >= MAX_WAITING:
            raise TooManyGrammarsError(
                f"{MAX_WAITING} different structures of this client are already being compiled; try again later"
            )
        self._compiling[constraint] = tenant
        failure = self._refused.get(constraint)
        if failure is not None:
            self._refused.move_to_end(constraint)
            self._refused_again.append((constraint, failure))
            self._on_compiled()
        else:
            self._enqueue(self._quick, constraint, tenant)
        return None

    def take_compiled(self) -> list[tuple[Constraint, RequestFailure | None]]:
        """Constraints whose compilation has ended since the last call, each with its failure or None.

        A constraint without a failure has matchers at least until the next call.
        """
        while len(self._compiled) > MAX_COMPILED or self._num_bytes > MAX_COMPILED_BYTES:
            self._compiled.popitem(last=False)
        results = [*self._refused_again, *self._quick.jobs.take_ended(), *self._slow.jobs.take_ended()]
        self._refused_again = []
        ended: list[tuple[Constraint, RequestFailure | None]] = []
        for constraint, result in results:
            if result is None:
                continue
            self._compiling.pop(constraint, None)
            if isinstance(result, _Compiled):
                self._compiled[constraint] = result
                ended.append((constraint, None))
                continue
            if isinstance(result, BaseException):  # waiting sequences have to end
                logger.error("a grammar could not be compiled", exc_info=result)
                message = f"it cannot be compiled: {type(result).__name__}"
                result = RequestFailure(ErrorCode.CONSTRAINT, message)
            if result is TOO_SLOW:
                self._refused[constraint] = TOO_SLOW
                while len(self._refused) > MAX_REFUSED:
                    self._refused.popitem(last=False)
            ended.append((constraint, result))
        return ended

    def forget(self, constraint: Constraint) -> None:
        """Drop a compiled grammar, because the automaton that its matchers share has reached a limit."""
        self._compiled.pop(constraint, None)

    def abandon(self, constraint: Constraint) -> None:
        """Stop compiling a constraint, because no sequence waits for it."""
        if self._compiling.pop(constraint, None) is None:
            return
        for lane in (self._quick, self._slow):
            lane.jobs.cancel(constraint)
            if lane.trials is not None:
                lane.trials.interrupt()

    def close(self) -> None:
        """End the compiling threads and their processes."""
        for lane in (self._quick, self._slow):
            lane.jobs.stop()
            if lane.trials is not None:
                lane.trials.kill()
        for lane in (self._quick, self._slow):
            lane.jobs.close()
            if lane.trials is not None:
                lane.trials.release()

    @property
    def _num_bytes(self) -> int:
        return sum(compiled.num_bytes for compiled in self._compiled.values())

    def _enqueue(self, lane: _Lane, constraint: Constraint, tenant: str) -> None:
        lane.jobs.submit(
            constraint, lambda cancelled: self._compile(lane, constraint, tenant, cancelled), tenant=tenant
        )

    def _compile(
        self, lane: _Lane, constraint: Constraint, tenant: str, cancelled: threading.Event
    ) -> _Compiled | RequestFailure | None:
        """Compile a constraint, in the lane's thread; returns its error, or None if this lane has no result."""
        try:
            vocabulary = self._load_vocabulary()
            if lane.trials is None:
                lane.trials = GrammarTrials(vocabulary.source)
            lark = lark_of(constraint)
            num_bytes = lane.trials.try_out(lark, lane.cpu_seconds, cancelled)
            matcher = Matcher(compile_grammar(vocabulary.lowlevel, lark), vocabulary)
        except CancelledTrialError:
            return None
        except TooSlowError:
            return None if cancelled.is_set() else self._enqueue_slow(lane, constraint, tenant)
        except GrammarError as error:
            return RequestFailure(ErrorCode.CONSTRAINT, str(error))
        return _Compiled(matcher, num_bytes)

    def _enqueue_slow(self, lane: _Lane, constraint: Constraint, tenant: str) -> RequestFailure | None:
        if lane is self._slow:
            return TOO_SLOW
        if self._slow.jobs.num_waiting(tenant) >= MAX_WAITING_SLOW:
            return TOO_MANY_SLOW
        self._enqueue(self._slow, constraint, tenant)
        return None

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
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        source = Vocabulary(backend.to_str(), max(len(tokenizer), self._vocab_size), ends)
        return GrammarVocabulary(make_tokenizer(source), hidden_end, source)


def load_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerBase:
    """A model's tokenizer, for ``GrammarCompiler``; the model's own code is never run."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        model, revision=revision, trust_remote_code=False
    )
    return tokenizer


def lark_of(constraint: Constraint) -> str:
    """A constraint in llguidance's Lark syntax.

    Raises:
        GrammarError: If its text is not of its kind.
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
                raise GrammarError("a JSON schema must be an object")
            body = _json_grammar(schema, is_lenient=constraint.is_lenient)
    return f'{body}\n%llguidance {{"no_forcing": true}}\n'


def _json_grammar(schema: dict[str, object], *, is_lenient: bool) -> str:
    # Lenient: unsupported keywords are ignored, and oneOf is treated as anyOf.
    options = {**_LAYOUT, "lenient": is_lenient, "coerce_one_of": is_lenient}
    return f"start: %json {json.dumps({**schema, 'x-guidance': options})}"
