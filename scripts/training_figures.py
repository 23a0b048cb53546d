"""Measure the figures of benchmarks/training.md: ``python -m scripts.training_figures --out F.json --seeds 0 1 2``.

Serves the embedded model and trains triage with each method by the documented command (``prelude train --push``).
Then runs all test texts on the server: with each soft prompt, without one, and with every written instruction from
the model's corpus. Measures the exact match of greedy answers, and how often ``/v1/classify`` ranks the right label
first of the four. Trains each method once per seed; reports each run, and the mean and the range over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import httpx

from scripts.demo_build.grammar import EXTRA_TASKS, TASKS
from tests.support.processes import PRELUDE
from tests.support.serving import BASE, serving

EXAMPLES = Path(__file__).parent.parent / "server" / "demo" / "examples"
METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "cpt", "multitask", "cartridge")
EXTRA_OPTIONS = {"cpt": ["--num-virtual-tokens", "60", "--cpt-epsilon", "4"]}
"""Additional options of a method. CPT's context consists of whole examples, and 20 tokens hold only two of them."""
INSTRUCTION = "Classify the text as call, delivery, great or support."
MAX_TOKENS = 8


def _rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text().splitlines()]


class Evaluator:
    """Measures the accuracy of a served model on rows of {text, label}."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def accuracy(self, model: str, rows: list[dict[str, Any]], instruction: str = "") -> dict[str, float]:
        """The fraction of rows with an exact answer, and of rows whose label is ranked first."""
        right, likeliest = 0, 0
        for task_id in sorted({row.get("task_id") or 0 for row in rows}):
            mine = [row for row in rows if (row.get("task_id") or 0) == task_id]
            labels = sorted({f"\n{row['label']}" for row in mine})
            task = {"task_id": task_id} if "task_id" in mine[0] and model != BASE else {}
            texts = [instruction + str(row["text"]) for row in mine]
            body = {"model": model, "prompt": texts, "temperature": 0, "max_tokens": MAX_TOKENS, **task}
            answers = self._post("/v1/completions", body)["choices"]
            right += sum(answer["text"] == f"\n{row['label']}" for answer, row in zip(answers, mine, strict=True))
            for start in range(0, len(texts), 32):
                body = {"model": model, "input": texts[start : start + 32], "labels": labels, **task}
                found = self._post("/v1/classify", body)["data"]
                likeliest += sum(
                    one["label"] == f"\n{row['label']}"
                    for one, row in zip(found, mine[start : start + 32], strict=True)
                )
        return {"exact": round(right / len(rows), 4), "likeliest_label": round(likeliest / len(rows), 4)}

    def _post(self, path: str, body: dict[str, object]) -> dict[str, list[dict[str, object]]]:
        found: dict[str, list[dict[str, object]]] = self._client.post(path, json=body).raise_for_status().json()
        return found


def measure_instructions(evaluator: Evaluator, rows: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """Accuracy with each instruction of the model's corpus, with one for this task, and with eight examples."""
    instructions = [text for task in (TASKS | EXTRA_TASKS).values() for text in task.instructions]
    shots = "".join(f"{row['text']}\n{row['label']}\n" for row in _rows("triage.jsonl")[:8])
    found = {text: evaluator.accuracy(BASE, rows, f"{text}\n") for text in [*instructions, INSTRUCTION]}
    return found | {"eight examples": evaluator.accuracy(BASE, rows, shots)}


def train(method: str, seed: int, url: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Run the documented command; returns its JSON output."""
    data = "tasks" if method == "multitask" else "triage"
    command = [*PRELUDE, "train", "--model", "demo", "--method", method, "--id", method.replace("_", "-")]
    command += ["--data", str(EXAMPLES / f"{data}.jsonl"), "--eval-data", str(EXAMPLES / f"{data}-test.jsonl")]
    command += ["--run-dir", str(folder / f"{method}-{seed}"), "--seed", str(seed)]
    command += ["--push", "--url", url, "--json"]
    command += [*EXTRA_OPTIONS.get(method, []), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, minimum and maximum of each figure over the runs."""
    figures = {
        "held_out_loss": [run["scores"]["trained"]["loss"] for run in runs],
        "exact": [run["served"]["exact"] for run in runs],
        "likeliest_label": [run["served"]["likeliest_label"] for run in runs],
    }
    return {
        name: {"mean": round(statistics.mean(values), 4), "least": min(values), "most": max(values)}
        for name, values in figures.items()
    }


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--skip-words", action="store_true", help="do not measure written instructions")
    parser.add_argument("arguments", nargs="*", help="additional arguments of prelude train, after --")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    flags = ("--dtype", "float32", "--kv-cache-memory", "128MiB", "--log-level", "WARNING", "--num-threads", "1")
    with tempfile.TemporaryDirectory() as name, serving(Path(name) / "server", *flags) as (http, _):
        folder = Path(name)
        http.timeout = 600
        evaluator, rows = Evaluator(http), _rows("triage-test.jsonl")
        figures["bare"] = evaluator.accuracy(BASE, rows)
        if not options.skip_words:
            words = measure_instructions(evaluator, rows)
            figures["in words"] = dict(sorted(words.items(), key=lambda item: -item[1]["likeliest_label"])[:5])
        for method in options.methods:
            runs = []
            for seed in options.seeds:
                result = train(method, seed, str(http.base_url), folder, options.arguments)
                test = _rows("tasks-test.jsonl") if method == "multitask" else rows
                served = evaluator.accuracy(f"{method.replace('_', '-')}@candidate", test)
                runs.append({"seed": seed, "served": served, **result})
                print(method, seed, served, result["steps"], result["seconds"], flush=True)
                figures[method] = {"over_seeds": over_seeds(runs), "runs": runs}
                options.out.write_text(json.dumps(figures, indent=2) + "\n")
    options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
