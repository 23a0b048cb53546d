"""The demo's examples equal the output of their script, and are valid data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from server.datasets import LabelledText, read_examples

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "server" / "demo" / "examples"


def test_the_script_writes_these_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.training_examples", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)

    names = sorted(path.name for path in FOLDER.glob("*.jsonl"))
    assert names == ["tasks-test.jsonl", "tasks.jsonl", "triage-test.jsonl", "triage.jsonl"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_no_test_text_is_trained_on_and_labels_are_balanced() -> None:
    for task in ("triage", "tasks"):
        train, test = (read_examples(FOLDER / f"{task}{part}.jsonl") for part in ("", "-test"))
        assert (len(train), len(test)) == (400, 150)
        texts = [{example.text for example in rows if isinstance(example, LabelledText)} for rows in (train, test)]
        assert not texts[0] & texts[1]
    labels = [json.loads(line)["label"] for line in (FOLDER / "triage-test.jsonl").read_text().splitlines()]
    assert all(labels.count(label) > 20 for label in ("support", "great", "delivery", "call"))
