"""Leave out the copies of the base's embeddings and head that PEFT saves with an adapter of them."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE

MAX_HEADER_BYTES = 1024 * 1024
_COPIES = re.compile(
    r".*\.base_layer\.(weight|bias)|(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|embed_out|lm_head)\.(weight|bias)"
)
_CHUNK_BYTES = 1024 * 1024


class BaseLayersError(ValueError):
    """The weights file is not a safetensors file, or is too short."""


@contextmanager
def without_base_layers(directory: Path) -> Iterator[tuple[Path, int]]:
    """A temporary directory with the two files of an adapter, without copies of the base's tensors.

    Args:
        directory: Saved by PEFT; nothing in it is changed.

    Yields:
        The temporary directory, and the number of bytes that were left out.

    Raises:
        BaseLayersError: If the weights are not a safetensors file.
        OSError: If a file cannot be read or written.
    """
    with tempfile.TemporaryDirectory(prefix="prelude-push-") as name:
        folder = Path(name)
        shutil.copyfile(directory / CONFIG_FILE, folder / CONFIG_FILE)
        with (directory / WEIGHTS_FILE).open("rb") as source, (folder / WEIGHTS_FILE).open("wb") as target:
            num_bytes = _copy_kept(source, target)
        yield folder, num_bytes


def _copy_kept(source: BinaryIO, target: BinaryIO) -> int:
    """Copy a safetensors file tensor by tensor; returns the bytes of the tensors that were left out."""
    num_header = int.from_bytes(source.read(8), "little")
    if not 2 <= num_header <= MAX_HEADER_BYTES:
        raise BaseLayersError(f"{WEIGHTS_FILE} is not a safetensors file")
    try:
        header = json.loads(source.read(num_header))
        metadata = header.pop("__metadata__", None)
        spans = {name: tuple(map(int, entry["data_offsets"])) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaseLayersError(f"the header of {WEIGHTS_FILE} cannot be read: {error}") from error
    kept = sorted((span, name) for name, span in spans.items() if not _COPIES.fullmatch(name))
    written: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for (start, stop), name in kept:
        written[name] = header[name] | {"data_offsets": [position, position + stop - start]}
        position += stop - start
    data = json.dumps(written, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    target.write(len(data).to_bytes(8, "little") + data)
    for (start, stop), name in kept:
        source.seek(8 + num_header + start)
        _copy(source, target, stop - start, name)
    return sum(stop - start for start, stop in spans.values()) - position


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int, name: str) -> None:
    while num_bytes > 0:
        chunk = source.read(min(num_bytes, _CHUNK_BYTES))
        if not chunk:
            raise BaseLayersError(f"{WEIGHTS_FILE} ends within the tensor {name[:200]!a}")
        target.write(chunk)
        num_bytes -= len(chunk)
