"""Pictures are taken only while somebody watches."""

from __future__ import annotations

import asyncio

import pytest

from server.engine.messages import BatchPicture, Watch
from server.engine.process.watching import LEASE_SECONDS, PICTURE_SECONDS, RENEW_SECONDS, EngineView, PictureLease
from server.errors import EngineNotReadyError

PICTURE = BatchPicture(
    step=1, sequences=[], runs=[], num_blocks=1, num_used_blocks=0, num_idle_blocks=0, block_map=b"\0"
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_takes_pictures_at_intervals_and_ends() -> None:
    clock, taken = Clock(), []
    lease = PictureLease(lambda: taken.append(clock.now), clock)
    for _ in range(5):
        lease.stepped(has_work=True)
    assert taken == [], "nobody watches"
    lease.renew(1.0)
    assert taken == [100.0]
    for _ in range(50):
        clock.now += PICTURE_SECONDS / 4
        lease.stepped(has_work=True)
    assert 4 <= len(taken) <= 1 + 1.0 / PICTURE_SECONDS
    assert taken[-1] < 101.0


def test_the_last_step_before_idleness_is_shown_at_once() -> None:
    clock, taken = Clock(), []
    lease = PictureLease(lambda: taken.append(clock.now), clock)
    lease.renew(10.0)
    clock.now += 0.001
    lease.stepped(has_work=True)
    assert len(taken) == 1
    clock.now += 0.001
    lease.stepped(has_work=False)
    assert len(taken) == 2


@pytest.mark.anyio
async def test_a_view_renews_its_lease_and_returns_the_newest_picture() -> None:
    clock = Clock()
    sent: list[Watch] = []
    view = EngineView(sent.append, clock)
    looking = asyncio.create_task(view.look())
    await asyncio.sleep(0)
    assert sent == [Watch(LEASE_SECONDS)]
    view.receive(PICTURE)
    assert await looking is PICTURE
    assert await view.look() is PICTURE
    assert len(sent) == 1
    clock.now += RENEW_SECONDS
    assert await view.look() is PICTURE
    assert len(sent) == 2
    clock.now += LEASE_SECONDS
    looking = asyncio.create_task(view.look())
    await asyncio.sleep(0)
    assert not looking.done(), "the picture is from an earlier lease"
    view.reset()
    with pytest.raises(EngineNotReadyError):
        await looking
