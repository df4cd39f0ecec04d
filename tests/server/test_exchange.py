"""Deadlines from measured times: who is slow is waited for, who stalls holds nobody up for long."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from small_plan import Keys, small_plan

from server.exchange import Exchanger, Pace
from server.site_directory import SiteDirectory
from server.transport import Reply
from shared.agent_messages import EXCHANGE_REPLY, Hello, HelloReply, Work, own_version
from shared.errors import MalformedMessageError
from shared.wire import Envelope, pack

SITES = ("site-0", "site-1", "site-2", "site-3")
PACE = Pace(exchange_s=1000, shortest_s=10, patience=4, poll_s=0, node_check_s=0)
WORK = Work(attempt=1, round=1, purpose="train", weights=np.zeros(48, dtype=np.float32)).to_envelope()
LIGHT = Envelope("unmask_request", {})


class Stage:
    """Sites that answer after so many seconds of a clock that moves at every look."""

    def __init__(self, needed: int | None = 3) -> None:
        self.now = 0.0
        self.after: dict[str, float] = dict.fromkeys(SITES, 5.0)
        self.connected = set(range(4))
        self._sent: dict[str, tuple[int, float]] = {}
        self.plan = small_plan(keys := Keys.of(4))
        self.keys = keys
        directory = SiteDirectory(self.plan, self, run_id="1")  # type: ignore[arg-type]
        directory._node_of = {site: i for i, site in enumerate(SITES)}
        self.directory = directory
        self.exchanger = Exchanger(self, directory, PACE, needed=needed, clock=lambda: self.now)  # type: ignore[arg-type]

    def nodes(self) -> list[int]:
        return sorted(self.connected)

    def push(self, node: int, envelope: Envelope, *, ttl_s: float) -> str:
        self._sent[f"{node}-{len(self._sent)}"] = (node, self.now)
        return list(self._sent)[-1]

    def pull(self, ids: Collection[str]) -> list[Reply]:
        self.now += 0.5
        found = []
        for message_id in ids:
            node, sent = self._sent[message_id]
            if self.now - sent >= self.after[SITES[node]]:
                found.append(Reply(message_id=message_id, node=node, content=pack(EXCHANGE_REPLY, [])))
        return found

    def exchange(self, envelope: Envelope = WORK) -> tuple[dict[str, str], float]:
        """Who was lost, and how long it took."""
        self.directory._node_of = {site: i for i, site in enumerate(SITES)}
        started = self.now
        lost = self.exchanger.run(((site, [envelope]) for site in SITES), on_parts=lambda *_: None)
        return lost, self.now - started


def test_a_slow_site_is_waited_for_as_long_as_nothing_is_measured() -> None:
    stage = Stage()
    stage.after["site-3"] = 900
    assert stage.exchange() == ({}, pytest.approx(900, abs=5))


def test_a_site_that_stalls_is_given_up_after_a_multiple_of_what_was_measured() -> None:
    stage = Stage()
    stage.after["site-2"] = 20
    assert stage.exchange()[0] == {}
    stage.after["site-3"] = 10_000
    lost, took_s = stage.exchange()
    assert lost == {"site-3": "no answer before the deadline"}
    assert took_s == pytest.approx(80, abs=9)
    # More patience after each miss, and never more than the longest time.
    assert [stage.exchange()[1] for _ in range(3)] == [pytest.approx(t, rel=0.05) for t in (325, 1000, 1000)]


def test_nobody_is_given_up_as_slow_while_the_round_would_fail_without_them() -> None:
    stage = Stage(needed=3)
    stage.exchange()
    stage.after.update({"site-2": 500, "site-3": 10_000})
    lost, took_s = stage.exchange()
    assert lost == {"site-3": "no answer before the deadline"}
    assert took_s == pytest.approx(500, abs=5), "site-2 was the third, and came after the soft deadline"


def test_work_and_messages_are_measured_apart() -> None:
    stage = Stage()
    stage.after = dict.fromkeys(SITES, 200.0)
    stage.exchange(WORK)
    stage.after = dict.fromkeys(SITES, 2.0)
    stage.exchange(LIGHT)
    stage.after["site-3"] = 10_000
    assert stage.exchange(LIGHT)[1] == pytest.approx(PACE.shortest_s, abs=9)
    assert stage.exchange(WORK)[1] == pytest.approx(800, abs=15)


def test_a_dead_site_is_dropped_when_its_heartbeat_lapses() -> None:
    stage = Stage()
    stage.after["site-1"] = 10_000
    stage.connected.discard(1)
    lost, took_s = stage.exchange()
    assert lost == {"site-1": "its node is gone"}
    assert took_s < 10


def hello(stage: Stage, version: str) -> None:
    """Site 0 answers a hello with a version."""
    asked = Hello(nonce="0" * 64, plan_sha256=stage.plan.digest().hex(), run_id="1")
    key = stage.keys.sites[0]
    answer = HelloReply.sign(asked, site_id="site-0", last_attempt=0, version=version, key=key)
    stage.directory._accept(0, asked, answer.to_envelope())


@pytest.mark.parametrize(("version", "taken"), [(own_version(), True), ("0.1.99", True), ("0.2.0", False)])
def test_a_site_of_another_version_is_left_out_and_named(version: str, taken: bool) -> None:
    stage = Stage()
    stage.directory._node_of.clear()
    hello(stage, version)
    assert ("site-0" in stage.directory.reachable) == taken
    assert stage.directory.other_versions == ({} if taken else {"site-0": version})
    hello(stage, own_version())
    assert (stage.directory.reachable, stage.directory.other_versions) == (("site-0",), {})


@pytest.mark.parametrize("body", [{"version": "x y"}, {"version": 3}, {"version": "1" * 65}])
def test_a_hello_with_a_malformed_version_is_refused(body: dict[str, Any]) -> None:
    good = Hello(nonce="0" * 64, plan_sha256="0" * 64, run_id="1").to_envelope()
    with pytest.raises(MalformedMessageError, match="version"):
        Hello.from_envelope(Envelope("hello", good.body | body))
