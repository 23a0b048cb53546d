"""Rows of Parquet files, and of directories that the library ``datasets`` saved, as those of JSON Lines.

Both are read by pyarrow. ``Dataset.save_to_disk`` writes Arrow streams, and their names into ``state.json``. Columns
of the type ``ClassLabel`` contain integers; ``datasets`` puts the names into the schema in both formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server.json_lines import JsonLine

PARQUET = ".parquet"
"""The end of the name of a Parquet file, in lower case."""

MISSING = "needs pyarrow: pip install 'prelude-server[parquet]'"

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_FEATURES = b"huggingface"
_BATCH_ROWS = 1024


class TableError(Exception):
    """A table cannot be read; the message is the reason, without the path."""


def is_table(path: Path) -> bool:
    """Whether ``read_table_rows`` reads this path: a Parquet file by its name, or any directory."""
    return path.suffix.lower() == PARQUET or path.is_dir()


def data_files(path: Path) -> list[Path]:
    """The files with the rows of a table, in order: the Parquet file itself, or the Arrow files of a directory.

    Raises:
        OSError: If a file cannot be read.
        TableError: If the directory is no saved dataset, or one with several splits.
    """
    if not path.is_dir():
        return [path]
    if (path / _SPLITS).is_file():
        names = _listed(path / _SPLITS, "splits")
        raise TableError(
            f"has the splits {', '.join(map(str, names))}: name one of them, such as {path / str(names[0])}"
        )
    if not (path / _STATE).is_file():
        raise TableError("is a directory, but none that save_to_disk of datasets wrote")
    entries = _listed(path / _STATE, "_data_files")
    if not all(isinstance(entry, dict) and isinstance(entry.get("filename"), str) for entry in entries):
        raise TableError(f"{_STATE} has no names of files")
    return [path / Path(entry["filename"]).name for entry in entries]


def read_table_rows(path: Path) -> Iterator[JsonLine]:
    """Read the rows of a table one by one, numbered from 1; cells without a value are left out.

    Raises:
        OSError: If a file cannot be read.
        TableError: If it has another format, or pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise TableError(MISSING)
    # Imported here because pyarrow is optional, and slow to import.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.ipc  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    number = 0
    try:
        for file in data_files(path):
            with ExitStack() as stack:
                source: Any = stack.enter_context(pa.memory_map(str(file)))
                if path.is_dir():
                    reader: Any = pyarrow.ipc.open_stream(source)
                    schema, batches = reader.schema, reader
                else:
                    reader = pyarrow.parquet.ParquetFile(source)
                    schema, batches = reader.schema_arrow, reader.iter_batches(batch_size=_BATCH_ROWS)
                names = _class_names(schema.metadata or {})
                for batch in batches:
                    for row in batch.to_pylist():
                        number += 1
                        yield _row(number, row, names)
    except pa.ArrowException as error:
        what = "a saved dataset" if path.is_dir() else "Parquet"
        raise TableError(f"not {what}: {str(error).splitlines()[0]}") from error


def _row(number: int, cells: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> JsonLine:
    fields = {name: value for name, value in cells.items() if value is not None}
    for column, labels in names.items():
        value = fields.get(column)
        if isinstance(value, int):
            if not 0 <= value < len(labels):
                return JsonLine(number, {}, f"{column} is {value}, which names none of its {len(labels)} classes")
            fields[column] = labels[value]
    return JsonLine(number, fields)


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The class names by column, from the schema's metadata."""
    try:
        features = json.loads(metadata.get(_FEATURES, b"{}"))["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _listed(path: Path, key: str) -> list[Any]:
    """A list that is not empty, from a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(f"{path.name} has no {key}") from error
    if not isinstance(value, list) or not value:
        raise TableError(f"{path.name} has no {key}")
    return value
