"""A picture is shown once for all subscribers of a tenant, and to each tenant as its own."""

from __future__ import annotations

import json

from msgspec.structs import replace

from server.api.live.engine_body import ShownPictures
from server.api.live.live_names import LiveNames
from server.engine.messages import BatchPicture, Phase, SequencePicture
from server.engine.stats import EngineStats

STATS = EngineStats()
ROW = SequencePicture(
    request_id="r",
    tenant="a",
    phase=Phase.DECODE,
    run=None,
    is_batch=False,
    num_virtual_tokens=0,
    num_text_tokens=3,
    num_new_tokens=1,
    num_computed=4,
    num_prompt_blocks=0,
    num_shared_blocks=0,
    num_own_blocks=1,
    age_seconds=0.5,
    reason=None,
)
PICTURE = BatchPicture(
    step=4, sequences=[ROW], runs=[], num_blocks=3, num_used_blocks=1, num_idle_blocks=0, block_map=b"\2\0\0"
)


def named() -> LiveNames:
    names = LiveNames()
    names.begin("r", ["mine@1"], [])
    return names


def test_subscribers_of_one_tenant_share_what_is_shown() -> None:
    shown, names = ShownPictures(), named()
    first = shown.show(STATS, PICTURE, names, "a")
    assert shown.show(STATS, PICTURE, names, "a") is first
    assert first.is_as(first)
    assert not first.is_as(None)
    assert first.blocks.map is not None
    assert first.body.blocks.map is None
    found = json.loads(first.json)
    assert (found["rows"][0]["name"], found["blocks"]["map"]) == ("mine@1", None)


def test_another_tenant_gets_its_own_view() -> None:
    shown, names = ShownPictures(), named()
    shown.show(STATS, PICTURE, names, "a")
    other = shown.show(STATS, PICTURE, names, "b")
    assert other.body.rows[0].name is None
    assert b"mine@1" not in other.json
    assert shown.show(STATS, PICTURE, names, "a").body.rows[0].name == "mine@1"


def test_a_new_picture_replaces_the_last_and_is_compared_without_the_time() -> None:
    shown, names = ShownPictures(), named()
    first = shown.show(STATS, PICTURE, names, "a")
    same = shown.show(STATS, replace(PICTURE), names, "a")
    assert same is not first
    same.body.at += 1
    assert same.is_as(first)
    assert not shown.show(STATS, replace(PICTURE, step=5), names, "a").is_as(first)


def test_counts_of_an_engine_without_pictures_are_read_each_time() -> None:
    shown, names, stats = ShownPictures(), named(), EngineStats()
    first = shown.show(stats, None, names, "a")
    stats.num_running = 7
    second = shown.show(stats, None, names, "a")
    assert (first.body.running, second.body.running) == (0, 7)
    assert not second.is_as(first)
    assert second.body.shows_rows is False
