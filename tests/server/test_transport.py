"""The in-memory transport: same bytes as Flower's, replies once, and every fault that a test can ask for."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from server.transport import Fate, InMemoryTransport, Reply
from shared.errors import MalformedMessageError
from shared.wire import Envelope, encode


def echo(envelope: Envelope, peer: Any) -> Envelope:
    return Envelope("echo", envelope.body, envelope.blobs)


def ping(n: int = 0) -> Envelope:
    return Envelope("ping", {"n": n}, (b"abc", b""))


def test_replies_come_once_and_only_for_what_was_asked() -> None:
    transport = InMemoryTransport({7: echo, 3: echo})
    assert transport.nodes() == [3, 7]
    first, second = transport.push(7, ping(1), ttl_s=9), transport.push(3, ping(2), ttl_s=9)
    assert transport.pull([second]) == [
        Reply(message_id=second, node=3, content=Envelope("echo", {"n": 2}, (b"abc", b"")))
    ]
    (reply,) = transport.pull([first])
    assert (reply.node, reply.content) == (7, Envelope("echo", {"n": 1}, (b"abc", b"")))
    assert isinstance(transport.pull([first])[0].content, str)
    assert transport.bytes_down == len(encode(ping(1))) + len(encode(ping(2)))


def test_what_has_no_wire_form_cannot_be_sent() -> None:
    transport = InMemoryTransport({1: echo})
    with pytest.raises(MalformedMessageError):
        transport.push(1, Envelope("ping", {"x": float("nan")}), ttl_s=1)


@pytest.mark.parametrize("leg", ["request", "reply"])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_dropped_leg_is_silence_until_the_time_to_live(leg: str, threads: int) -> None:
    now = [0.0]
    reached: list[int] = []

    def agent(envelope: Envelope, peer: Any) -> Envelope:
        reached.append(envelope.body["n"])
        return echo(envelope, peer)

    transport = InMemoryTransport(
        {1: agent},
        threads=threads,
        fault=lambda _node, where, _envelope: Fate.DROP if where == leg else Fate.DELIVER,
        clock=lambda: now[0],
    )
    message = transport.push(1, ping(5), ttl_s=10)
    transport.pull([message])
    transport.close()
    assert transport.pull([message]) == []
    assert reached == ([] if leg == "request" else [5])
    now[0] = 10.0
    (reply,) = transport.pull([message])
    assert reply.content == "no reply within the time to live"


def test_a_node_killed_in_the_middle_takes_its_messages_with_it_until_revived() -> None:
    transport = InMemoryTransport(
        {1: echo, 2: echo},
        fault=lambda node, leg, envelope: (
            Fate.KILL if (node, leg, envelope.body["n"]) == (1, "reply", 0) else Fate.DELIVER
        ),
    )
    ids = [transport.push(node, ping(0), ttl_s=9) for node in (1, 2)]
    replies = {reply.node: reply.content for reply in transport.pull(ids)}
    assert replies[1] == "node is not available"
    assert isinstance(replies[2], Envelope)
    assert transport.nodes() == [2]
    (dead,) = transport.pull([transport.push(1, ping(1), ttl_s=9)])
    assert dead.content == "node is not available"
    transport.revive(1, lambda _envelope, _peer: Envelope("fresh", {"n": 2}))
    (back,) = transport.pull([transport.push(1, ping(2), ttl_s=9)])
    assert back.content == Envelope("fresh", {"n": 2})


def test_threads_let_agents_work_at_once_but_each_on_one_message() -> None:
    together = threading.Barrier(2, timeout=10)
    busy: set[int] = set()

    def agent(node: int) -> Any:
        def handle(envelope: Envelope, peer: Any) -> Envelope:
            assert node not in busy
            busy.add(node)
            if envelope.body["n"] == 0:
                together.wait()
            time.sleep(0.02)
            busy.discard(node)
            return echo(envelope, peer)

        return handle

    transport = InMemoryTransport({1: agent(1), 2: agent(2)}, threads=4)
    ids = {transport.push(node, ping(n), ttl_s=20) for n in (0, 1) for node in (1, 2)}
    deadline = time.monotonic() + 10
    while ids and time.monotonic() < deadline:
        for reply in transport.pull(sorted(ids)):
            assert isinstance(reply.content, Envelope)
            ids.discard(reply.message_id)
        time.sleep(0.01)
    assert not ids
    transport.close()
