"""Any upload is a soft prompt or an InvalidPromptError, and uses memory in proportion to its size."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from prompt_store.adapters import Adapter
from prompt_store.errors import InvalidPromptError
from prompt_store.files.validation import validate
from prompt_store.types import BaseModelSpec, SoftPrompt

BASE = BaseModelSpec("org/tiny", 32, 2, 2, 8, 64, "float16")
PEAK_BYTES = 256 * 1024
"""Memory of a rejection or a small file, in addition to a multiple of the size of the files."""
BYTES_PER_BYTE = 40
"""The worst case of JSON: a list of small numbers or empty lists, as Python objects."""


def config(peft_type: str, task_type: str = "CAUSAL_LM", **more: Any) -> bytes:
    return json.dumps({"peft_type": peft_type, "task_type": task_type, "num_virtual_tokens": 3, **more}).encode()


def ones(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


VALID = [
    (config("PROMPT_TUNING"), save({"prompt_embeddings": ones(3, 32)}, metadata={"format": "pt"})),
    (config("CARTRIDGE", num_layers=2), save({"prompt_embeddings": ones(3, 64, dtype=np.float16)})),
    (config("CPT", cpt_token_ids=[1, 2, 3]), save({"prompt_embeddings": ones(3, 32, dtype=np.float64)})),
    (
        config("P_TUNING", "SEQ_CLS"),
        save(
            {
                "prompt_embeddings": ones(3, 32),
                "base_model.score.weight": ones(2, 32),
                "base_model.score.bias": ones(2),
            }
        ),
    ),
    (
        config("MULTITASK_PROMPT_TUNING", num_tasks=2, num_ranks=1),
        save(
            {
                "prompt_embeddings": ones(3, 32),
                "prefix_task_cols": ones(2, 3, 1),
                "prefix_task_rows": ones(2, 1, 32),
            }
        ),
    ),
]
FIELDS = [
    "peft_type", "task_type", "num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads", "num_tasks",
    "num_ranks", "num_transformer_submodules", "base_model_name_or_path", "inference_mode", "num_frozen_tokens",
]  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 3, 10**12, 2**60, -(10**400)])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(
        ["PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "LORA", "IA3", "SEQ_CLS", "CAUSAL_LM", "F64", "BF16", "I8"]
    ),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=6,
)


def measure(config_bytes: bytes, weights: bytes | Path, **options: Any) -> SoftPrompt | Adapter | InvalidPromptError:
    """Validate, and check the memory used."""
    tracemalloc.start()
    try:
        outcome: SoftPrompt | Adapter | InvalidPromptError = validate(
            config_bytes, weights, BASE, require_same_base=False, **options
        )
    except InvalidPromptError as error:
        str(error).encode()
        outcome = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    size = len(config_bytes) + (len(weights) if isinstance(weights, bytes) else weights.stat().st_size)
    assert peak < PEAK_BYTES + BYTES_PER_BYTE * size
    return outcome


def check(config_bytes: bytes, weights: bytes) -> bool:
    """Validate by bytes and by path, with F64 allowed and not; returns whether it was accepted."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(weights)
        file.flush()
        outcomes = [
            isinstance(measure(config_bytes, source, allow_float64=allow_float64), SoftPrompt)
            for source in (weights, Path(file.name))
            for allow_float64 in (False, True)
        ]
    assert outcomes[:2] == outcomes[2:]
    return outcomes[1]


