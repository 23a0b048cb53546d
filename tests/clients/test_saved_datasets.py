"""Examples that the library datasets saved."""

from __future__ import annotations

from pathlib import Path

from server.datasets import LabelledText, read_examples
from tests.clients.running import ClientEnvironment, heldout


def test_rows_saved_by_the_library_are_read(python_clients: ClientEnvironment, tmp_path: Path) -> None:
    rows = [{"text": pair["input"], "label": pair["output"]} for pair in heldout("sentiment")[:20]]
    python_clients.json("save_datasets.py", rows, str(tmp_path))
    wanted = [LabelledText(row["text"], row["label"]) for row in rows]
    for name in ("texts", "classes"):
        assert read_examples(tmp_path / name) == wanted
        assert read_examples(tmp_path / f"{name}-reversed") == wanted[::-1]
        assert read_examples(tmp_path / f"{name}.parquet") == wanted
        assert read_examples(tmp_path / f"{name}-splits" / "train") == wanted
