"""A consortium under an operation list: all messages under way or ever seen, and what must hold at the end.

Sites, server, keys, signatures and masks are the real ones; only the network is played. Whatever a site ever
answered counts as known to the server, whether it arrived or not. What a restart leaves: at a site its
identity and the attempt register, at the server the largest attempt number.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from knowledge import Knowledge, Upload

from privacy.secagg import keys, server_collections, server_rounds, site_masking
from privacy.secagg.messages import AdvertiseReply, ShareReply, UnmaskReply, UploadReply
from privacy.secagg.reasons import AttemptAbortedError, BadReplyError
from privacy.secagg.server_rounds import ServerAttempt
from privacy.secagg.transitions import ServerStage
from shared.errors import ProtocolRefusedError
from shared.identity import BadSignatureError, VerifyKey
from shared.wire import Envelope

WEIGHTS, WORK = b"\x01" * 32, b"\x02" * 32


@contextmanager
def each_input_once() -> Iterator[None]:
    """The same signature is verified, the same pair of keys agreed by every site: within a schedule each
    distinct input is computed once, by the real functions, and recalled."""
    verify = VerifyKey.verify_raw

    @functools.cache
    def verifies(key: VerifyKey, signature: bytes, message: bytes) -> bool:
        try:
            verify(key, signature, message)
        except BadSignatureError:
            return False
        return True

    def recalled(key: VerifyKey, signature: bytes, message: bytes) -> None:
        if not verifies(key, signature, message):
            raise BadSignatureError("does not verify")

    agree = functools.cache(keys.agree)
    with ExitStack() as stack:
        stack.enter_context(patch.object(VerifyKey, "verify_raw", recalled))
        for module in (keys, server_collections, server_rounds):
            stack.enter_context(patch.object(module, "agree", agree))
        yield


class World:
    """The operations are the methods named in OPERATIONS; each takes a number that it chooses with."""

    OPERATIONS = (
        "settle", "settle", "deadline", "deadline", "finish", "begin", "deliver", "answer", "drop_request",
        "drop_reply", "duplicate_request", "duplicate_reply", "replay_request", "replay_reply", "reorder",
        "delay", "restart_site", "restart_server",
    )  # fmt: skip

    def __init__(self, consortium: Any, n: int, c: int, t: int) -> None:
        self.group = consortium(n, c, t, length=1)
        self._parsed: dict[int, tuple[Any, Any]] = {}
        self._parse, self.group.arrived = self.group.arrived, self._arrived
        self.servers: dict[int, ServerAttempt] = {}
        self.outcomes: dict[int, str] = {}
        self.requests: list[tuple[int, str, Any]] = []
        self.replies: list[tuple[int, str, Envelope]] = []
        self.old_requests: list[tuple[int, str, Any]] = []
        self.old_replies: list[tuple[int, str, Envelope]] = []
        self.refusals: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.public: set[bytes] = set()
        self.mask_keys: set[tuple[bytes, str]] = set()
        self.knowledge: dict[int, Knowledge] = {}
        self.dealers: dict[int, dict[str, tuple[str, ...]]] = {}
        self.survivors: dict[int, tuple[str, ...]] = {}
        self.revealed: dict[tuple[int, str, str], set[str]] = {}

    # the coordinator

    @property
    def last(self) -> int:
        """The largest attempt number: what the server's store keeps."""
        return max(self.outcomes, default=0)

    def begin(self, _: int) -> None:
        """Open an attempt, beside whatever is under way."""
        number = self.last + 1
        self.outcomes[number] = "under way"
        server = self.servers[number] = self.group.server(number)
        self._send(number, server.build_advertise_requests())

    def deadline(self, choice: int) -> None:
        """Time is up for what an attempt waits for: the newest mostly, any now and then."""
        if not self.servers:
            return self.begin(choice)
        numbers = sorted(self.servers, reverse=True)
        self._step(numbers[choice % len(numbers) if choice % 4 == 0 else 0])

    def finish(self, choice: int) -> None:
        """The newest attempt goes on undisturbed by anything new until it ends."""
        if not self.servers:
            self.begin(choice)
        number = max(self.servers)
        while number in self.servers:
            self.settle(choice)
            self._step(number)

    def restart_server(self, _: int) -> None:
        """Attempts and sums are lost; messages under way are not."""
        for number in self.servers:
            self.outcomes[number] = "lost"
        self.servers.clear()

    def _step(self, number: int) -> None:
        server = self.servers[number]
        try:
            match server.stage:
                case ServerStage.KEYS:
                    self._send(number, server.build_share_requests())
                case ServerStage.SHARES:
                    self._send(number, server.build_upload_requests(WEIGHTS, WORK))
                case ServerStage.UPLOADS:
                    server.close_uploads()
                    confirming = server.needs_confirmation
                    build = server.build_confirm_requests if confirming else server.build_unmask_requests
                    self._send(number, build())
                case ServerStage.CONFIRMATIONS:
                    self._send(number, server.build_unmask_requests())
                case _:
                    self._complete(number, server.total())
        except AttemptAbortedError as error:
            assert server.stage is ServerStage.ABORTED
            self.outcomes[number] = str(error.reason)
            del self.servers[number]

    def _complete(self, number: int, total: np.ndarray) -> None:
        server = self.servers.pop(number)
        assert len(server.survivors) >= self.group.parameters.threshold
        np.testing.assert_array_equal(total, self.group.expected(server.survivors))
        assert set(server.survivors) <= set(self.knowledge[number].uploads)
        self.survivors[number] = server.survivors
        self.outcomes[number] = "completed"

    # the network

    def _send(self, number: int, requests: dict[str, Any]) -> None:
        self.requests += [(number, name, request) for name, request in requests.items()]

    def settle(self, _: int) -> None:
        """Everything under way arrives, and so does every answer."""
        while self.requests:
            self.deliver(0)
        while self.replies:
            self.answer(0)

    def deliver(self, choice: int) -> None:
        """One request arrives."""
        if self.requests:
            item = self.requests.pop(choice % len(self.requests))
            self.old_requests.append(item)
            self._ask(*item)

    def answer(self, choice: int) -> None:
        """One reply arrives."""
        if self.replies:
            item = self.replies.pop(choice % len(self.replies))
            self.old_replies.append(item)
            self._accept(*item)

    def drop_request(self, choice: int) -> None:
        if self.requests:
            self.old_requests.append(self.requests.pop(choice % len(self.requests)))

    def drop_reply(self, choice: int) -> None:
        if self.replies:
            self.old_replies.append(self.replies.pop(choice % len(self.replies)))

    def duplicate_request(self, choice: int) -> None:
        """A request arrives, and is still under way."""
        if self.requests:
            self._ask(*self.requests[choice % len(self.requests)])

    def duplicate_reply(self, choice: int) -> None:
        if self.replies:
            self._accept(*self.replies[choice % len(self.replies)])

    def replay_request(self, choice: int) -> None:
        """An old request arrives again: of this attempt or of any earlier one."""
        if self.old_requests:
            self._ask(*self.old_requests[choice % len(self.old_requests)])

    def replay_reply(self, choice: int) -> None:
        if self.old_replies:
            self._accept(*self.old_replies[choice % len(self.old_replies)])

    def reorder(self, choice: int) -> None:
        chance = random.Random(choice)
        chance.shuffle(self.requests)
        chance.shuffle(self.replies)

    def delay(self, choice: int) -> None:
        """The deadline passes while messages are under way; they arrive after it."""
        self.deadline(choice)
        self.settle(choice)

    def restart_site(self, choice: int) -> None:
        self.group.restart(self.group.names[choice % len(self.group.names)])

    def _ask(self, number: int, name: str, request: Any) -> None:
        try:
            envelope = self.group.ask(name, request)
        except ProtocolRefusedError as error:
            self.refusals[error.reason] += 1
            return
        self._observe(number, name, envelope)
        self.replies.append((number, name, envelope))

    def _arrived(self, request: Any) -> Any:
        """One request goes to many sites, and again: it is taken through its bytes once."""
        if id(request) not in self._parsed:
            self._parsed[id(request)] = (request, self._parse(request))
        return self._parsed[id(request)][1]

    def _accept(self, number: int, name: str, envelope: Envelope) -> None:
        if number not in self.servers:
            return
        try:
            self.servers[number].accept(name, envelope)
        except BadReplyError as error:
            assert error.site_id == name
            self.faults[error.reason] += 1

    # what is known

    def _observe(self, number: int, name: str, envelope: Envelope) -> None:
        held = self.knowledge.setdefault(number, Knowledge(self.group.parameters.threshold))
        if envelope.kind == AdvertiseReply.KIND:
            keys = AdvertiseReply.from_envelope(envelope).keys
            for key in (keys.mask_public, keys.share_public, keys.seed_commitment):
                assert key not in self.public, "a key is used twice"
                self.public.add(key)
        elif envelope.kind == ShareReply.KIND:
            shares = ShareReply.from_envelope(envelope).shares
            assert name not in self.dealers.setdefault(number, {}), "a site dealt twice"
            self.dealers[number][name] = tuple(share.recipient for share in shares)
        elif envelope.kind == UploadReply.KIND:
            assert name not in held.uploads, "a site uploaded twice"
            state = self.group.sites[name]._open
            held.uploads[name] = Upload(state.peers, state.terms)
        elif envelope.kind == UnmaskReply.KIND:
            for share in UnmaskReply.from_envelope(envelope).shares:
                self.revealed.setdefault((number, name, share.owner), set()).add(share.kind)
                held.learn(name, share.owner, share.kind)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record every key that a site expands, and for which direction: none may come back."""
        expand: Callable[..., np.ndarray] = site_masking.masked_residues

        def recorded(vector: np.ndarray, bits: int, plus: list[bytes], minus: list[bytes]) -> np.ndarray:
            for key, direction in [(key, "plus") for key in plus] + [(key, "minus") for key in minus]:
                assert (key, direction) not in self.mask_keys, "a mask is used twice"
                self.mask_keys.add((key, direction))
            return expand(vector, bits, plus, minus)

        with patch.object(site_masking, "masked_residues", recorded):
            yield

    def check(self) -> None:
        """What must hold when no attempt is under way any more."""
        assert not self.servers
        assert all(outcome != "under way" for outcome in self.outcomes.values())
        for (_, name, owner), kinds in self.revealed.items():
            assert len(kinds) == 1, f"{name} revealed both secrets of {owner}"
        for number, held in self.knowledge.items():
            self._check_attempt(number, held)
        for name, numbers in self.group.register.items():
            assert numbers == sorted(set(numbers)), name

    def _check_attempt(self, number: int, held: Knowledge) -> None:
        parameters = self.group.parameters
        t, c = parameters.threshold, parameters.max_colluding
        sums = held.sums()
        assert len(sums) <= 1, "more than one sum of an attempt came out"
        assert all(len(names) >= t for names in sums), f"a sum over {sums} of fewer than {t} came out"
        if self.outcomes[number] == "completed":
            assert [set(names) for names in sums] == [set(self.survivors[number])]
        dealers = self.dealers.get(number, {})
        sets = list(itertools.combinations(self.group.names, c))
        for colluders in random.Random(number).sample(sets, min(4, len(sets))):
            sums = held.with_colluders(colluders, dealers).sums(colluders)
            assert len(sums) <= 1
            assert all(len(names) >= t - c for names in sums), f"{colluders} and the server open {sums}"


def simulate(consortium: Any, size: tuple[int, int, int], operations: list[tuple[str, int]]) -> World:
    """Run the operations, end whatever is under way, then one attempt that nothing disturbs."""
    world = World(consortium, *size)
    with each_input_once(), world.watching():
        world.begin(0)
        for operation, choice in operations:
            getattr(world, operation)(choice)
        while world.servers:
            world.deadline(1)
        world.check()
        world.requests.clear()
        world.replies.clear()
        world.begin(0)
        world.finish(0)
    assert world.outcomes[world.last] == "completed", "after any schedule an undisturbed attempt completes"
    assert world.survivors[world.last] == tuple(world.group.names)
    world.check()
    return world
