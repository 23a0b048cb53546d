"""A day of the registry with SmolLM2-135M: publish, compare, canary, roll back, move, back up and restore.

    python -m benchmarks.smollm2.day --folder /tmp/smollm2 [--method prompt_tuning]

Uses what ``benchmarks.smollm2.train`` has trained with two seeds in the folder. Each act is a command of ``prelude``
against a running server. After each that must not change an answer (export and import on a second server, backup and
restore into a third store), the token ids of 100 held-out rows are compared with those of PEFT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.server import serving
from benchmarks.smollm2.train import METHODS, OURS, adapter_folder, data_files, push
from server.demo.real.model import converted, weights
from tests.support.processes import PRELUDE

NAME = "news"
NEW_TOKENS = 8
FLAGS = ("--dtype", "float32")
_PERCENT = 30
_CANARY_REQUESTS = 20


def texts_of(path: Path) -> list[str]:
    """The prompts of held-out rows: the text and the separator."""
    return [json.loads(line)["text"] + "\n" for line in path.read_text().splitlines()]


def peft_tokens(adapter: Path, texts: Sequence[str]) -> list[list[int]]:
    """PEFT's greedy tokens in float32, one text at a time, without what comes after the end."""
    tokenizer: Any = AutoTokenizer.from_pretrained(converted(weights()))
    base: Any = AutoModelForCausalLM.from_pretrained(converted(weights()), dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(adapter)).eval()
    answers = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            found = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(found[0, ids.input_ids.shape[1] :].tolist())
    return answers


def served_tokens(url: str, model: str, texts: Sequence[str]) -> list[list[int]]:
    """The server's greedy tokens."""
    body = {"model": model, "prompt": list(texts), "temperature": 0, "max_tokens": NEW_TOKENS}
    answer = httpx.post(f"{url}/v1/completions", json={**body, "return_token_ids": True}, timeout=600)
    answer.raise_for_status()
    return [choice["token_ids"] for choice in sorted(answer.json()["choices"], key=lambda choice: choice["index"])]


def compared(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> str:
    """How many answers have the same tokens in the same number."""
    equal = sum(list(one) == list(other) for one, other in zip(expected, found, strict=True))
    return f"{equal} of {len(expected)}"


class Prelude:
    """Runs commands of ``prelude`` against a server, and prints how long each took."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, *words: str, at: str | None = "url") -> str:
        """Run a command; ``at=None`` for one that needs no server."""
        command = [*PRELUDE, *words, *(["--url", self._url] if at else [])]
        started = time.monotonic()
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{time.monotonic() - started:6.1f} s  prelude {' '.join(words)}", flush=True)
        return found.stdout


def canary(run: Prelude, url: str, texts: Sequence[str]) -> dict[str, int]:
    """Send a share of requests to version 2 until the rule promotes it; returns the answers by version."""
    versions: dict[str, int] = {}
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ended.is_set():
                for text in texts:
                    answer = client.post("/v1/completions", json={"model": NAME, "prompt": text, "max_tokens": 2})
                    answer.raise_for_status()
                    version = answer.headers["X-Prelude-Prompt"]
                    versions[version] = versions.get(version, 0) + 1
                    if ended.is_set():
                        return

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        rule = ("--promote-if", "errors<=1%", "--requests", str(_CANARY_REQUESTS))
        run("canary", NAME, "--to", "2", "--percent", str(_PERCENT), *rule)
    finally:
        ended.set()
        asking.join()
    return versions


def day(folder: Path, method: str) -> dict[str, object]:
    """All acts in turn, on new stores; returns what was seen."""
    _, test = data_files(folder)
    texts = texts_of(test)
    adapters = [adapter_folder(folder, OURS, method, seed) for seed in (0, 1)]
    expected = [peft_tokens(adapter, texts) for adapter in adapters]
    seen: dict[str, object] = {"method": method}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model = converted(weights())
        with serving(model, place / "first", *FLAGS) as url:
            run = Prelude(url)
            for adapter in adapters:
                push(url, NAME, adapter)
            seen["equal PEFT's"] = [
                compared(tokens, served_tokens(url, f"{NAME}@{version}", texts))
                for version, tokens in enumerate(expected, 1)
            ]
            for version in (1, 2):
                run("eval", f"{NAME}@{version}", "--data", str(test), "--record", "--json")
            run("promote", NAME, "1")
            seen["answers by version"] = canary(run, url, texts)
            seen["after the canary"] = latest(url)
            run("rollback", NAME, "--reason", "the day's rehearsal")
            seen["after the rollback"] = latest(url)
            run("export", "--all", str(place / "moved"))
            run("store", "backup", str(place / "backup"), "--store", str(place / "first"), at=None)
        with serving(model, place / "second", *FLAGS) as url:
            Prelude(url)("import", str(place / "moved"))
            seen["equal PEFT's on the second server"] = compared(expected[0], served_tokens(url, NAME, texts))
        run("store", "restore", str(place / "backup"), "--store", str(place / "third"), at=None)
        run("store", "verify", "--store", str(place / "third"), at=None)
        with serving(model, place / "third", *FLAGS) as url:
            seen["equal PEFT's after the restore"] = compared(expected[0], served_tokens(url, NAME, texts))
            seen["latest after the restore"] = latest(url)
    return seen


def latest(url: str) -> int:
    """The version that ``latest`` points at."""
    found = httpx.get(f"{url}/v1/prompts/{NAME}")
    found.raise_for_status()
    return int(found.json()["aliases"]["latest"])


def main() -> None:
    """Run the day and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--method", choices=METHODS, default="prompt_tuning")
    arguments = parser.parse_args()
    print(json.dumps(day(arguments.folder, arguments.method), indent=2))


if __name__ == "__main__":
    main()
