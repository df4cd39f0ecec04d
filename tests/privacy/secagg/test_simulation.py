"""Random schedules: requests and replies dropped, replayed, reordered, delayed; sites and server crash.

Every site gives a power of two, so a total shows whose vectors are in it. What a restart leaves: at a
site its identity and attempt register, at the server the largest attempt number. Several attempts may be
under way at once, and old messages come back at any time.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy.secagg.messages import AdvertiseReply, UnmaskReply
from privacy.secagg.reasons import AttemptAbortedError, BadReplyError
from privacy.secagg.server_rounds import ServerAttempt
from shared.errors import ProtocolRefusedError
from shared.wire import Envelope

WEIGHTS, WORK = b"\x01" * 32, b"\x02" * 32

OPERATIONS = st.sampled_from(
    ["settle"] * 6
    + ["advance"] * 8
    + ["deliver", "answer", "drop_request", "drop_reply", "replay_request", "replay_reply"]
    + ["reorder", "restart_site", "restart_server", "begin", "begin"]
)
SCHEDULES = st.tuples(
    st.sampled_from([(3, 1, 3), (4, 1, 3), (5, 1, 4), (5, 2, 4), (7, 1, 5)]),
    st.lists(st.tuples(OPERATIONS, st.integers(0, 2**16)), min_size=8, max_size=60),
)


class World:
    """The consortium, all messages under way and ever seen, and the invariants."""

    def __init__(self, consortium: Any, n: int, c: int, t: int) -> None:
        self.group = consortium(n, c, t, length=2)
        self.servers: dict[int, tuple[ServerAttempt, list[str]]] = {}
        self.last = 0
        self.requests: list[tuple[int, str, Any]] = []
        self.replies: list[tuple[int, str, Envelope]] = []
        self.old_requests: list[tuple[int, str, Any]] = []
        self.old_replies: list[tuple[int, str, Envelope]] = []
        self.public_keys: set[bytes] = set()
        self.uploads: set[tuple[int, str]] = set()
        self.revealed: dict[tuple[int, str], dict[str, str]] = {}
        self.completed: list[int] = []

    def begin(self, _: int) -> None:
        self.last += 1
        server = self.group.server(self.last)
        self.servers[self.last] = (server, ["shares", "uploads", "close"])
        self._send(self.last, server.build_advertise_requests())

    def _send(self, number: int, requests: dict[str, Any]) -> None:
        self.requests += [(number, name, request) for name, request in requests.items()]

    def advance(self, choice: int) -> None:
        """A deadline passes at one of the attempts under way."""
        if not self.servers:
            return self.begin(choice)
        number = sorted(self.servers)[-1 - choice % 5 // 4 % len(self.servers)]
        server, steps = self.servers[number]
        step = steps.pop(0)
        try:
            if step == "shares":
                self._send(number, server.build_share_requests())
            elif step == "uploads":
                self._send(number, server.build_upload_requests(WEIGHTS, WORK))
            elif step == "close":
                server.close_uploads()
                if server.needs_confirmation:
                    self._send(number, server.build_confirm_requests())
                    steps += ["unmask", "total"]
                else:
                    self._send(number, server.build_unmask_requests())
                    steps.append("total")
            elif step == "unmask":
                self._send(number, server.build_unmask_requests())
            else:
                total = server.total()
                assert len(server.survivors) >= self.group.parameters.threshold
                np.testing.assert_array_equal(total, self.group.expected(server.survivors))
                assert all((number, name) in self.uploads for name in server.survivors)
                self.completed.append(number)
                del self.servers[number]
        except AttemptAbortedError:
            del self.servers[number]

    def settle(self, _: int) -> None:
        """Everything under way arrives, and so does every answer."""
        while self.requests:
            self.deliver(0)
        while self.replies:
            self.answer(0)

    def deliver(self, choice: int, *, again: bool = False) -> None:
        queue = self.old_requests if again else self.requests
        if not queue:
            return
        place = choice % len(queue)
        number, name, request = queue[place] if again else queue.pop(place)
        if not again:
            self.old_requests.append((number, name, request))
        try:
            envelope = self.group.ask(name, request)
        except ProtocolRefusedError:
            return
        self._observe(number, name, envelope)
        self.replies.append((number, name, envelope))

    def _observe(self, number: int, name: str, envelope: Envelope) -> None:
        if envelope.kind == AdvertiseReply.KIND:
            keys = AdvertiseReply.from_envelope(envelope).keys
            for key in (keys.mask_public, keys.share_public, keys.seed_commitment):
                assert key not in self.public_keys, "a key was used twice"
                self.public_keys.add(key)
        elif envelope.kind == "secagg_upload_reply":
            assert (number, name) not in self.uploads, "a site uploaded twice"
            self.uploads.add((number, name))
        elif envelope.kind == UnmaskReply.KIND:
            assert (number, name) not in self.revealed, "a site revealed twice"
            shares = UnmaskReply.from_envelope(envelope).shares
            self.revealed[number, name] = {share.owner: share.kind for share in shares}
            assert self.revealed[number, name][name] == "seed"

    def answer(self, choice: int, *, again: bool = False) -> None:
        queue = self.old_replies if again else self.replies
        if not queue:
            return
        place = choice % len(queue)
        number, name, envelope = queue[place] if again else queue.pop(place)
        if not again:
            self.old_replies.append((number, name, envelope))
        if number not in self.servers:
            return
        try:
            self.servers[number][0].accept(name, envelope)
        except BadReplyError as error:
            assert error.site_id == name

    def run(self, operation: str, choice: int) -> None:
        if operation == "drop_request" and self.requests:
            self.old_requests.append(self.requests.pop(choice % len(self.requests)))
        elif operation == "drop_reply" and self.replies:
            self.old_replies.append(self.replies.pop(choice % len(self.replies)))
        elif operation == "replay_request":
            self.deliver(choice, again=True)
        elif operation == "replay_reply":
            self.answer(choice, again=True)
        elif operation == "reorder":
            self.requests.reverse()
            self.replies.reverse()
        elif operation == "restart_site":
            self.group.restart(self.group.names[choice % len(self.group.names)])
        elif operation == "restart_server":
            self.servers.clear()
        elif operation in ("settle", "advance", "deliver", "answer", "begin"):
            getattr(self, operation)(choice)

    def check(self) -> None:
        """What all sites together ever revealed, whether or not the server received it."""
        t, c = self.group.parameters.threshold, self.group.parameters.max_colluding
        shares: dict[tuple[int, str], dict[str, int]] = defaultdict(lambda: {"seed": 0, "key": 0})
        for (number, _), kinds in self.revealed.items():
            for owner, kind in kinds.items():
                shares[number, owner][kind] += 1
        for counts in shares.values():
            assert min(counts.values()) + c < t, "both secrets of a site are within reach"
        sets = defaultdict(set)
        for (number, _), kinds in self.revealed.items():
            sets[number].add(tuple(sorted(owner for owner, kind in kinds.items() if kind == "seed")))
        for chosen in sets.values():
            assert len(chosen) == 1, "two survivor sets were opened for one attempt"
            assert len(chosen.pop()) >= t
        for name, numbers in self.group.register.items():
            assert numbers == sorted(set(numbers)), name


def simulate(consortium: Any, schedule: tuple[tuple[int, int, int], list[tuple[str, int]]]) -> World:
    world = World(consortium, *schedule[0])
    world.begin(0)
    for operation, choice in schedule[1]:
        world.run(operation, choice)
    world.check()
    world.servers.clear()
    world.requests.clear()
    world.begin(0)
    for _ in range(5):
        world.settle(0)
        if world.last in world.servers:
            world.advance(0)
    assert world.completed[-1:] == [world.last], "after any schedule an undisturbed attempt completes"
    world.check()
    return world


QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@settings(max_examples=100, deadline=None, suppress_health_check=QUIET, derandomize=True, database=None)
@given(SCHEDULES)
def test_100_schedules(consortium, schedule):
    simulate(consortium, schedule)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=10_000, deadline=None, suppress_health_check=QUIET, database=None)
@given(SCHEDULES)
def test_10000_schedules(consortium, schedule):
    simulate(consortium, schedule)


def test_schedules_do_complete_attempts_with_drops(consortium):
    """The simulation is not vacuous: a lost reply leads to a smaller, right total."""
    schedule = [("settle", 0), ("advance", 0), ("settle", 0), ("advance", 0), ("drop_request", 0)]
    schedule += [("settle", 0), ("advance", 0), ("settle", 0), ("advance", 0), ("settle", 0), ("advance", 0)]
    world = simulate(consortium, ((4, 1, 3), schedule))
    assert world.completed == [1, 2]
    assert sum(number == 1 for number, _ in world.uploads) == 3
