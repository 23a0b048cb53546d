"""The ranking of replicas, for any state of them."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cluster.routing.ranking import (
    BALANCE,
    HOMES,
    PATIENCE,
    ReplicaRanking,
    ReplicaState,
    hashed_order,
    load_bound,
    short,
)

DIGESTS = [f"{number:016x}" for number in range(6)]

digests = st.sampled_from(DIGESTS)
replicas = st.lists(
    st.builds(
        ReplicaState,
        id=st.text("abcdefgh0123", min_size=1, max_size=6),
        load=st.integers(0, 12),
        capacity=st.integers(1, 10),
        warm=st.frozensets(digests),
        stored=st.frozensets(digests),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda replica: replica.id,
)


def ranks(states: list[ReplicaState], digest: str | None, seed: int = 0) -> list[list[str]]:
    return list(ReplicaRanking(random=Random(seed)).ranks(states, digest))


def first_of(states: list[ReplicaState], digest: str) -> ReplicaState:
    first = ranks(states, digest)[0][0]
    return next(replica for replica in states if replica.id == first)


@given(replicas, st.none() | digests)
def test_every_replica_is_ranked_once(states: list[ReplicaState], digest: str | None) -> None:
    found = ranks(states, digest)
    assert all(found)
    assert sorted(id_ for rank in found for id_ in rank) == sorted(replica.id for replica in states)


@given(replicas, st.none() | digests)
def test_a_full_replica_comes_after_all_that_have_room(states: list[ReplicaState], digest: str | None) -> None:
    full = {replica.id for replica in states if replica.load >= replica.capacity}
    flat = [id_ for rank in ranks(states, digest) for id_ in rank]
    assert set(flat[len(flat) - len(full) :]) == full


@given(replicas, digests)
def test_a_replica_above_the_bounds_is_only_chosen_if_all_with_room_are(
    states: list[ReplicaState], digest: str
) -> None:
    first = first_of(states, digest)
    bound, patient = load_bound(states, BALANCE), load_bound(states, PATIENCE)
    if any(not replica.is_full and replica.load < bound for replica in states):
        assert first.load < (patient if digest in first.warm else bound)


@given(replicas, digests)
def test_warmth_decides_below_the_bounds(states: list[ReplicaState], digest: str) -> None:
    first = first_of(states, digest)
    bound, patient = load_bound(states, BALANCE), load_bound(states, PATIENCE)
    open_ = [replica for replica in states if not replica.is_full]
    below = [replica for replica in open_ if replica.load < bound]
    homes = hashed_order([replica.id for replica in states], digest)[:HOMES]
    for group in (
        [replica.id for replica in below if digest in replica.warm],
        [replica.id for replica in open_ if digest in replica.warm and replica.load < patient],
        [replica.id for replica in below if digest in replica.stored],
        [replica.id for replica in below if replica.id in homes],
    ):
        if group:
            assert first.id == hashed_order(group, digest)[0]
            break


@given(replicas, st.integers(0, 99))
def test_the_base_goes_to_the_less_loaded_of_two(states: list[ReplicaState], seed: int) -> None:
    by_id = {replica.id: replica for replica in states}
    first = ranks(states, None, seed)[0]
    open_ = [replica for replica in states if not replica.is_full]
    if open_:
        assert len(first) == min(2, len(open_))
        assert by_id[first[0]].load == min(by_id[id_].load for id_ in first)


def test_the_base_reaches_all_replicas_evenly() -> None:
    states = [ReplicaState(id=f"r{number}", load=0, capacity=8) for number in range(4)]
    ranking = ReplicaRanking(random=Random(0))
    seen = Counter(next(ranking.ranks(states, None))[0] for _ in range(4000))
    assert min(seen.values()) > 850


@given(st.sets(st.text("abcdef", min_size=1, max_size=5), min_size=2, max_size=12), digests)
def test_only_soft_prompts_of_a_lost_replica_move(ids: set[str], digest: str) -> None:
    before = hashed_order(sorted(ids), digest)
    for lost in ids:
        assert hashed_order(sorted(ids - {lost}), digest) == [id_ for id_ in before if id_ != lost]


def test_hashing_spreads_soft_prompts_evenly() -> None:
    ids = [f"r{number}" for number in range(8)]
    seen = Counter(hashed_order(ids, f"{number:064x}")[0] for number in range(8000))
    assert all(800 < seen[id_] < 1200 for id_ in ids)


def test_a_popular_soft_prompt_spreads_when_its_replica_is_above_the_bound() -> None:
    digest = DIGESTS[0]
    states = [ReplicaState(id=f"r{number}", load=0, capacity=64) for number in range(4)]
    ranking = ReplicaRanking(random=Random(0))
    for _ in range(80):
        chosen = next(ranking.ranks(states, digest))[0]
        replica = next(replica for replica in states if replica.id == chosen)
        replica.load += 1
        replica.warm = {*replica.warm, digest}
    assert max(replica.load for replica in states) <= 30  # PATIENCE times the mean of 20
    assert sum(digest in replica.warm for replica in states) >= 3


def test_a_single_copy_waits_longer_than_one_of_several() -> None:
    digest = DIGESTS[0]
    first, second, third = hashed_order(["a", "b", "c"], digest)

    def chosen(warm: set[str], load: int) -> str:
        loads = {first: load, second: 10, third: 10}
        states = [
            ReplicaState(id=id_, load=loads[id_], capacity=99, warm={digest} if id_ in warm else ()) for id_ in loads
        ]
        return ranks(states, digest)[0][0]

    assert chosen({first}, 14) == first
    assert chosen({first, third}, 14) == third
    assert chosen({first}, 24) == second


@pytest.mark.parametrize(("balance", "patience", "homes"), [(1.0, 1.5, 2), (1.5, 1.2, 2), (1.2, 1.5, 0)])
def test_impossible_settings_are_refused(balance: float, patience: float, homes: int) -> None:
    with pytest.raises(ValueError, match="1 < balance <= patience and homes >= 1 must hold"):
        ReplicaRanking(balance=balance, patience=patience, homes=homes)


def test_reports_name_the_beginning_of_a_digest() -> None:
    assert short("0123456789abcdef" * 4) == "0123456789abcdef"
