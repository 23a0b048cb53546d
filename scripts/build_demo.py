"""Build the embedded demo from scratch: corpus, tokenizer, model, soft prompts, adapter, card.

    python -m scripts.build_demo --out server/demo

Each stage reads the output of the stage before it, so a single stage can be repeated (``--stage prompts``).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from scripts.demo_build.adapters import train_adapters
from scripts.demo_build.card import write_card
from scripts.demo_build.corpus import heldout_inputs, write_heldout
from scripts.demo_build.evaluate import evaluate
from scripts.demo_build.pretrain import CONTEXT, STEPS, pretrain, save_model
from scripts.demo_build.soft_prompts import train_soft_prompts
from scripts.demo_build.tokenizer import save_tokenizer, train_tokenizer

SEED = 20
STAGES = ("tokenizer", "model", "prompts", "evaluate", "adapters", "card")


def main() -> None:
    """Run the requested stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("server/demo"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of the model")
    parser.add_argument("--stage", choices=STAGES, action="append", help="run only this stage (may be repeated)")
    parser.add_argument("--prompt", action="append", help="train only this soft prompt (may be repeated)")
    arguments = parser.parse_args()
    stages, out, seed = arguments.stage or STAGES, arguments.out, arguments.seed
    model_folder, figures_file = out / "model", out / "metrics.json"
    figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
    if "tokenizer" in stages:
        write_heldout(seed, out / "heldout")
        save_tokenizer(train_tokenizer(seed, heldout_inputs(seed), CONTEXT), model_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    if "model" in stages:
        started = time.perf_counter()
        model = pretrain(tokenizer, seed, heldout_inputs(seed), arguments.steps)
        save_model(model, model_folder)
        figures["model"] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": arguments.steps,
            "seconds": round(time.perf_counter() - started),
            "seed": seed,
            "threads": torch.get_num_threads(),
        }
    if "prompts" in stages:
        figures.setdefault("soft_prompts", {}).update(
            train_soft_prompts(model_folder, out / "soft_prompts", seed, arguments.prompt)
        )
    if "evaluate" in stages:
        figures["accuracy"] = evaluate(model_folder, out / "soft_prompts", out / "heldout")
    if "adapters" in stages:
        figures["adapters"] = train_adapters(out, seed)
    figures_file.write_text(json.dumps(figures, indent=2) + "\n")
    if "card" in stages:
        write_card(figures, out)


if __name__ == "__main__":
    main()
