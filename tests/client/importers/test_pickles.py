"""The restricted reader of pickles: what it accepts, and that nothing in a file is ever run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.client.importers.kinds import ImportFileError
from server.client.importers.pickles import MAX_OPCODES, PickleRefusedError, load
from server.client.importers.torch_files import read_torch_file


def saved(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "file.pt"
    torch.save(content, path)
    return path


def repacked(path: Path, replaced: dict[str, bytes], **options: Any) -> Path:
    """The archive with other members."""
    out = path.with_name("other.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            short = info.filename.partition("/")[2]
            data = replaced.get(short, source.read(info))
            target.writestr(info.filename, data, **options)
    return out


def with_pickle(tmp_path: Path, data: bytes) -> Path:
    return repacked(saved(tmp_path, torch.zeros(2, 2)), {"data.pkl": data})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_every_dtype_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 7).to(dtype)
    read = read_torch_file(saved(tmp_path, tensor))
    assert isinstance(read, np.ndarray)
    assert np.array_equal(read, tensor.float().numpy())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[1:4],
        lambda x: x[:, ::2],
        lambda x: x[2],
        lambda x: x[:0],
        lambda x: x.permute(1, 0)[3:, 1:],
        lambda x: x.reshape(-1)[7:19].view(3, 4),
        lambda x: x[0, 0],
    ],
)
def test_views_are_read_as_they_are(tmp_path: Path, view: Any) -> None:
    tensor = view(torch.arange(42.0).reshape(6, 7))
    read = read_torch_file(saved(tmp_path, tensor))
    assert isinstance(read, np.ndarray)
    assert read.shape == tuple(tensor.shape)
    assert np.array_equal(read, tensor.numpy())


def test_containers_parameters_and_shared_storages_are_read(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    content = {
        "list": [shared, shared[2:]],
        "tuple": (torch.ones(1), None, True, 2**70, "text", 1.5),
        "ordered": OrderedDict(a=torch.zeros(2)),
        "parameter": torch.nn.Parameter(torch.full((3,), 2.0)),
        "parameters": torch.nn.ParameterList([torch.nn.Parameter(torch.full((1,), float(i))) for i in range(12)]),
    }
    read: Any = read_torch_file(saved(tmp_path, content))
    assert [item.tolist() for item in read["list"]] == [shared.tolist(), shared[2:].tolist()]
    assert read["tuple"][1:] == (None, True, 2**70, "text", 1.5)
    assert read["ordered"]["a"].tolist() == [0, 0]
    assert read["parameter"].tolist() == [2, 2, 2]
    assert [item.tolist() for item in read["parameters"]] == [[float(i)] for i in range(12)]


class Evil:
    def __init__(self, function: Any, *arguments: object) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> Any:
        return self._reduced


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "make",
    [
        lambda path: Evil(os.system, f"touch {path}"),
        lambda path: Evil(eval, f"open({str(path)!r}, 'w')"),
        lambda path: Evil(getattr, "text", "format"),
        lambda path: {"a": [Evil(open, str(path), "w")]},
        lambda _: Path("x"),
        lambda _: OrderedDict(a=1).items,
        lambda _: torch.float32,
        lambda _: np.zeros(3),
        lambda _: b"bytes",
        lambda _: frozenset({1}),
        lambda _: torch.nn.Linear(1, 1),
    ],
)
def test_a_pickle_with_anything_else_is_refused_and_not_run(tmp_path: Path, make: Any, protocol: int) -> None:
    victim = tmp_path / "touched"
    path = with_pickle(tmp_path, pickle.dumps(make(victim), protocol))
    with pytest.raises(ImportFileError, match="refused"):
        read_torch_file(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02]",
        b"\x80\x02]].",
        b"\x80\x02t.",
        b"\x80\x02u.",
        b"\x80\x02}]h\x05.",
        b"\x80\x02}K\x01s.",
        b"\x80\x02]]\x86R.",
        b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00lso.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n(K\x01K\x02tR.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02]Q.",
        b"\x80\x02K\x01K\x02b.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02}](K\x01K\x02u.",
        b"\x80\x02(K\x01K\x02e.",
        b"\x80\x02ctorch.nn.modules.container\nParameterList\n)\x81}X\x0b\x00\x00\x00_parameters}X\x01\x00\x00\x00xNssb.",
        b"\xff\xff\xff",
    ],
)
def test_damaged_pickles_are_refused(data: bytes) -> None:
    builders: dict[str, Any] = {"collections.OrderedDict": dict, "torch._utils._rebuild_tensor_v2": lambda a, b: None}
    with pytest.raises(PickleRefusedError):
        load(data, builders, {"torch.FloatStorage"}, refuse)


def refuse(persistent_id: object) -> object:
    raise PickleRefusedError(f"no storage {persistent_id}")


def test_long_pickles_end() -> None:
    with pytest.raises(PickleRefusedError, match="opcodes"):
        load(b"\x80\x02" + b"N" * (MAX_OPCODES + 5) + b".", {}, (), lambda _: None)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((4, 4), (4, 1), 1), ((1000000, 1000000), (0, 0), 0), ((2,), (-1,), 0), ((2,), (1, 1), 0), ((True,), (1,), 0)],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path, size: Any, stride: Any, offset: int) -> None:
    path = saved(tmp_path, torch.zeros(4, 4))
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        original = archive.read(name)
    assert b"FloatStorage" in original

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, OrderedDict())

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 16) if isinstance(obj, Storage) else None

    out = io.BytesIO()
    Pickler(out, 2).dump(Rebuilt())
    with pytest.raises(ImportFileError, match="refused"):
        read_torch_file(repacked(path, {"data.pkl": out.getvalue()}))


def test_other_archives_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.zeros(64, 64))
    with pytest.raises(ImportFileError, match="compressed"):
        read_torch_file(repacked(path, {}, compress_type=zipfile.ZIP_DEFLATED))
    with pytest.raises(ImportFileError, match="big-endian"):
        read_torch_file(repacked(path, {"byteorder": b"big"}))
    with pytest.raises(ImportFileError, match="damaged"):
        read_torch_file(repacked(path, {"data/0": b"short"}))
    empty = tmp_path / "empty.pt"
    with zipfile.ZipFile(empty, "w"):
        pass
    with pytest.raises(ImportFileError, match="no data"):
        read_torch_file(empty)
    no_zip = tmp_path / "text.pt"
    no_zip.write_text("version https://git-lfs")
    with pytest.raises(ImportFileError, match="not a zip archive"):
        read_torch_file(no_zip)
    legacy = tmp_path / "legacy.pt"
    torch.save(torch.zeros(2), legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(ImportFileError, match="before version 1.6"):
        read_torch_file(legacy)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_pickles_are_refused_or_read_and_raise_nothing_else(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3, 2), "b": [torch.nn.Parameter(torch.ones(2))]}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        original = bytearray(archive.read(name))
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(original) - 1))
        original[index] = data.draw(st.integers(0, 255))
    builders = {name: lambda *_: "x" for name in ("torch._utils._rebuild_tensor_v2", "collections.OrderedDict")}
    try:
        load(bytes(original), builders, {"torch.FloatStorage"}, lambda _: "storage")
    except PickleRefusedError:
        return
    assert {opcode.name for opcode, _, _ in pickletools.genops(bytes(original))} & {"STOP"}
