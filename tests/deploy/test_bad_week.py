"""A bad week, in short, and what it is made of: the schedule and the links.

The long one is a command: ``python -m tests.deploy.bad_week --rounds 60 --seed 1 --minutes 40 --out DIR``.
"""

from __future__ import annotations

import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.bad_week import SITES, BadWeek
from tests.deploy.fault_schedule import AT_A_HOSPITAL, KINDS, MINUTES_OFF, schedule
from tests.deploy.link_relay import LinkRelay
from tests.deploy.loopback_services import libfaketime
from tests.deploy.perimeter_pair import find_program

ROUNDS, SEED = 6, 1


@pytest.mark.parametrize(("rounds", "every"), [(6, 1), (60, 2), (200, 3)])
def test_the_same_seed_gives_the_same_schedule_with_every_kind(rounds: int, every: int) -> None:
    week = schedule(7, rounds=rounds, sites=4, every=every)
    assert week == schedule(7, rounds=rounds, sites=4, every=every)
    assert week != schedule(8, rounds=rounds, sites=4, every=every)
    assert {fault.kind for fault in week} == set(KINDS)
    assert {fault.round for fault in week} == set(range(2, rounds, every))
    for fault in week:
        assert (fault.site is not None) == (fault.kind in AT_A_HOSPITAL)
        assert MINUTES_OFF[0] <= abs(fault.minutes_off) <= MINUTES_OFF[1] or not fault.minutes_off
        assert bool(fault.minutes_off) == fault.kind.startswith("clock")


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


@pytest.fixture
def link() -> Iterator[LinkRelay]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        relay = LinkRelay(server.server_address[1], seed=1)
        yield relay
        relay.close()
        server.shutdown()


def connect(link: LinkRelay) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=20)


def echoed(end: socket.socket, data: bytes) -> bytes:
    end.sendall(data)
    got = b""
    while len(got) < len(data):
        part = end.recv(65536)
        if not part:
            raise ConnectionResetError
        got += part
    return got


def test_a_good_link_carries_every_byte(link: LinkRelay) -> None:
    data = os.urandom(300_000)
    with connect(link) as end:
        sender = threading.Thread(target=end.sendall, args=(data,))
        sender.start()
        got = b""
        while len(got) < len(data):
            got += end.recv(65536)
        sender.join()
    assert got == data


def test_a_cut_link_ends_connections_and_takes_no_new_ones_until_it_is_mended(link: LinkRelay) -> None:
    with connect(link) as end:
        assert echoed(end, b"before") == b"before"
        link.cut()
        with pytest.raises(OSError):
            while True:
                echoed(end, b"x")
    with connect(link) as end, pytest.raises(OSError):
        while True:
            echoed(end, b"x")
    link.mend()
    with connect(link) as end:
        assert echoed(end, b"after") == b"after"


def test_a_slow_link_is_late_both_ways(link: LinkRelay) -> None:
    link.slow(0.1)
    with connect(link) as end:
        started = time.monotonic()
        assert echoed(end, b"x") == b"x"
        assert time.monotonic() - started >= 0.2


def test_a_lossy_link_is_late_or_resets_and_loses_no_byte_in_silence(link: LinkRelay) -> None:
    """Of 30 connections with ten chunks each none, or all, break with probability below 1e-8."""
    link.lose(lost=0.0, reset=0.06)
    broken = 0
    for _ in range(30):
        with connect(link) as end:
            try:
                for number in range(5):
                    assert echoed(end, bytes([number]) * 100) == bytes([number]) * 100
            except OSError:
                broken += 1
    assert 0 < broken < 30


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.timeout(3600)
def test_a_bad_week(tmp_path: Path) -> None:
    """Every kind of fault once, in six rounds; see the module ``bad_week`` for what must hold."""
    find_program("nginx", "nginx")
    if libfaketime() is None:
        pytest.skip("libfaketime is not installed (Debian: apt-get install faketime)")
    faults = schedule(SEED, rounds=ROUNDS, sites=SITES)
    week = BadWeek(tmp_path / "week", faults, rounds=ROUNDS, seed=SEED, say=print)
    week.run(timeout_s=3000)
    assert week.verify() == []
