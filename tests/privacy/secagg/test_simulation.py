"""Random schedules: messages dropped, doubled, replayed, reordered, late; crashes; attempts in parallel.

Every site gives a power of two, so a total shows whose vectors are in it. After each schedule: every
completed attempt gave the sum over exactly its survivors, every other one ended without; no site revealed
both secrets of a peer; what was revealed determines, by linear algebra, no sum over fewer than t sites, nor,
with c of the sites colluding, over fewer than t - c others; no key, seed or mask served twice.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_world import World, simulate

from privacy.secagg import site_rounds, site_unmasking

SMALL = [(3, 1, 3), (4, 1, 3), (5, 1, 4), (5, 2, 4), (6, 1, 4)]
LARGE = [(7, 1, 5), (9, 2, 6), (12, 1, 7)]
SIZES = SMALL * 3 + LARGE
SCHEDULES = st.tuples(
    st.sampled_from(SIZES),
    st.lists(st.tuples(st.sampled_from(World.OPERATIONS), st.integers(0, 2**16)), min_size=10, max_size=50),
)
QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@pytest.mark.timeout(1800)
@settings(max_examples=500, deadline=None, suppress_health_check=QUIET, derandomize=True, database=None)
@given(SCHEDULES)
def test_500_schedules(consortium, schedule):
    simulate(consortium, *schedule)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=10_000, deadline=None, suppress_health_check=QUIET, database=None)
@given(SCHEDULES)
def test_10000_schedules(consortium, schedule):
    simulate(consortium, *schedule)


@pytest.mark.parametrize("size", sorted(set(SIZES)))
def test_many_rounds_with_losses(consortium, size):
    """The schedules are not vacuous: rounds complete with and without drops, and attempts are aborted."""
    operations = []
    for place in range(8):
        operations += [("begin", 0), ("settle", 0), ("deadline", 1), ("settle", 0), ("deadline", 1)]
        operations += [("drop_request", place)] * (place % 3) + [("finish", 0)]
    world = simulate(consortium, size, operations)
    n, _, t = size
    spare = Counter(min(place % 3, n) for place in range(8))
    lost = {drops: count for drops, count in spare.items() if n - drops < t}
    outcomes = Counter(world.outcomes.values())
    assert outcomes["too_few_uploads"] == sum(lost.values())
    assert outcomes["completed"] >= 9 - sum(lost.values())
    dropped = [len(world.survivors[number]) for number in world.survivors]
    assert (min(dropped) < n) == (n > t)


def test_what_the_network_does_is_met_by_the_named_refusals(consortium):
    world = World(consortium, 5, 1, 4)
    with world.watching():
        world.begin(0)
        for _ in range(3):
            world.duplicate_request(0)
            world.duplicate_reply(0)
            world.settle(0)
            world.deadline(1)
        world.delay(1)
        world.finish(0)
        world.begin(0)
        world.restart_site(2)
        for choice in range(0, 4000, 97):
            world.replay_request(choice)
            world.replay_reply(choice)
        world.finish(0)
        while world.servers:
            world.deadline(1)
    world.check()
    assert set(world.refusals) >= {"attempt_not_new", "out_of_order", "attempt_closed"}
    assert set(world.faults) & {"late", "repeated"}


def test_a_site_that_forgets_to_close_is_noticed(consortium, monkeypatch):
    """The invariants can fail: with a site that answers a second unmask request, and takes any set."""
    monkeypatch.setattr(site_rounds.SiteSecureAggregation, "_close_open", lambda _: None)
    monkeypatch.setattr(site_unmasking.UploadedState, "check_released", lambda *_: None)
    operations = [("begin", 0)] + [("settle", 0), ("deadline", 1)] * 2
    world = World(consortium, 4, 1, 3)
    for operation, choice in operations:
        getattr(world, operation)(choice)
    world.settle(0)
    number = world.last
    server = world.servers[number]
    server.close_uploads()
    request = server.build_unmask_requests()["site-0"]
    world._ask(number, "site-0", request)
    smaller = type(request)(attempt=request.attempt, uploads=request.uploads[:3], confirmations=())
    world._ask(number, "site-0", smaller)
    world.servers.clear()
    world.outcomes[number] = "lost"
    with pytest.raises(AssertionError, match="both secrets"):
        world.check()
