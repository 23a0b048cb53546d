"""A strict reader of CSV and TSV files with a header, whose rows become those of JSON Lines."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from server.json_lines import MAX_LINE_BYTES, JsonLine

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""By the end of the file's name, in lower case."""

_TASK = "task_id"


def read_csv_rows(path: Path) -> Iterator[JsonLine]:
    """Read the rows of a file one by one; its first row names the columns.

    Every cell is a text, except for an integer in the column ``task_id``. Blank rows are skipped. A row is faulty if
    it has another number of cells than the header.

    Args:
        path: CSV as in RFC 4180, or TSV, in UTF-8.

    Raises:
        OSError: If the file cannot be read.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = DELIMITERS[path.suffix.lower()]
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        number = 1
        try:
            for cells in rows:
                first, number = number, rows.line_num + 1
                if not any(cells):
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    if len(set(header)) != len(header):
                        yield JsonLine(first, {}, "the header names a column twice")
                        return
                    continue
                yield _row(first, header, cells)
        except UnicodeDecodeError:
            yield JsonLine(number, {}, "not UTF-8")
        except csv.Error as error:
            yield JsonLine(number, {}, f"not {path.suffix[1:].upper()}: {error}")


def _row(number: int, header: Sequence[str], cells: Sequence[str]) -> JsonLine:
    if len(cells) != len(header):
        return JsonLine(number, {}, f"has {len(cells)} cells, and the header has {len(header)}")
    fields: dict[str, object] = dict(zip(header, cells, strict=True))
    task = str(fields.get(_TASK, "")).strip()
    if not task:
        fields.pop(_TASK, None)
    elif task.isascii() and task.isdigit():
        fields[_TASK] = int(task)
    return JsonLine(number, fields)
