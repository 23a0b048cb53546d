from __future__ import annotations

import io
import json
import pickle
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from prompt_store.errors import InvalidPromptError
from prompt_store.files.tensors import MAX_HEADER_BYTES, read_tensors
from prompt_store.types import TensorData

Read = Callable[[bytes], dict[str, TensorData]]

VALID = save({"prompt_embeddings": np.arange(24, dtype=np.float32).reshape(3, 8)}, metadata={"format": "pt"})


def archive(header: Mapping[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def saved_by_torch(*, legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"prompt_embeddings": torch.ones(3, 8)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@pytest.fixture(params=["bytes", "path"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Read:
    """Read from memory and from a file; both accept and reject the same."""

    def run(data: bytes) -> dict[str, TensorData]:
        if request.param == "bytes":
            return read_tensors(data)
        path = tmp_path / "weights"
        path.write_bytes(data)
        return read_tensors(path)

    return run


def refusal(read: Read, data: bytes) -> tuple[str, str]:
    with pytest.raises(InvalidPromptError) as caught:
        read(data)
    (fault,) = caught.value.faults
    return fault.code, fault.message


def test_reads_all_tensors_byte_for_byte(read: Read) -> None:
    written = {
        "half": torch.ones(3, dtype=torch.float16),
        "brain": torch.ones(2, 2, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "double": torch.full((), 2.5, dtype=torch.float64),
        "none": torch.ones(0, 4),
        "float8": torch.ones(5).to(torch.float8_e4m3fn),
    }
    found = read(save_torch(written))
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "half": ("F16", (3,)),
        "brain": ("BF16", (2, 2)),
        "flags": ("BOOL", (3,)),
        "double": ("F64", ()),
        "none": ("F32", (0, 4)),
        "float8": ("F8_E4M3", (5,)),
    }
    for name, value in written.items():
        assert bytes(found[name].data) == value.flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "data", [saved_by_torch(legacy=False), saved_by_torch(legacy=True), pickle.dumps({}), b"PK\x03\x04", b"\x80"]
)
def test_a_pickle_is_named_and_never_loaded(read: Read, data: bytes) -> None:
    code, message = refusal(read, data)
    assert code == "pickle_file"
    assert "re-save" in message
    assert "safe_serialization=True" in message


def test_a_header_that_only_looks_like_a_pickle_is_read(read: Read) -> None:
    header = json.dumps({"a": tensor([0], 0, 0)}).encode().ljust(0x80)
    assert read(struct.pack("<Q", len(header)) + header)["a"].shape == (0,)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"\0" * 8,
        VALID[:-1],
        VALID[:20],
        VALID + b"x",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": NaN',
        archive({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, b"1234"),
        archive({"a": tensor([1], 4, 8)}, b"12345678"),
        archive({"a": tensor([2**62, 4], 0, 4)}, b"1234"),
        archive({"a": tensor([-1], 0, 4)}, b"1234"),
        archive({"a": tensor([2], 0, 4)}, b"1234"),
        archive({"a": tensor([1], 0, 4, "F99")}, b"1234"),
        archive({"__metadata__": {"format": 1}}),
    ],
)
def test_malformed_files_are_rejected(read: Read, data: bytes) -> None:
    assert refusal(read, data)[0] == "invalid_safetensors"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 10640\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"<html><body></body></html>", "a web page"),
        (b"<html", "a web page"),
    ],
)
def test_common_other_files_are_named(read: Read, data: bytes, words: str) -> None:
    code, message = refusal(read, data)
    assert code == "invalid_safetensors"
    assert words in message


def test_a_large_header_is_rejected_before_it_is_parsed(read: Read) -> None:
    many = {str(index): tensor([0], 0, 0) for index in range(MAX_HEADER_BYTES // 40)}
    assert refusal(read, archive(many))[0] == "header_too_large"


def test_a_truncated_file_is_reported_with_both_sizes(read: Read) -> None:
    assert f"the whole file has {len(VALID[:20])}" in refusal(read, VALID[:20])[1]


def test_reading_a_path_uses_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(save({"prompt_embeddings": np.ones((1024, 4096), np.float32)}))
    tracemalloc.start()
    try:
        tensors = read_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert tensors["prompt_embeddings"].data[:4] == struct.pack("<f", 1.0)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), keep=st.integers(0, len(VALID)), at=st.integers(0, len(VALID)))
@example(data=b"", keep=len(VALID), at=len(VALID))
def test_mutated_files_are_read_or_rejected(read: Read, data: bytes, keep: int, at: int) -> None:
    try:
        tensors = read(VALID[:at] + data + VALID[at:keep])
    except InvalidPromptError:
        return
    assert sum(len(t.data) for t in tensors.values()) <= len(VALID) + len(data)
