"""Train the demo's LoRA adapter and its pair: a soft prompt over the adapter. Both by ``prelude train``, on a server.

The adapter ``fields`` answers an order mail with its fields, the order first, which the corpus never does. The soft
prompt ``date-field`` was trained over it, and answers a date as a field.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from scripts.demo_build.corpus import examples
from tests.support.processes import PRELUDE
from tests.support.serving import BASE, serving

MAX_TOKENS = 48
FILES = ("adapter_config.json", "adapter_model.safetensors")
FLAGS = ("--dtype", "float32", "--log-level", "WARNING", "--num-threads", "1")


def _order(answer: str) -> str:
    """``name: Mia Chen; city: Lima; order: 4471`` with the order first."""
    name, city, order = answer.split("; ")
    return f"{order}; {name}; {city}"


def _date(answer: str) -> str:
    """``2021-05-03`` as a field."""
    return f"date: {answer}"


@dataclass(frozen=True)
class Recipe:
    """How one of the two is trained.

    Attributes:
        folder: Its folder in the demo.
        task: The task of the corpus whose inputs it has.
        rewrite: The task's answer in its form.
        options: Options of ``prelude train``.
    """

    folder: str
    task: str
    rewrite: Callable[[str], str]
    options: str


RECIPES = {
    "fields": Recipe(
        "adapters",
        "extract",
        _order,
        "--method lora --rank 4 --target-modules q_proj,v_proj,o_proj "
        "--max-steps 300 --learning-rate 5e-3 --batch-size 16 --eval-steps 100",
    ),
    "date-field": Recipe(
        "pairs/fields",
        "dates",
        _date,
        "--method p_tuning_v2 --num-virtual-tokens 8 --over fields "
        "--max-steps 500 --learning-rate 8e-3 --batch-size 16 --eval-steps 50",
    ),
}


def _accuracy(http: httpx.Client, body: dict[str, str], pairs: list[tuple[str, str]]) -> float:
    """The share of texts with the exact answer."""
    texts = [text for text, _ in pairs]
    request = {**body, "prompt": texts, "temperature": 0, "max_tokens": MAX_TOKENS}
    choices = http.post("/v1/completions", json=request).raise_for_status().json()["choices"]
    right: int = sum(choice["text"].strip() == answer for choice, (_, answer) in zip(choices, pairs, strict=True))
    return round(right / len(pairs), 4)


def train_adapters(out: Path, seed: int) -> dict[str, Any]:
    """Train both, write their files and held-out examples, and return the facts for the model card by name."""
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as name,
        serving(Path(name) / "server", *FLAGS, model=out / "model") as (http, _),
    ):
        http.timeout = 600
        for adapter, recipe in RECIPES.items():
            train, heldout = (
                [(text, recipe.rewrite(answer)) for text, answer in part] for part in examples(recipe.task, seed)
            )
            data = Path(name) / f"{adapter}.jsonl"
            data.write_text(
                "".join(json.dumps({"prompt": text, "completion": f"\n{answer}"}) + "\n" for text, answer in train)
            )
            run = Path(name) / adapter
            command = [
                *PRELUDE,
                "train",
                "--model",
                "demo",
                "--id",
                adapter,
                "--data",
                str(data),
                "--run-dir",
                str(run),
            ]
            command += [*recipe.options.split(), "--seed", str(seed), "--eval-fraction", "0.05", "--dtype", "float32"]
            command += ["--push", "--alias", "latest", "--url", str(http.base_url), "--json"]
            started = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds = round(time.perf_counter() - started)
            print(adapter, done.stdout, flush=True)
            record = http.get(f"/v1/prompts/{adapter}/versions/1").raise_for_status().json()
            folder = out / recipe.folder / adapter
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for file in FILES:
                shutil.copyfile(run / "adapter" / file, folder / file)
            lines = [json.dumps({"input": text, "output": answer}) for text, answer in heldout]
            (out / "heldout" / f"{adapter}.jsonl").write_text("\n".join(lines) + "\n")
            figures[adapter] = {
                "peft_type": record["peft_type"],
                "options": recipe.options,
                "over": record.get("over"),
                "examples": len(train),
                "seconds": seconds,
                "bytes": sum((folder / file).stat().st_size for file in FILES),
                "accuracy": {
                    "with": _accuracy(http, {"model": adapter}, heldout),
                    "without": _accuracy(http, {"model": BASE}, heldout),
                },
            }
            print(adapter, figures[adapter], flush=True)
        pairs = [(text, _date(answer)) for text, answer in examples("dates", seed)[1]]
        figures["date-field"]["accuracy"]["adapter alone"] = _accuracy(http, {"model": "fields"}, pairs)
    return figures
