"""Hostile adapter files are refused, and any other change of a good one is an adapter or a fault."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from prompt_store.adapters import Adapter, AdapterLimits
from prompt_store.errors import InvalidPromptError
from prompt_store.files.lora.patterns import MAX_PATTERN_CHARS, Pattern, Text, UnsafePatternError
from prompt_store.files.validation import validate
from prompt_store.types import BaseModelSpec, ModuleShape

PREFIX = "base_model.model."
MODULE = "model.layers.0.self_attn.q_proj"
BASE = BaseModelSpec(
    "org/tiny",
    32,
    2,
    2,
    8,
    64,
    "bfloat16",
    modules={
        "model.embed_tokens": ModuleShape("embedding", 60, 32),
        "model.norm": ModuleShape("linear", 32, 32, "it is no linear layer"),
        "lm_head": ModuleShape("linear", 32, 60),
        **{
            f"model.layers.{layer}.self_attn.{name}": ModuleShape("linear", 32, 32)
            for layer in range(2)
            for name in ("q_proj", "k_proj")
        },
    },
    digests={"model.embed_tokens.weight": "0" * 64},
)
LIMITS = AdapterLimits(max_rank=16, max_bytes=1 << 16)
FIELDS: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
A, B = f"{PREFIX}{MODULE}.lora_A.weight", f"{PREFIX}{MODULE}.lora_B.weight"
PEAK_BYTES, BYTES_PER_BYTE = 1 << 20, 60
"""Memory of a check, beside a multiple of the size of the files."""


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


GOOD = {A: ones(4, 32), B: ones(32, 4)}
Files = tuple[bytes, bytes]


def files(fields: object = FIELDS, tensors: dict[str, Any] | bytes = GOOD) -> Files:
    config = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return config, tensors if isinstance(tensors, bytes) else save(tensors)


def with_header(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def outcome(config: bytes, weights: bytes) -> Adapter | InvalidPromptError:
    """Validate, and check the memory used and the length of messages."""
    tracemalloc.start()
    found: object
    try:
        found = validate(config, weights, BASE, require_same_base=False, limits=LIMITS)
    except InvalidPromptError as error:
        found = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < PEAK_BYTES + BYTES_PER_BYTE * (len(config) + len(weights))
    if isinstance(found, InvalidPromptError):
        assert found.faults
        assert all(len(fault.message) < 2000 for fault in found.faults)
        return found
    assert isinstance(found, Adapter)
    return found


PATTERNS = [
    r"([a-z._0-9]+)+X",
    r"(.*)*$",
    r"(a|a)*b",
    r"(a|aa)+$",
    r"(x+x+)+y",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"(.)\1",
    r"(?=.*q).*(?=.*p).*X",
    r"(?R)",
    r"(?(1)a|b)",
    "((((((((((a?){50}){50}){50}){50}){50}){50}){50}){50}){50}){50}",
    "(" * 200 + "a" + ")*" * 200,
    "a" * (MAX_PATTERN_CHARS + 1),
    "[" * 300,
    "(?i)Q",
    "\\",
    "q_proj\x00",
    "\ud800",
]
"""Patterns that could take long, or are none."""


def hostile_files() -> Iterator[tuple[str, Files]]:
    """Files that must be refused, by a name."""
    config, weights = files()
    length = struct.unpack("<Q", weights[:8])[0]
    header, data = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    # Not safetensors, or damaged.
    pickle = b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."
    for name, content in {
        "nothing": b"",
        "a pickle": pickle,
        "a zip": b"PK\x03\x04" + bytes(60),
        "half": weights[: len(weights) // 2],
        "one byte less": weights[:-1],
        "one byte more": weights + b"\0",
        "no header": struct.pack("<Q", 0),
        "a header of 2**63": struct.pack("<Q", 2**63) + weights[8:],
        "a header over 1 MiB": with_header(b" " * (1 << 20) + json.dumps(header).encode(), data),
        "a header that is a list": with_header([], data),
        "a deep header": with_header(b'{"a":' * 5000 + b"1" + b"}" * 5000, data),
    }.items():
        yield f"weights: {name}", (config, content)
    entries: dict[str, list[Any]] = {
        "dtype": ["F64", "I8", "F8_E4M3", "X", None, 3],
        "shape": [[4, 2**40], [2**62, 2**62], [-4, 32], [4], [], [0, 32], [4.0, 32], "4"],
        "data_offsets": [[0, 2**62], [512, 0], [-1, 512], [0], None, [0, 513]],
    }
    for field, values in entries.items():
        for value in values:
            yield f"{field}: {value}", (config, with_header(header | {A: header[A] | {field: value}}, data))
    # The configuration.
    for name, content in {
        "nothing": b"",
        "no JSON": b"{",
        "a list": b"[]",
        "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "over 1 MiB": b" " * (1 << 20) + config,
        "a long number": config[:-1] + b', "r": ' + b"9" * 10_000 + b"}",
        "not UTF-8": b'{"peft_type": "\xff"}',
        "equal names": config[:-1] + b', "r": 4}',
    }.items():
        yield f"configuration: {name}", (content, weights)
    changes: list[dict[str, Any]] = [
        {"peft_type": "ADALORA"},
        {"task_type": "SEQ_2_SEQ_LM"},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["embed_tokens"]},
        {"use_dora": True},
        {"lora_bias": True},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["a"]},
        {"trainable_token_indices": [1]},
        *({"init_lora_weights": kind} for kind in ("pissa", "olora", "corda", "loftq", "../../etc/passwd")),
        *({"r": rank} for rank in (0, -1, 2**31, 10**400, 4.5, "4", None, True, [4], 5)),
        *({"lora_alpha": alpha} for alpha in (float("nan"), float("inf"), -float("inf"), 10**400, 1e300, "8", None)),
        *({"rank_pattern": {pattern: 4}} for pattern in PATTERNS),
        *({"alpha_pattern": {pattern: 4}} for pattern in PATTERNS),
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": {f"{index:05}": 4 for index in range(5000)}},
        {"alpha_pattern": {f"{index:04}" + "a?" * 250: 4 for index in range(4096)}},
    ]
    for change in changes:
        yield f"{json.dumps(change)[:60]}", files(FIELDS | change)
    # Tensors.
    nan, infinity = ones(4, 32), ones(4, 32)
    nan[1, 1], infinity[3, 31] = np.nan, np.inf
    wide = PREFIX + "x." * 2000
    tensors: dict[str, dict[str, Any]] = {
        "no A": {B: GOOD[B]},
        "no B": {A: GOOD[A]},
        "none": {},
        "NaN": GOOD | {A: nan},
        "infinity": GOOD | {A: infinity},
        "beyond bfloat16": GOOD | {A: ones(4, 32) * np.float32(3.4e38)},
        "integers": GOOD | {A: ones(4, 32, dtype=np.int32)},
        "a wrong input": GOOD | {A: ones(4, 31)},
        "a wrong output": GOOD | {B: ones(33, 4)},
        "empty": GOOD | {A: ones(0, 32)},
        "one dimension": GOOD | {B: ones(128)},
        "three dimensions": GOOD | {A: ones(1, 4, 32)},
        "a large rank": {A: ones(17, 32), B: ones(32, 17)},
        "another module": {A.replace("q_proj", "v_proj"): GOOD[A], B.replace("q_proj", "v_proj"): GOOD[B]},
        "another layer": {A.replace("layers.0", "layers.9"): GOOD[A], B.replace("layers.0", "layers.9"): GOOD[B]},
        "a norm": {f"{PREFIX}model.norm.lora_{part}.weight": GOOD[name] for part, name in (("A", A), ("B", B))},
        "a longer name": {wide + A: GOOD[A], wide + B: GOOD[B]},
        "a base weight": GOOD | {f"{PREFIX}{MODULE}.base_layer.weight": ones(32, 32)},
        "other embeddings": GOOD | {f"{PREFIX}model.embed_tokens.weight": ones(60, 32)},
        "a head": GOOD | {f"{PREFIX}score.weight": ones(2, 32)},
        "an IA3": GOOD | {f"{PREFIX}{MODULE}.ia3_l": ones(32, 1)},
        "a magnitude": GOOD | {f"{PREFIX}{MODULE}.lora_magnitude_vector": ones(32)},
        "no prefix": {A.removeprefix(PREFIX): GOOD[A], B.removeprefix(PREFIX): GOOD[B]},
        "a path": GOOD | {"../../etc/passwd": ones(1)},
        "an embedding's": {f"{PREFIX}model.embed_tokens.lora_A.weight": ones(4, 60)},
        "a soft prompt's": {"prompt_embeddings": ones(4, 32)},
        "1,000 unknown": GOOD | {f"{PREFIX}x{index}.lora_A.weight": ones(1, 1) for index in range(1000)},
    }
    for name, changed in tensors.items():
        yield f"tensors: {name}", files(FIELDS, changed)


HOSTILE = dict(hostile_files())


def test_the_file_that_is_changed_is_good() -> None:
    assert isinstance(outcome(*files()), Adapter)


def test_every_hostile_file_is_refused() -> None:
    assert len(HOSTILE) > 100
    accepted = [name for name, content in HOSTILE.items() if isinstance(outcome(*content), Adapter)]
    assert accepted == []


@pytest.mark.parametrize("source", PATTERNS)
def test_hostile_patterns_are_no_patterns(source: str) -> None:
    with pytest.raises(UnsafePatternError):
        Pattern(source)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet="aq_.*+?()[]{}|^$\\d,12", max_size=60))
def test_any_pattern_is_matched_as_re_does_or_refused(source: str) -> None:
    try:
        pattern = Pattern(source)
    except UnsafePatternError:
        return
    name = "a.q_a1.qq"
    assert pattern.matches_whole(Text(name)) is bool(re.fullmatch(source, name))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_any_bytes_changed(changes: list[tuple[int, int]], of_weights: bool) -> None:
    content = [bytearray(file) for file in files()]
    changed = content[of_weights]
    for position, value in changes:
        changed[position % len(changed)] = value
    outcome(*map(bytes, content))
