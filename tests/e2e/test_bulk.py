"""Bulk runs and evaluations against a whole server: killed, resumed, and equal to single requests."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path

import httpx

from server.demo.tour import HELDOUT_DIRECTORY
from tests.support.processes import PRELUDE
from tests.support.waiting import wait_until

NUM_ROWS = 300


def heldout(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (HELDOUT_DIRECTORY / f"{name}.jsonl").read_text().splitlines()]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def has_lines(path: Path, count: float) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count


def prelude(demo_server: httpx.Client, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PRELUDE, *arguments, "--url", str(demo_server.base_url)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_run_killed_twice_has_every_row_once_with_the_right_answer(
    demo_server: httpx.Client, tmp_path: Path
) -> None:
    texts = [pair["input"] for pair in heldout("sentiment")] + [pair["input"] for pair in heldout("dates")]
    rows: list[dict[str, object]] = [
        {"id": index, "prompt": f"{texts[index % len(texts)]}", "prompt_id": "dates" if index % 3 else "sentiment"}
        for index in range(NUM_ROWS)
    ]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = ["run", "sentiment", str(source), str(output), "--max-tokens", "6", "--concurrency", "16"]
    command += ["--rows-per-request", "4", "--url", str(demo_server.base_url)]
    for share in (0.3, 0.6):
        process = subprocess.Popen([*PRELUDE, *command])
        wait_until(partial(has_lines, output, share * NUM_ROWS), 60)
        process.kill()
        process.wait()
    done = output.read_bytes().count(b"\n")
    finished = subprocess.run([*PRELUDE, *command, "--json"], capture_output=True, text=True, check=True)
    summary = json.loads(finished.stdout)
    assert (summary["rows_before"], summary["rows_done"], summary["errors"]) == (done, NUM_ROWS, 0)
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{key: row[key] for key in ("id", "prompt", "prompt_id")} for row in written] == rows
    for row in written[::50]:
        body = {"model": row["prompt_id"], "prompt": row["prompt"], "max_tokens": 6, "temperature": 0}
        alone = demo_server.post("/v1/completions", json=body).json()["choices"][0]
        assert (row["response"]["text"], row["response"]["model"]) == (alone["text"], f"{row['prompt_id']}@1")


def test_evaluations_match_single_requests(demo_server: httpx.Client, tmp_path: Path) -> None:
    pairs = heldout("sentiment")
    rows: list[dict[str, object]] = [{"text": pair["input"], "label": pair["output"].strip()} for pair in pairs]
    data = write(tmp_path / "test.jsonl", rows)
    done = prelude(demo_server, "eval", "sentiment", "--data", str(data), "--against-base", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    labels = ["\nnegative", "\npositive"]
    right = 0
    for pair in pairs:
        body = {"model": "sentiment", "input": pair["input"], "labels": labels}
        answer = demo_server.post("/v1/classify", json=body).json()["data"][0]["label"]
        right += answer.strip() == pair["output"].strip()
    assert report["right"] == right
    assert report["accuracy"] >= 0.95
    assert report["comparison"]["rows"] == report["against"]["rows"] == len(pairs)
    matched: list[dict[str, object]] = [
        {"prompt": pair["input"], "completion": pair["output"]} for pair in heldout("dates")
    ]
    data = write(tmp_path / "dates.jsonl", matched)
    done = prelude(demo_server, "eval", "dates", "--data", str(data), "--against-base", "--json")
    report = json.loads(done.stdout)
    assert (report["metric"], report["errors"]) == ("exact_match", 0)
    assert report["accuracy"] > 0.8 > 0.2 > report["against"]["accuracy"]
    assert report["comparison"]["p_value"] < 0.01
