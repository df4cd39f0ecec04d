"""Which node speaks for which site: found by signed hellos, never by what a node says of itself."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection

from server.transport import Transport
from shared.agent_messages import Hello, HelloReply, compatible, own_version
from shared.errors import LacunaError
from shared.study_plan import StudyPlan
from shared.wire import Envelope

MAX_PLAUSIBLE_ATTEMPT = 1_000_000


class SiteDirectory:
    """Sites of the roster and the nodes where their agents answered.

    Args:
        plan: The signed plan; answers are verified under its roster's keys.
        transport: Where the nodes are.
        run_id: Of this run; answers are bound to it.
    """

    def __init__(self, plan: StudyPlan, transport: Transport, *, run_id: str) -> None:
        self._plan = plan
        self._transport = transport
        self._run_id = run_id
        self._node_of: dict[str, int] = {}
        self._probes: dict[str, tuple[int, Hello, float]] = {}
        self._excluded: frozenset[str] = frozenset()
        self.other_versions: dict[str, str] = {}
        """Sites that answered with a version that cannot take part, and which."""
        self.last_attempt = 0

    @property
    def reachable(self) -> tuple[str, ...]:
        """Sites with a node, in roster order."""
        return tuple(s.site_id for s in self._plan.roster.sites if s.site_id in self._node_of)

    def node(self, site_id: str) -> int:
        return self._node_of[site_id]

    def forget(self, site_id: str) -> None:
        """Until it answers another hello, the site is not asked for anything."""
        self._node_of.pop(site_id, None)

    def exclude(self, identity_keys: Collection[str]) -> tuple[str, ...]:
        """Leave revoked sites out from now on, whatever they answer. Returns the site ids that are new."""
        excluded = frozenset(s.site_id for s in self._plan.roster.sites if s.identity_key in identity_keys)
        fresh = tuple(sorted(excluded - self._excluded))
        self._excluded = excluded
        for site_id in excluded:
            self.forget(site_id)
        return fresh

    def missing(self) -> tuple[str, ...]:
        """Sites without a node that may take part."""
        return tuple(
            s.site_id
            for s in self._plan.roster.sites
            if s.site_id not in self._node_of and s.site_id not in self._excluded
        )

    def drop_lost_nodes(self) -> None:
        """Forget sites whose node is not connected any more."""
        connected = set(self._transport.nodes())
        for site_id, node in list(self._node_of.items()):
            if node not in connected:
                self.forget(site_id)

    def probe(self, *, timeout_s: float, clock: Callable[[], float]) -> None:
        """Send hellos to the nodes that no site is known for, and wait for nothing."""
        known = set(self._node_of.values()) | {node for node, _, _ in self._probes.values()}
        for node in self._transport.nodes():
            if node in known:
                continue
            hello = Hello(
                nonce=secrets.token_hex(32), plan_sha256=self._plan.digest().hex(), run_id=self._run_id
            )
            message_id = self._transport.push(node, hello.to_envelope(), ttl_s=timeout_s + 60)
            self._probes[message_id] = (node, hello, clock() + timeout_s)

    def collect(self, *, clock: Callable[[], float]) -> None:
        """Take in the answers to hellos that have come; does not wait."""
        if not self._probes:
            return
        for reply in self._transport.pull(list(self._probes)):
            node, hello, _ = self._probes.pop(reply.message_id)
            if isinstance(reply.content, Envelope):
                self._accept(node, hello, reply.content)
        now = clock()
        self._probes = {key: probe for key, probe in self._probes.items() if probe[2] > now}

    def search(self, *, timeout_s: float, poll_s: float, clock: Callable[[], float]) -> None:
        """Probe, and wait until every probe is answered or its time is over."""
        self.probe(timeout_s=timeout_s, clock=clock)
        while self._probes:
            self.collect(clock=clock)
            if self._probes:
                time.sleep(poll_s)

    def _accept(self, node: int, hello: Hello, envelope: Envelope) -> None:
        try:
            answer = HelloReply.from_envelope(envelope)
            answer.verify(hello, self._plan.site(answer.site_id).verify_key)
        except LacunaError:
            return
        if answer.last_attempt > MAX_PLAUSIBLE_ATTEMPT:
            # Numbers only grow: a site that claims the largest one would end the study for everybody.
            return
        if answer.site_id in self._excluded:
            return
        if not compatible(answer.version, own_version()):
            self.other_versions[answer.site_id] = answer.version
            return
        self.other_versions.pop(answer.site_id, None)
        self._node_of[answer.site_id] = node
        self.last_attempt = max(self.last_attempt, answer.last_attempt)