def hostile(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_the_files_that_are_mutated_are_valid() -> None:
    assert all(check(*files) for files in VALID)


@hostile(80)
@given(st.binary(max_size=300), st.binary(max_size=300), st.sampled_from(VALID))
def test_any_bytes(config_bytes: bytes, weights: bytes, valid: tuple[bytes, bytes]) -> None:
    assert not check(config_bytes, valid[1])
    assert not check(valid[0], weights)
    assert not check(config_bytes, weights)


@hostile(150)
@given(
    st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_any_bytes_changed(valid: tuple[bytes, bytes], changes: list[tuple[int, int]]) -> None:
    for which in (0, 1):
        data = bytearray(valid[which])
        for position, value in changes:
            data[position % len(data)] = value
        check(*(bytes(data) if index == which else file for index, file in enumerate(valid)))


@hostile(60)
@given(st.sampled_from(VALID), st.integers(0, 10**6), st.binary(max_size=20))
def test_any_file_truncated_or_extended(valid: tuple[bytes, bytes], position: int, tail: bytes) -> None:
    check(valid[0], valid[1][: position % len(valid[1])] + tail)
    check(valid[0], valid[1] + tail)
    check(valid[0][: position % len(valid[0])] + tail, valid[1])


SHAPES = st.lists(st.sampled_from([0, 1, 3, 32, 2**31, 2**60, 2**63, 2**64]) | st.integers(), max_size=4)
OFFSETS = st.lists(st.sampled_from([0, 12, 384, 2**60, 2**64]) | st.integers(), max_size=3)


@hostile(200)
@given(st.sampled_from(VALID), st.data())
def test_any_header(valid: tuple[bytes, bytes], data: st.DataObject) -> None:
    length = struct.unpack("<Q", valid[1][:8])[0]
    header = json.loads(valid[1][8 : 8 + length])
    name = data.draw(st.sampled_from([key for key in header if key != "__metadata__"]))
    match data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "entry", "metadata"])):
        case "dtype":
            header[name]["dtype"] = data.draw(st.sampled_from(["F4", "F64", "BF16", "I64", "F8_E8M0", "X"]) | JSON)
        case "shape":
            header[name]["shape"] = data.draw(SHAPES | JSON)
        case "data_offsets":
            header[name]["data_offsets"] = data.draw(OFFSETS | JSON)
        case "name":
            header[data.draw(st.text(max_size=200))] = header.pop(name)
        case "entry":
            header[name] = data.draw(JSON)
        case "metadata":
            header["__metadata__"] = data.draw(JSON)
    text = json.dumps(header).encode()
    check(valid[0], struct.pack("<Q", len(text)) + text + valid[1][8 + length :])


@hostile(200)
@given(
    st.sampled_from(VALID),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), JSON, min_size=1, max_size=3),
)
@example(VALID[0], {"num_virtual_tokens": 10**12})
@example(VALID[0], {"peft_type": {}})
@example(VALID[4], {"num_tasks": 10**400, "num_ranks": 10**12})
def test_any_fields(valid: tuple[bytes, bytes], changes: dict[str, Any]) -> None:
    check(json.dumps(json.loads(valid[0]) | changes).encode(), valid[1])


CLAIMS = [
    {"prompt_embeddings": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}},
    {"prompt_embeddings": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 0]}},
    {"prompt_embeddings": {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]}},
    {"prompt_embeddings": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}},
    {"prefix_task_cols": {"dtype": "F32", "shape": [2**40, 0, 2**20], "data_offsets": [0, 0]}},
]


@pytest.mark.parametrize("header", CLAIMS, ids=lambda header: str(next(iter(header.values()))["shape"]))
@pytest.mark.parametrize("valid", VALID, ids=lambda files: json.loads(files[0])["peft_type"])
def test_false_sizes_in_a_header_use_no_memory(valid: tuple[bytes, bytes], header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    huge = json.dumps(json.loads(valid[0]) | {"num_virtual_tokens": 10**12}).encode()
    assert not check(huge, struct.pack("<Q", len(text)) + text)


LARGE = """
import json, math, resource, struct, sys
from pathlib import Path
import numpy as np
from prompt_store.types import BaseModelSpec
from prompt_store.files.validation import validate

path, dtype, element = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
shapes = {"prompt_embeddings": [1024, 8192], "prefix_task_cols": [2, 1024, 512], "prefix_task_rows": [2, 512, 8192]}
header, end = {}, 0
for name, shape in shapes.items():
    start, end = end, end + element * math.prod(shape)
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
text = json.dumps(header).encode()
with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + end)
    # Large factors that are never multiplied with each other: the products have to be checked one by one.
    large = struct.pack("<d", 1e30) if element == 8 else struct.pack("<f", 1e30)[2:]
    for name, index in (("prompt_embeddings", 0), ("prefix_task_cols", 512), ("prefix_task_rows", 8192)):
        file.seek(8 + len(text) + header[name]["data_offsets"][0] + element * index)
        file.write(large)
config = {"peft_type": "MULTITASK_PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 1024}
base = BaseModelSpec("tiny", 8192, 1, 1, 8, 4096, "bfloat16")
# The library allocates its work space once, here; with AVX-512 it needs none for small products.
np.ones((512, 512), np.float32) @ np.ones((512, 512), np.float32)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
used = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + (40 << 20), used + (40 << 20)))
prompt = validate(json.dumps(config).encode(), path, base, require_same_base=False, allow_float64=True)
print(prompt.num_tasks, path.stat().st_size >> 20)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="a limit that Linux has")
@pytest.mark.parametrize(("dtype", "element"), [("F64", 8), ("BF16", 2)])
def test_a_large_file_is_checked_in_40_mib(tmp_path: Path, dtype: str, element: int) -> None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path / "large", dtype, str(element)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", str(17 * element)]
