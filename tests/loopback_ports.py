"""Ports for servers of the tests. (No tests here.)"""

from __future__ import annotations

import secrets
import socket
from contextlib import ExitStack


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nobody listens on.

    They lie below those that the kernel gives out to clients: a server that is started later, or again after
    it was killed, finds its port as free as it was.
    """
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            port = 20000 + secrets.randbelow(12000)
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    return ports


def free_port() -> int:
    """One of :func:`free_ports`."""
    return free_ports(1)[0]
