"""How the round driver sends messages to nodes, without knowing what carries them.

A :class:`Transport` pushes one envelope to one node and is asked later for the replies that have come.
It never blocks on a node: waiting, deadlines and retries are the driver's. Over Flower it is
``server.server_app.FlowerTransport``; here is :class:`InMemoryTransport`, which runs the same agents in
this process for tests, simulations and benchmarks. Both carry the bytes of ``shared/WIRE_FORMAT.md``.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from shared.errors import LacunaError
from shared.wire import Envelope, decode, encode

Handler = Callable[[Envelope, Any], Envelope]
"""A site agent: takes a request and what is known of its sender, returns the reply, never raises."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back for one pushed message: an envelope, or in words why there will never be one.

    Words mean that the transport gave the message up (node gone, time to live over, courier crashed); an
    agent's own refusal, and a courier that cannot reach its agent, are envelopes of kind ``refused``.
    """

    message_id: str
    node: int
    content: Envelope | str


class Transport(Protocol):
    """Carries envelopes between the round driver and nodes. Calls come from one thread."""

    def nodes(self) -> list[int]:
        """Ids of the nodes that are connected now, ascending."""

    def push(self, node: int, envelope: Envelope, *, ttl_s: float) -> str:
        """Send one envelope and return the message's id; the reply is worth nothing after ``ttl_s``.

        A node that is gone is no error here: the reply says so.

        Raises:
            CoordinatorError: the transport itself does not take the message.
        """

    def pull(self, ids: Collection[str]) -> list[Reply]:
        """The replies that have arrived for these messages, each returned once; does not wait.

        Ask only for messages that were not answered yet.
        """


class Fate(Enum):
    """What a test's fault hook does to one leg of one message."""

    DELIVER = "deliver"
    DROP = "drop"
    KILL = "kill"
    """The node dies at this point: this message and all later ones fail, until it is revived."""


FaultHook = Callable[[int, str, Envelope], Fate]
"""Called with node, ``"request"`` or ``"reply"``, and the envelope on that leg."""


@dataclass
class _Sent:
    node: int
    expires_at: float
    frame: bytes
    future: Future[bytes | None] | None = None
    lost: bool = False


class InMemoryTransport:
    """Agents in this process, behind the same interface and the same bytes as Flower.

    Args:
        agents: Handler of each node.
        threads: How many agents work at once; 0 runs each handler inside :meth:`pull`, in the order of
            pushing, so that a test is deterministic.
        fault: Decides the fate of every request and reply; for tests.
        clock: Seconds, monotonic; a simulation passes its own.
        lost_at_once: Report a dropped message at the next pull rather than when its time to live is over.
    """

    def __init__(
        self,
        agents: Mapping[int, Handler],
        *,
        threads: int = 0,
        fault: FaultHook | None = None,
        clock: Callable[[], float] = time.monotonic,
        lost_at_once: bool = False,
    ) -> None:
        self._agents = dict(agents)
        self._fault = fault
        self._clock = clock
        self._lost_at_once = lost_at_once
        self._dead: set[int] = set()
        self._sent: dict[str, _Sent] = {}
        self._numbers = itertools.count(1)
        self._locks = {node: threading.Lock() for node in agents}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="agent") if threads else None
        self.bytes_down = 0
        self.bytes_up = 0

    def nodes(self) -> list[int]:
        return sorted(node for node in self._agents if node not in self._dead)

    def push(self, node: int, envelope: Envelope, *, ttl_s: float) -> str:
        message_id = f"m{next(self._numbers)}"
        sent = _Sent(node=node, expires_at=self._clock() + ttl_s, frame=encode(envelope))
        self.bytes_down += len(sent.frame)
        self._sent[message_id] = sent
        if self._pool is not None:
            sent.future = self._pool.submit(self._deliver, sent)
        return message_id

    def pull(self, ids: Collection[str]) -> list[Reply]:
        replies: list[Reply] = []
        for message_id in ids:
            sent = self._sent.get(message_id)
            if sent is None:
                replies.append(Reply(message_id=message_id, node=0, content="no such message, or answered"))
                continue
            reply = self._reply(message_id, sent)
            if reply is not None:
                del self._sent[message_id]
                replies.append(reply)
        return replies

    def kill(self, node: int) -> None:
        """The node is gone: nothing reaches it, what it was working on never arrives."""
        self._dead.add(node)

    def revive(self, node: int, agent: Handler | None = None) -> None:
        """The node is back, with a new agent where one is given (a restarted process has a fresh state)."""
        self._dead.discard(node)
        if agent is not None:
            self._agents[node] = agent
            self._locks.setdefault(node, threading.Lock())

    def close(self) -> None:
        """Wait for running handlers and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _reply(self, message_id: str, sent: _Sent) -> Reply | None:
        node = sent.node
        if node in self._dead or node not in self._agents:
            return Reply(message_id=message_id, node=node, content="node is not available")
        if self._clock() >= sent.expires_at:
            return Reply(message_id=message_id, node=node, content="no reply within the time to live")
        if sent.lost:
            return self._lost(message_id, node)
        if sent.future is None:
            sent.future = Future()
            sent.future.set_result(self._deliver(sent))
        if not sent.future.done():
            return None
        frame = sent.future.result()
        if node in self._dead:
            return Reply(message_id=message_id, node=node, content="node is not available")
        if frame is None:
            sent.lost = True
            return self._lost(message_id, node)
        self.bytes_up += len(frame)
        try:
            return Reply(message_id=message_id, node=node, content=decode(frame))
        except LacunaError as error:
            return Reply(message_id=message_id, node=node, content=str(error))

    def _lost(self, message_id: str, node: int) -> Reply | None:
        if not self._lost_at_once:
            return None
        return Reply(message_id=message_id, node=node, content="message was lost")

    def _deliver(self, sent: _Sent) -> bytes | None:
        request = decode(sent.frame)
        if not self._passes(sent.node, "request", request):
            return None
        with self._locks[sent.node]:
            reply = self._agents[sent.node](request, None)
        frame = encode(reply)
        return frame if self._passes(sent.node, "reply", reply) else None

    def _passes(self, node: int, leg: str, envelope: Envelope) -> bool:
        if node in self._dead or node not in self._agents:
            return False
        fate = Fate.DELIVER if self._fault is None else self._fault(node, leg, envelope)
        if fate is Fate.KILL:
            self._dead.add(node)
        return fate is Fate.DELIVER
