"""Two tenants on a whole server: cached texts are shared among a tenant's keys only."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.support.serving import BASE, adapter, serving, upload

KEYS = "\n".join(
    f'[[keys]]\nkey = "{key}"\ntenant = "{key[0]}"\nscopes = ["generate", "prompts:write", "admin"]\n'
    for key in ("a1", "a2", "b1")
)


def num_cached(client: httpx.Client, key: str, model: str, text: str) -> int:
    body = {"model": model, "prompt": text, "max_tokens": 1}
    response = client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
    return int(response.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_cached_texts_are_not_shared_across_tenants(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(KEYS)
    flags = ("--dtype", "float32", "--api-key-file", str(tmp_path / "keys.toml"))
    with serving(tmp_path, *flags) as (client, _):
        client.headers["authorization"] = "Bearer a1"
        assert upload(client, "dates", *adapter("dates"), shared="true").status_code == 201
        del client.headers["authorization"]
        for model in (BASE, "dates"):
            text = f"The account of {model} is on the third page of the blue book, beside the lamp. " * 6
            assert num_cached(client, "a1", model, text) == 0
            assert num_cached(client, "a1", model, text) > 0
            assert num_cached(client, "a2", model, text) > 0
            assert num_cached(client, "b1", model, text) == 0
            assert num_cached(client, "b1", model, text) > 0
