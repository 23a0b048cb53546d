"""Every prompt-learning type of PEFT is uploaded, served in one mixed batch, and downloaded byte for byte."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import httpx
import pytest

from server.demo.tour import MODEL_DIRECTORY
from tests.support.engine.harness import ALL_PEFT_CONFIGS, make_family, random_text
from tests.support.serving import BASE, serving

MAX_TOKENS = 10
FILENAMES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["llama", "gemma2"])
async def test_all_types_round_trip_and_equal_peft(name: str, tmp_path: Path) -> None:
    family, rng = make_family(name, tmp_path, ALL_PEFT_CONFIGS), random.Random(name)
    for path in MODEL_DIRECTORY.glob("tokenizer*"):  # any tokenizer works: texts are given as token ids
        shutil.copy(path, family.path)
    flags = ("--dtype", "float32", "--block-size", "4", "--max-num-batched-tokens", "64", "--max-num-seqs", "64")
    with serving(tmp_path / "server", *flags, model=family.path) as (client, _):
        for key, folder in family.peft_folders.items():
            files = [("files", (filename, (folder / filename).read_bytes())) for filename in FILENAMES]
            response = client.post("/v1/prompts", data={"id": key}, files=files)
            assert response.status_code == 201, response.text
            for filename in FILENAMES:
                back = client.get(f"/v1/prompts/{key}/versions/1/files/{filename}")
                assert back.content == (folder / filename).read_bytes()
        requests = [(key, random_text(rng, 1, 40)) for key in [*family.soft_prompts, None] * 2]
        rng.shuffle(requests)

        async def ask(http: httpx.AsyncClient, key: str | None, text: list[int]) -> list[int]:
            model, _, task_id = (key or BASE).partition("/")
            body = {"model": model, "prompt": text, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
            body |= {"return_token_ids": True} | ({"task_id": int(task_id)} if task_id else {})
            response = await http.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            token_ids: list[int] = response.json()["choices"][0]["token_ids"]
            return token_ids

        async with httpx.AsyncClient(base_url=client.base_url, timeout=120) as http:
            answers = await asyncio.gather(*(ask(http, key, text) for key, text in requests))
        for (soft_prompt, text), answer in zip(requests, answers, strict=True):
            assert answer == family.expected(soft_prompt, text, MAX_TOKENS), (soft_prompt, text)
        body = {"model": "multitask_6", "prompt": [1, 2], "max_tokens": 1}
        for task_id in (None, 3):
            response = client.post("/v1/completions", json={**body, "task_id": task_id})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "task_id")
