"""The server's side of one attempt: collects replies in any order, adds uploads up, unmasks the total.

It trusts no reply: each is verified, a bad one is named and its site counts as dropped from that
component on. It never blocks and knows no clock: when to stop waiting is the caller's decision, taken by
calling the next ``build_...`` or ``close_uploads``. Memory is one residue vector, whatever the number of
sites. Nothing here protects a site: that is :mod:`privacy.secagg.site_rounds`.

What is collected at each stage is a class of :mod:`privacy.secagg.server_collections`; the order of the
steps is the server's table in :mod:`privacy.secagg.transitions`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from privacy.secagg.keys import agree, pair_mask_key, public_key, seed_commitment, self_mask_key
from privacy.secagg.masking import SignedVector, apply_streams, centre, zeros
from privacy.secagg.messages import (
    REPLIES,
    AdvertiseReply,
    AdvertiseRequest,
    ConfirmReply,
    ConfirmRequest,
    KeyAdvertisement,
    Reply,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
    UploadReply,
    UploadRequest,
)
from privacy.secagg.reasons import (
    AbortReason,
    AttemptAbortedError,
    BadReplyError,
    Component,
    FaultReason,
)
from privacy.secagg.server_collections import (
    Collection,
    ConfirmationCollection,
    KeyCollection,
    RevealCollection,
    ShareCollection,
    UploadCollection,
)
from privacy.secagg.session import AttemptId, Roster, Session
from privacy.secagg.shamir import combine_shares
from privacy.secagg.statements import UploadTerms, key_set_digest
from privacy.secagg.thresholds import ProtocolParameters
from privacy.secagg.transitions import COLLECTS, SERVER_TRANSITIONS, ServerStage, ServerStep
from shared.errors import InternalError, MalformedMessageError
from shared.identity import VerifyKey
from shared.wire import Envelope

_TOO_FEW: dict[Component, AbortReason] = {
    Component.ADVERTISE: AbortReason.TOO_FEW_KEYS,
    Component.SHARE: AbortReason.TOO_FEW_SHARES,
    Component.UPLOAD: AbortReason.TOO_FEW_UPLOADS,
    Component.CONFIRM: AbortReason.TOO_FEW_CONFIRMATIONS,
    Component.UNMASK: AbortReason.TOO_FEW_REVEALED_SHARES,
}
Kind = TypeVar("Kind", bound=Collection)


class ServerAttempt:
    """One attempt from the first key to the total, or to its abort.

    Args:
        attempt: Its id.
        roster: Sites and identity keys in the order of the signed plan.
        parameters: n, t, c, modulus, from the signed plan.
        invited: Sites to ask; all of the roster if left out.
    """

    def __init__(
        self,
        attempt: AttemptId,
        *,
        roster: Sequence[tuple[str, VerifyKey]],
        parameters: ProtocolParameters,
        invited: Iterable[str] | None = None,
    ) -> None:
        self._roster = Roster(roster, parameters)
        self._session = Session(attempt=attempt, roster=self._roster, parameters=parameters)
        self._invited = self._roster.ordered(self._roster.site_ids if invited is None else invited)
        self._stage = ServerStage.NEW
        self._collections: dict[Component, Collection] = {}
        self._faults: list[BadReplyError] = []
        self._peers: tuple[str, ...] = ()
        self._survivors: tuple[str, ...] = ()

    @property
    def attempt(self) -> AttemptId:
        return self._session.attempt

    @property
    def stage(self) -> ServerStage:
        """Where the attempt stands."""
        return self._stage

    @property
    def peers(self) -> tuple[str, ...]:
        """P: whose shares were delivered in time; empty before the upload requests are built."""
        return self._peers

    @property
    def survivors(self) -> tuple[str, ...]:
        """U: whose vectors are in the sum; empty before the uploads are closed."""
        return self._survivors

    @property
    def dropped(self) -> tuple[str, ...]:
        """P without U."""
        return tuple(site_id for site_id in self._peers if site_id not in self._survivors)

    @property
    def needs_confirmation(self) -> bool:
        """Whether a site of P dropped, so that the exchange for the survivors' signatures is needed."""
        return bool(self.dropped)

    @property
    def faults(self) -> tuple[BadReplyError, ...]:
        """All replies that were not used, in the order of their arrival."""
        return tuple(self._faults)

    @property
    def ledger_heads(self) -> dict[str, dict[str, object]]:
        """Signed ledger heads by site, as they came with the keys."""
        if Component.ADVERTISE not in self._collections:
            return {}
        return {site_id: dict(keys.ledger_head) for site_id, keys in self._keys().items()}

    def answered(self, component: Component) -> tuple[str, ...]:
        """Sites whose reply was accepted, in roster order."""
        collection = self._collections.get(component)
        return () if collection is None else collection.answered

    def pending(self, component: Component) -> tuple[str, ...]:
        """Sites that were asked and from which an acceptable reply can still come."""
        collection = self._collections.get(component)
        return () if collection is None else collection.pending

    def enough(self, component: Component) -> bool:
        """Whether at least t sites answered. More is better: waiting for all spares a site a retry."""
        return len(self.answered(component)) >= self._session.parameters.threshold

    def drop(self, site_id: str, component: Component, reason: FaultReason, message: str) -> None:
        """The caller gives up on a site for this component: unreachable, or it refused."""
        if site_id in self.pending(component):
            self._collections[component].bad.add(site_id)
            self._faults.append(BadReplyError(site_id, component, reason, message))

    def accept(self, site_id: str, envelope: Envelope) -> Component:
        """Parse a reply that came from a site and take it in; its component is returned.

        Raises:
            BadReplyError: it cannot be used (also MALFORMED and NOT_ASKED); recorded in ``faults``.
        """
        kind = REPLIES.get(envelope.kind)
        if kind is None:
            component = next(reversed(self._collections), Component.ADVERTISE)
            raise self._malformed(site_id, component, "not a reply of this protocol")
        component = Component(kind.KIND.removeprefix("secagg_").removesuffix("_reply"))
        try:
            reply: Reply = kind.from_envelope(envelope)
        except MalformedMessageError as error:
            raise self._malformed(site_id, component, error.message) from error
        self._accept(component, site_id, reply)
        return component

    def build_advertise_requests(self) -> dict[str, AdvertiseRequest]:
        """A request for each invited site."""
        stage = self._next(ServerStep.ASK_KEYS)
        self._collect(stage, KeyCollection(session=self._session, asked=self._invited))
        request = AdvertiseRequest(attempt=self.attempt)
        return dict.fromkeys(self._invited, request)

    def accept_advertise(self, site_id: str, reply: AdvertiseReply) -> None:
        """Raises BadReplyError."""
        self._accept(Component.ADVERTISE, site_id, reply)

    def build_share_requests(self) -> dict[str, ShareRequest]:
        """Closes the keys. Raises AttemptAbortedError (TOO_FEW_KEYS)."""
        stage = self._next(ServerStep.ASK_SHARES)
        sites = self._finish(Component.ADVERTISE)
        keys = self._keys()
        key_set = key_set_digest(self._session, [item.statement(self._session) for item in keys.values()])
        self._collect(stage, ShareCollection(session=self._session, asked=sites, key_set=key_set))
        request = ShareRequest(attempt=self.attempt, keys=tuple(keys.values()))
        return dict.fromkeys(sites, request)

    def accept_share(self, site_id: str, reply: ShareReply) -> None:
        """Raises BadReplyError."""
        self._accept(Component.SHARE, site_id, reply)

    def build_upload_requests(self, weights_hash: bytes, request_hash: bytes) -> dict[str, UploadRequest]:
        """Closes the shares: whoever delivered them is in P. Raises AttemptAbortedError (TOO_FEW_SHARES)."""
        stage = self._next(ServerStep.ASK_UPLOADS)
        self._peers = self._finish(Component.SHARE)
        dealt = self._collected(ShareCollection)
        terms = UploadTerms(
            session=self._session,
            key_set=dealt.key_set,
            peers=self._peers,
            weights_hash=weights_hash,
            request_hash=request_hash,
        ).digest()
        self._collect(stage, UploadCollection(session=self._session, asked=self._peers, terms=terms))
        return {
            site_id: UploadRequest(
                attempt=self.attempt,
                site_id=site_id,
                weights_hash=weights_hash,
                request_hash=request_hash,
                shares=tuple(dealt.shares[dealer][site_id] for dealer in self._peers),
            )
            for site_id in self._peers
        }

    def accept_upload(self, site_id: str, reply: UploadReply) -> None:
        """Adds the masked vector to the running sum; it is not kept. Raises BadReplyError."""
        self._accept(Component.UPLOAD, site_id, reply)

    def close_uploads(self) -> tuple[str, ...]:
        """The survivors, from now on fixed. Raises AttemptAbortedError (TOO_FEW_UPLOADS)."""
        stage = self._next(ServerStep.CLOSE_UPLOADS)
        self._survivors = self._finish(Component.UPLOAD)
        self._stage = stage
        return self._survivors

    def build_confirm_requests(self) -> dict[str, ConfirmRequest]:
        """For each survivor; only where ``needs_confirmation``."""
        stage = self._next(ServerStep.ASK_CONFIRMATIONS)
        if not self.needs_confirmation:
            raise InternalError("nobody dropped: there is no survivor set to confirm")
        uploads = self._collected(UploadCollection)
        collection = ConfirmationCollection(
            session=self._session, asked=self._survivors, terms=uploads.terms, survivors=self._survivors
        )
        self._collect(stage, collection)
        request = ConfirmRequest(attempt=self.attempt, uploads=uploads.signed(self._survivors))
        return dict.fromkeys(self._survivors, request)

    def accept_confirm(self, site_id: str, reply: ConfirmReply) -> None:
        """Raises BadReplyError."""
        self._accept(Component.CONFIRM, site_id, reply)

    def build_unmask_requests(self) -> dict[str, UnmaskRequest]:
        """For each survivor that can still answer. Raises AttemptAbortedError (TOO_FEW_CONFIRMATIONS)."""
        stage = self._next(ServerStep.ASK_REVEALS)
        sites, confirmations = self._survivors, dict[str, bytes]()
        if self.needs_confirmation:
            if self._stage is ServerStage.SURVIVORS:
                raise InternalError("a site dropped: the survivors have to confirm first")
            sites = self._finish(Component.CONFIRM)
            confirmations = self._collected(ConfirmationCollection).signatures
        uploads = self._collected(UploadCollection)
        collection = RevealCollection(
            session=self._session,
            asked=sites,
            terms=uploads.terms,
            peers=self._peers,
            survivors=self._survivors,
            dealt=self._collected(ShareCollection).shares,
        )
        self._collect(stage, collection)
        request = UnmaskRequest(
            attempt=self.attempt,
            uploads=uploads.signed(self._survivors),
            confirmations=tuple((site_id, confirmations[site_id]) for site_id in sites if confirmations),
        )
        return dict.fromkeys(sites, request)

    def accept_unmask(self, site_id: str, reply: UnmaskReply) -> None:
        """Checks each share against what its dealer committed to. Raises BadReplyError."""
        self._accept(Component.UNMASK, site_id, reply)

    def total(self) -> SignedVector:
        """The exact sum of the survivors' vectors, [vector_length], int32 or int64 as the modulus. Ends
        the attempt.

        Raises:
            AttemptAbortedError: TOO_FEW_REVEALED_SHARES, or BAD_DEALER (named): shares that all are as
                their dealer committed to them, and yet do not give the secret that it signed.
        """
        stage = self._next(ServerStep.UNMASK)
        self._finish(Component.UNMASK)
        keys, uploads = self._keys(), self._collected(UploadCollection)
        plus: list[bytes] = []
        minus: list[bytes] = []
        for owner in self._survivors:
            seed = self._reconstruct(owner)
            if seed_commitment(self._session, owner, seed) != keys[owner].seed_commitment:
                raise self._bad_dealer(owner, "mask seed")
            minus.append(self_mask_key(self._session, owner, seed))
        for owner in self.dropped:
            private = self._reconstruct(owner)
            if public_key(private) != keys[owner].mask_public:
                raise self._bad_dealer(owner, "mask key")
            for survivor in self._survivors:
                first, second = self._roster.ordered((owner, survivor))
                agreed = agree(private, keys[survivor].mask_public)
                mask_key = pair_mask_key(agreed, terms=uploads.terms, first=first, second=second)
                (minus if first == survivor else plus).append(mask_key)
        residues, uploads.total = uploads.total, zeros(0, self._session.parameters.modulus_bits)
        apply_streams(residues, plus, minus)
        self._stage = stage
        return centre(residues)

    def _keys(self) -> dict[str, KeyAdvertisement]:
        return self._collected(KeyCollection).in_order()

    def _reconstruct(self, owner: str) -> bytes:
        revealed = self._collected(RevealCollection).revealed
        shares = {self._roster.shamir_index(holder): values[owner] for holder, values in revealed.items()}
        return combine_shares(shares, threshold=self._session.parameters.threshold)

    def _bad_dealer(self, owner: str, what: str) -> AttemptAbortedError:
        message = f"{owner} dealt shares that do not give the {what} it signed"
        self._faults.append(BadReplyError(owner, Component.SHARE, FaultReason.BAD_DEALER, message))
        self._stage = ServerStage.ABORTED
        return AttemptAbortedError(AbortReason.BAD_DEALER, message, peer=owner)

    def _next(self, step: ServerStep) -> ServerStage:
        """The stage that a step leads to; entered when the step has succeeded."""
        stage = SERVER_TRANSITIONS.get((self._stage, step))
        if stage is None:
            raise InternalError(f"{step} does not follow {self._stage}")
        return stage

    def _collect(self, stage: ServerStage, collection: Collection) -> None:
        assert COLLECTS[stage] is collection.component
        self._collections[collection.component] = collection
        self._stage = stage

    def _collected(self, kind: type[Kind]) -> Kind:
        collection = self._collections[kind.component]
        assert isinstance(collection, kind)
        return collection

    def _finish(self, component: Component) -> tuple[str, ...]:
        """Close a collection. Raises AttemptAbortedError where fewer than t sites answered."""
        collection, threshold = self._collections[component], self._session.parameters.threshold
        collection.closed = True
        sites = collection.answered
        if len(sites) < threshold:
            self._stage = ServerStage.ABORTED
            missing = ", ".join(site for site in collection.asked if site not in sites)
            raise AttemptAbortedError(
                _TOO_FEW[component],
                f"{len(sites)} sites answered {component}, the threshold is {threshold}; "
                f"missing: {missing or 'none of those asked'}",
            )
        return sites

    def _accept(self, component: Component, site_id: str, reply: Reply) -> None:
        try:
            if component not in self._collections:
                raise BadReplyError(site_id, component, FaultReason.NOT_ASKED, "this site was not asked")
            self._collections[component].accept(site_id, reply)
        except BadReplyError as error:
            self._faults.append(error)
            raise

    def _malformed(self, site_id: str, component: Component, message: str) -> BadReplyError:
        collection = self._collections.get(component)
        if collection is not None and not collection.closed:
            collection.bad.add(site_id)
        error = BadReplyError(site_id, component, FaultReason.MALFORMED, message)
        self._faults.append(error)
        return error
