"""Fields of other servers: each is supported, mapped, refused by name, or ignored for a documented reason."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from server.api.classification.routes import ClassifyBody
from server.api.generation.bodies import ChatBody, CompletionBody
from server.api.generation.known_fields import CHAT, CLASSIFY, COMPLETIONS, EVERYWHERE, IGNORED, Refused
from server.engine.constraints import Constraint
from server.errors import ConstraintError
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

ROUTES = {"/v1/completions": {**EVERYWHERE, **COMPLETIONS}, "/v1/chat/completions": {**EVERYWHERE, **CHAT}}
BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/classify": ClassifyBody,
}

BOTH = re.findall(
    r"\w+",
    """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options
    temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words
    add_special_tokens response_format structured_outputs priority request_id session_id return_tokens_as_token_ids
    return_token_ids routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt kv_transfer_params
    ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval guided_json guided_regex
    guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern logits_processors
""",
)
OTHERS = {
    "/v1/completions": [*BOTH, "prompt", "echo", "suffix", "best_of", "prompt_embeds"],
    "/v1/chat/completions": [
        *BOTH,
        *re.findall(
            r"\w+",
            """messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort include_reasoning
        parallel_tool_calls echo add_generation_prompt continue_final_message documents chat_template
        chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text audio function_call functions
        metadata modalities prediction prompt_cache_key prompt_cache_retention safety_identifier service_tier store
        verbosity web_search_options""",
        ),
    ],
}
"""Fields of vLLM's and OpenAI's requests."""


def body(path: str, **fields: Any) -> dict[str, Any]:
    if path == "/v1/classify":
        return {"input": "a", "labels": ["b", "c"]} | fields
    return ({"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "abc"}) | fields


def names_of(path: str) -> set[str]:
    fields = BODIES[path].model_fields
    return {field.alias or name for name, field in fields.items()}


@pytest.mark.parametrize("path", OTHERS)
def test_every_field_of_vllm_and_openai_is_known(path: str) -> None:
    assert set(OTHERS[path]) - names_of(path) - ROUTES[path].keys() - IGNORED.keys() == set()


@pytest.mark.parametrize("path", BODIES)
def test_no_field_is_in_two_tables(path: str) -> None:
    refused = ROUTES.get(path, CLASSIFY)
    assert names_of(path) & refused.keys() == set()
    assert names_of(path) & IGNORED.keys() == set()
    assert refused.keys() & IGNORED.keys() == set()


REFUSED = [(path, name, how) for path, table in ROUTES.items() for name, how in table.items()]
REFUSED += [("/v1/classify", name, how) for name, how in CLASSIFY.items()]


@pytest.mark.parametrize(("path", "name", "how"), REFUSED)
async def test_unsupported_fields_are_refused_by_name(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, name: str, how: Refused
) -> None:
    response = await client.post(path, json=body(path, **{name: "x"}))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name)
    assert how.instead in error["message"]
    assert engine.requests == []


@pytest.mark.slow
async def test_values_that_ask_for_nothing_are_accepted(client: httpx.AsyncClient) -> None:
    for path, name, how in REFUSED:
        if name in ("prompt", "messages"):
            continue
        for no_op in (None, *how.no_ops, [], {}, ""):
            response = await client.post(path, json=body(path, **{name: no_op}))
            assert response.status_code == 200, (path, name, no_op, response.text)


async def test_true_is_not_accepted_as_one(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=body("", best_of=True))
    assert response.json()["error"]["param"] == "best_of"


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("other", "own", "value"),
    [
        ("best_of", "n", 2),
        ("max_new_tokens", "max_tokens", 7),
        ("min_new_tokens", "min_tokens", 2),
        ("stopping_strings", "stop", ["l"]),
        ("stop_sequences", "stop", "l"),
        ("repeat_penalty", "repetition_penalty", 1.2),
    ],
)
async def test_an_alias_with_the_same_value_is_accepted_and_another_value_is_refused(
    client: httpx.AsyncClient, path: str, other: str, own: str, value: list[str] | str | float
) -> None:
    fields = body(path, **{"max_tokens": 9, own: value, other: value})
    assert (await client.post(path, json=fields)).status_code == 200
    response = await client.post(path, json=fields | {own: 3 if own != "stop" else ["x"]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, other)


@pytest.mark.parametrize("path", ROUTES)
async def test_unknown_fields_and_fields_without_effect_are_ignored(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    await client.post(path, json=body(path))
    response = await client.post(path, json=body(path, **dict.fromkeys([*IGNORED, "x_unknown"], "x")))
    assert response.status_code == 200, response.text
    first, second = (request.params for request in engine.requests)
    assert first == second


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("guided_json", SCHEMA, "json"),
        ("guided_json", json.dumps(SCHEMA), "json"),
        ("guided_regex", "[0-9]{3}", "regex"),
        ("guided_choice", ["yes", "no"], "choice"),
        ("guided_grammar", 'start: "a"', "grammar"),
    ],
)
async def test_guided_fields_become_structured_outputs(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    name: str,
    value: dict[str, Any] | str | list[str],
    key: str,
) -> None:
    for fields in ({"structured_outputs": {key: value}}, {name: value, "structured_outputs": None}):
        response = await client.post(path, json=body(path, **fields))
        assert response.status_code == 200, response.text
    first, second = (request.params.constraint for request in engine.requests)
    assert first == second
    assert isinstance(first, Constraint)


@pytest.mark.parametrize("path", ROUTES)
async def test_empty_guided_fields_have_no_effect(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    empty = {"guided_json": "", "guided_regex": "", "guided_choice": [], "guided_grammar": ""}
    response = await client.post(path, json=body(path, **empty))
    assert response.status_code == 200, response.text
    assert engine.requests[0].params.constraint is None


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a" * 8193}, "guided_regex"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice"),
        ({"guided_grammar": "%llguidance {}"}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
async def test_invalid_guided_fields_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body(path, **fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == []


async def test_engine_errors_name_the_guided_field(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failure = ConstraintError("no grammar")
    response = await client.post("/v1/completions", json=body("", guided_regex="("))
    assert response.json()["error"]["param"] == "guided_regex"


def rows(heading: str) -> dict[str, list[str]]:
    text = (Path(__file__).parents[3] / "docs" / "generation.md").read_text()
    section = text.split(f"### {heading}\n")[1].split("\n#")[0]
    found = {}
    for line in section.splitlines():
        if match := re.match(r"\| `(\w+)` \|", line):
            found[match[1]] = [cell.strip() for cell in line.strip("|").split("|")][1:]
    return found


def shown(how: Refused) -> list[str]:
    no_ops = ", ".join(f"`{json.dumps(no_op)}`" for no_op in how.no_ops)
    if how.same_as is not None:
        no_ops += f"{', ' if no_ops else ''}that of `{how.same_as}`"
    return [no_ops or "-", how.instead]


@pytest.mark.parametrize(
    ("heading", "table"),
    [
        ("Refused by completions and chat", EVERYWHERE),
        ("Refused by completions", COMPLETIONS),
        ("Refused by chat", CHAT),
        ("Refused by classifications", CLASSIFY),
    ],
)
def test_the_document_lists_the_refused_fields(heading: str, table: Mapping[str, Refused]) -> None:
    assert rows(heading) == {name: shown(how) for name, how in table.items()}


def test_the_document_lists_the_ignored_fields() -> None:
    assert rows("Ignored") == {name: [reason] for name, reason in IGNORED.items()}
