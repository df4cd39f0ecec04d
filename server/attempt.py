"""One attempt of one round, as a sequence of exchanges around the pure protocol state.

The protocol's own state machine is :class:`privacy.secagg.server_rounds.ServerAttempt`; this class asks it
what to send, carries the next attempt's keys and shares along, and decides with the transport who dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from privacy.secagg.masking import SignedVector
from privacy.secagg.messages import AdvertiseReply, AdvertiseRequest, ShareReply, ShareRequest
from privacy.secagg.reasons import Component
from privacy.secagg.server_rounds import ServerAttempt
from privacy.secagg.session import AttemptId
from privacy.secagg.thresholds import ProtocolParameters
from server.exchange import Exchanger
from server.site_directory import SiteDirectory
from server.study_store import Purpose
from shared.agent_messages import REFUSED, Work
from shared.errors import CoordinatorError, LacunaError
from shared.study_plan import StudyPlan
from shared.wire import Envelope


class AttemptAbortedError(CoordinatorError):
    """Fewer sites than the threshold were left. Nothing was unmasked; what was charged stays charged."""

    def __init__(self, message: str, lost: dict[str, str]) -> None:
        super().__init__(message)
        self.lost = lost


@dataclass(kw_only=True)
class AttemptTask:
    """What an attempt is for. ``weights`` are known when it opens, not when it is prepared."""

    round: int
    purpose: Purpose
    vector_length: int
    weights: NDArray[np.float32] | None = field(default=None, repr=False)


class Request(Protocol):
    """Any message of the protocol on its way to a site."""

    def to_envelope(self) -> Envelope: ...


class EventSink(Protocol):
    def __call__(self, kind: str, **body: Any) -> None: ...


class Attempt:
    """See the module. ``number`` is durable before the object is made."""

    def __init__(
        self,
        *,
        plan: StudyPlan,
        run_id: str,
        number: int,
        task: AttemptTask,
        exchanger: Exchanger,
        directory: SiteDirectory,
        new_attempt: Callable[[AttemptTask], Attempt],
        on_open: Callable[[Attempt], None],
        on_void: Callable[[int], None],
        on_event: EventSink,
    ) -> None:
        self.number = number
        self.task = task
        self._plan = plan
        self._exchanger = exchanger
        self._directory = directory
        self._new_attempt = new_attempt
        self._on_open = on_open
        self._on_void = on_void
        self._on_event = on_event
        self._lost: dict[str, str] = {}
        self._id = AttemptId(
            study_digest=plan.digest().hex(),
            run_id=run_id,
            round=task.round,
            attempt=number,
            purpose=task.purpose,
            vector_length=task.vector_length,
        )
        self._protocol = self._invite(())
        self._total: SignedVector | None = None

    @property
    def participants(self) -> tuple[str, ...]:
        """P: the sites whose keys and shares were delivered."""
        return self._protocol.peers

    @property
    def survivors(self) -> tuple[str, ...]:
        """U: the sites whose vectors are in the total."""
        return self._protocol.survivors

    @property
    def ledger_heads(self) -> dict[str, dict[str, object]]:
        """Signed heads of the sites' ledgers, as they came with their keys: receipts."""
        return self._protocol.ledger_heads

    def take_total(self) -> SignedVector:
        """The unmasked sum, int64 [vector_length], once: the attempt keeps nothing of it."""
        assert self._total is not None, "the attempt has completed, and its total was not taken before"
        total, self._total = self._total, None
        return total

    def set_up(self, sites: Iterable[str]) -> None:
        """Exchange keys, then shares, in exchanges of their own. Raises AttemptAbortedError."""
        self._exchange(_each(self._advertise_requests(sites)).items())
        self._exchange(_each(self._share_requests()).items())
        if not self._ready:
            raise AttemptAbortedError("too few sites delivered keys and shares", self._lost)

    @property
    def _ready(self) -> bool:
        return self._protocol.enough(Component.SHARE)

    def perform(self, following: AttemptTask | None) -> Attempt | None:
        """Open the attempt and finish it; the next one is prepared along the way.

        Returns:
            The attempt for ``following``, with its keys and shares delivered; None if none was asked for,
            or too few sites answered for it.

        Raises:
            AttemptAbortedError: nothing was unmasked.
        """
        successor = self._new_attempt(following) if following is not None else None
        try:
            self._collect_uploads(successor)
            self._unmask(successor)
        except LacunaError as error:
            if successor is not None:
                self._on_void(successor.number)
            if isinstance(error, AttemptAbortedError):
                raise
            raise AttemptAbortedError(error.message, self._lost) from error
        if successor is None or successor._ready:
            return successor
        self._on_void(successor.number)
        self._on_event("set_up_failed", attempt=successor.number, lost=successor._lost)
        return None

    # exchange A

    def _collect_uploads(self, successor: Attempt | None) -> None:
        assert self.task.weights is not None, "an attempt is opened with weights"
        work = Work(
            attempt=self.number, round=self.task.round, purpose=self.task.purpose, weights=self.task.weights
        )
        uploads = self._protocol.build_upload_requests(
            weights_hash=work.weights_hash(), request_hash=work.request_hash()
        )
        self._on_open(self)
        riding: dict[str, AdvertiseRequest] = {}
        if successor is not None:
            riding = successor._advertise_requests(self._directory.reachable)

        def parts() -> Iterator[tuple[str, list[Envelope]]]:
            weights = work.to_envelope()
            for site in dict.fromkeys((*uploads, *riding)):
                items = [weights, uploads[site].to_envelope()] if site in uploads else []
                yield site, [*items, riding[site].to_envelope()] if site in riding else items

        self._exchange(parts(), successor)
        self._protocol.close_uploads()

    # exchange C and B

    def _unmask(self, successor: Attempt | None) -> None:
        if self._protocol.needs_confirmation:
            self._on_event("sites_dropped", attempt=self.number, lost=self._lost)
            self._exchange(_each(self._protocol.build_confirm_requests()).items(), successor)
        parts = _each(self._protocol.build_unmask_requests())
        if successor is not None and successor._protocol.enough(Component.ADVERTISE):
            for site, request in successor._share_requests().items():
                parts.setdefault(site, []).append(request.to_envelope())
        self._exchange(parts.items(), successor)
        self._total = self._protocol.total()

    # parts

    def _advertise_requests(self, sites: Iterable[str]) -> dict[str, AdvertiseRequest]:
        self._protocol = self._invite(sites)
        return self._protocol.build_advertise_requests()

    def _share_requests(self) -> dict[str, ShareRequest]:
        try:
            return self._protocol.build_share_requests()
        except LacunaError as error:
            raise AttemptAbortedError(error.message, self._lost) from error

    def _invite(self, sites: Iterable[str]) -> ServerAttempt:
        return ServerAttempt(
            self._id,
            roster=tuple((s.site_id, s.verify_key) for s in self._plan.roster.sites),
            parameters=ProtocolParameters.from_plan(self._plan),
            invited=sites,
        )

    def _exchange(
        self, parts: Iterable[tuple[str, list[Envelope]]], successor: Attempt | None = None
    ) -> None:
        reachable = set(self._directory.reachable)
        asked = ((site, items) for site, items in parts if site in reachable)

        def on_parts(site: str, replies: list[Envelope]) -> None:
            for reply in replies:
                self._accept(site, reply, successor)

        lost = self._exchanger.run(asked, on_parts=on_parts)
        self._lost.update(lost)

    def _accept(self, site: str, reply: Envelope, successor: Attempt | None) -> None:
        """Hand one part to the attempt that it belongs to; a bad one drops its site from that attempt."""
        if reply.kind == REFUSED:
            self._lost[site] = str(reply.body.get("reason", "refused"))[:64]
            return
        target = successor if successor is not None and reply.kind in SET_UP_REPLIES else self
        try:
            target._protocol.accept(site, reply)
        except LacunaError as error:
            target._lost[site] = error.message[:200]


def _each(requests: Mapping[str, Request]) -> dict[str, list[Envelope]]:
    return {site: [request.to_envelope()] for site, request in requests.items()}


SET_UP_REPLIES = frozenset({AdvertiseReply.KIND, ShareReply.KIND})
