"""What is said about a server that serves."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from prompt_store.types import StoreTotals
from tests.startup.test_display import MODEL, SUMMARY


def test_the_lines_say_what_is_served_and_where() -> None:
    assert SUMMARY.lines("http://127.0.0.1:8000") == [
        "model         llama: LlamaForCausalLM, float32, cpu, 2 threads",
        "keys/values   1.37 GiB, 22,400 tokens: 200 sequences of 100 tokens",
        "stored        no soft prompts and adapters yet, in /srv/store",
        "API keys      none; only programs on this machine can connect",
        "serving       http://127.0.0.1:8000",
        "open          http://127.0.0.1:8000/console, or http://127.0.0.1:8000/docs for the API",
    ]


def test_what_is_not_known_is_left_out() -> None:
    model = msgspec.structs.replace(MODEL, engine="vllm", device="cuda", block_bytes=0, num_threads=0, num_blocks=13)
    lines = replace(SUMMARY, model=model).lines(None)
    assert lines[0].endswith("LlamaForCausalLM, float32, cuda, engine vllm")
    assert lines[1].endswith("  208 tokens: 1 sequence of 100 tokens")
    assert len(lines) == 4


def test_keys_and_open_servers_are_named() -> None:
    totals = StoreTotals(num_prompts=1234)
    assert replace(SUMMARY, totals=totals).lines(None)[2].endswith("1,234 soft prompts and adapters in /srv/store")
    assert replace(SUMMARY, has_keys=True).lines(None)[3].endswith("required")
    assert "OPEN" in replace(SUMMARY, is_open=True).lines(None)[3]


def test_programs_get_fields() -> None:
    fields = SUMMARY.fields
    assert (fields["cache_bytes"], fields["cache_tokens"], fields["cache_full_sequences"]) == (
        1400 * 2**20,
        22400,
        200,
    )
    assert (fields["has_keys"], fields["store"], fields["num_threads"]) == (False, "/srv/store", 2)
