"""One exchange: a message to each of several sites, and their answers as they come.

A site is given up for this exchange when its node is gone, when its courier cannot reach the agent, when
the whole answer does not parse, or at the deadline; whatever it still sends is not read.

A message may be as large as the model. So requests are made one after the other, when their turn to be sent
has come, and answers are fetched, handled and forgotten one after the other: what an exchange holds does not
depend on the number of sites.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from server.site_directory import SiteDirectory
from server.transport import Transport
from shared.agent_messages import EXCHANGE, EXCHANGE_REPLY, REFUSED, WORK
from shared.errors import LacunaError, MalformedMessageError
from shared.wire import Envelope, pack, unpack


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long the driver waits. Seconds.

    A site that is alive and slow is waited for up to ``exchange_s``. Once as many sites as the threshold have
    answered, the others have ``patience`` times the slowest answer measured so far to an exchange of that
    kind, at least ``shortest_s``: a site that stalls does not hold up everybody for the longest time.

    Answers are asked for every ``poll_s``, and the longer nothing comes the less often, at least every
    ``slowest_poll`` times that: each look is a request to the SuperLink per site that has not answered.
    """

    exchange_s: float = 600.0
    shortest_s: float = 60.0
    patience: float = 4.0
    quorum_s: float = 900.0
    hello_s: float = 60.0
    poll_s: float = 0.3
    slowest_poll: float = 6.0
    node_check_s: float = 3.0


class Exchanger:
    """Runs exchanges over a transport."""

    def __init__(
        self,
        transport: Transport,
        directory: SiteDirectory,
        pace: Pace,
        *,
        needed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``needed``: sites without which a round fails; until they answered nobody is given up as slow."""
        self._transport = transport
        self._directory = directory
        self._pace = pace
        self._needed = needed
        self._slowest_s: dict[str, float] = {}
        self._clock = clock

    def run(
        self,
        parts: Iterable[tuple[str, Sequence[Envelope]]],
        *,
        on_parts: Callable[[str, list[Envelope]], None],
    ) -> dict[str, str]:
        """Send every site its parts and hand each answer's parts to ``on_parts`` as they arrive.

        Args:
            parts: Site and parts; taken from the iterable one by one, as they are sent.
            on_parts: Called with the site and its answer's parts.

        Returns:
            For each site that gave no answer, why.
        """
        kinds: set[str] = set()

        def packed() -> Iterator[tuple[str, Envelope]]:
            for site, items in parts:
                if items:
                    kinds.update(str(item.body.get("purpose")) for item in items if item.kind == WORK)
                    yield site, pack(EXCHANGE, list(items))

        return self._exchange(packed(), lambda site, reply: on_parts(site, _parts(reply)), kinds)

    def send(
        self, envelopes: Mapping[str, Envelope], *, on_reply: Callable[[str, Envelope], None]
    ) -> dict[str, str]:
        """Send one envelope a site; see :meth:`run`."""
        return self._exchange(envelopes.items(), on_reply, {"verdict"})

    def _patience_s(self, measured_s: float | None, answered: int) -> float:
        """How long those who have not answered are waited for, as things stand."""
        if measured_s is None or self._needed is None or answered < self._needed:
            return self._pace.exchange_s
        soft_s = max(self._pace.shortest_s, self._pace.patience * measured_s)
        return min(soft_s, self._pace.exchange_s)

    def _exchange(
        self,
        envelopes: Iterable[tuple[str, Envelope]],
        on_reply: Callable[[str, Envelope], None],
        kinds: Collection[str],
    ) -> dict[str, str]:
        lost: dict[str, str] = {}
        pending: dict[str, str] = {}
        for site, envelope in envelopes:
            message_id = self._transport.push(
                self._directory.node(site), envelope, ttl_s=self._pace.exchange_s + 60
            )
            pending[message_id] = site
            del envelope  # else it would live on while the answers come
        # A piece of work is a kind of its own, by purpose; messages of the protocol alone are another.
        kind, started, n_asked = min(kinds, default="protocol"), self._clock(), len(pending)
        measured_s, slowest_s = self._slowest_s.get(kind), 0.0
        next_check = started + self._pace.node_check_s
        newest = started
        while pending:
            answered = [item for item in pending.items() if self._take(*item, on_reply, lost)]
            for message_id, _ in answered:
                del pending[message_id]
            now = self._clock()
            if answered:
                newest, slowest_s = now, now - started
            if now >= next_check and pending:
                next_check = now + self._pace.node_check_s
                connected = set(self._transport.nodes())
                for message_id, site in list(pending.items()):
                    if self._directory.node(site) not in connected:
                        lost[site] = "its node is gone"
                        del pending[message_id]
            good = n_asked - len(pending) - len(lost)
            if pending and now - started >= self._patience_s(measured_s, good):
                lost.update(dict.fromkeys(pending.values(), "no answer before the deadline"))
                # Next time there is more patience, up to the longest time.
                slowest_s = now - started
                break
            if pending and not answered:
                time.sleep(self._pace.poll_s * min(1 + (now - newest) / 10, self._pace.slowest_poll))
        self._slowest_s[kind] = max(measured_s or 0.0, slowest_s)
        for site in lost:
            self._directory.forget(site)
        return lost

    def _take(
        self, message_id: str, site: str, on_reply: Callable[[str, Envelope], None], lost: dict[str, str]
    ) -> bool:
        """Fetch one site's answer if it has come, and handle it; nothing of it outlives the call."""
        for reply in self._transport.pull([message_id]):
            if isinstance(reply.content, str):
                lost[site] = reply.content
            elif reply.content.kind == REFUSED:
                lost[site] = str(reply.content.body.get("reason", "refused"))[:64]
            else:
                try:
                    on_reply(site, reply.content)
                except LacunaError as error:
                    lost[site] = error.message
            return True
        return False


def _parts(reply: Envelope) -> list[Envelope]:
    if reply.kind != EXCHANGE_REPLY:
        raise MalformedMessageError(f"answered with a {reply.kind!r}")
    return unpack(reply)
