"""Is the agent alive? Asked over its own socket, by whoever may speak to it."""

from __future__ import annotations

from pathlib import Path

from client.agent_link import AgentUnreachableError, UnixAddress, exchange
from client.agent_service import HEALTH
from shared.errors import LacunaError
from shared.wire import Envelope

HEALTH_TIMEOUT_S = 5.0


def agent_is_healthy(socket: Path, *, timeout_s: float = HEALTH_TIMEOUT_S) -> None:
    """Returns when the agent has answered. It does so also while it trains.

    Raises:
        AgentUnreachableError: nobody answers, or refuses this user; the message says what.
    """
    try:
        # Whoever serves a site's socket may be another user than the one who asks: only whether it answers
        # is looked at, and nothing is told to it.
        owners = frozenset({socket.stat().st_uid})
        reply = exchange(
            Envelope(HEALTH, {}), UnixAddress(path=socket, owner_uids=owners), timeout_s=timeout_s
        )
    except (LacunaError, OSError) as error:
        raise AgentUnreachableError(f"the agent at {socket} does not answer: {error}") from error
    if reply.kind != HEALTH:
        reason = str(reply.body.get("reason", reply.kind))
        raise AgentUnreachableError(f"the agent at {socket} answers {reason!r} to this user")
