"""The server's side of one attempt: collects replies in any order, adds uploads up, unmasks the total.

It trusts no reply: each is verified, a bad one is named and its site counts as dropped from that
component on. It never blocks and knows no clock: when to stop waiting is the caller's decision, taken by
calling the next ``build_...`` or ``close_uploads``. Memory is one residue vector, whatever the number of
sites. Nothing here protects a site: that is :mod:`privacy.secagg.site_rounds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from privacy.secagg.keys import (
    WeakKeyError,
    agree,
    pair_mask_key,
    public_key,
    seed_commitment,
    self_mask_key,
    share_commitment,
)
from privacy.secagg.masking import IntVector, Words, apply_streams, centre, from_bytes, zeros
from privacy.secagg.messages import (
    REPLIES,
    AdvertiseReply,
    AdvertiseRequest,
    ConfirmReply,
    ConfirmRequest,
    DealtShare,
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
from privacy.secagg.session import AttemptId, Roster, Session
from privacy.secagg.shamir import combine_shares
from privacy.secagg.statements import (
    RevealStatement,
    Statement,
    SurvivorStatement,
    UploadStatement,
    UploadTerms,
    key_set_digest,
)
from privacy.secagg.thresholds import ProtocolParameters
from shared.errors import InternalError, MalformedMessageError
from shared.identity import BadSignatureError, VerifyKey
from shared.wire import Envelope

_ORDER = tuple(Component)
_PROBE = bytes([1]) * 32
"""Any X25519 private key: agreeing with it shows a point of small order."""
_HARMLESS = frozenset({FaultReason.NOT_ASKED, FaultReason.REPEATED, FaultReason.LATE})


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
        self._threshold = parameters.threshold
        self._bits = parameters.modulus_bits
        self._invited = self._roster.ordered(self._roster.site_ids if invited is None else invited)
        self._asked: dict[Component, tuple[str, ...]] = {}
        self._bad: dict[Component, set[str]] = {component: set() for component in Component}
        self._closed: set[Component] = set()
        self._faults: list[BadReplyError] = []
        self._keys: dict[str, KeyAdvertisement] = {}
        self._key_set = b""
        self._shares: dict[str, dict[str, DealtShare]] = {}
        self._terms = b""
        self._sum: Words | None = None
        self._uploads: dict[str, bytes] = {}
        self._peers: tuple[str, ...] = ()
        self._survivors: tuple[str, ...] = ()
        self._confirmations: dict[str, bytes] = {}
        self._revealed: dict[str, dict[str, bytes]] = {}

    @property
    def attempt(self) -> AttemptId:
        return self._session.attempt

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
        return {site_id: dict(keys.ledger_head) for site_id, keys in self._keys.items()}

    def answered(self, component: Component) -> tuple[str, ...]:
        """Sites whose reply was accepted, in roster order."""
        accepted: dict[Component, Iterable[str]] = {
            Component.ADVERTISE: self._keys,
            Component.SHARE: self._shares,
            Component.UPLOAD: self._uploads,
            Component.CONFIRM: self._confirmations,
            Component.UNMASK: self._revealed,
        }
        return self._roster.ordered(accepted[component])

    def pending(self, component: Component) -> tuple[str, ...]:
        """Sites that were asked and from which an acceptable reply can still come."""
        gone = {*self.answered(component), *self._bad[component]}
        return tuple(site_id for site_id in self._asked.get(component, ()) if site_id not in gone)

    def enough(self, component: Component) -> bool:
        """Whether at least t sites answered. More is better: waiting for all spares a site a retry."""
        return len(self.answered(component)) >= self._threshold

    def drop(self, site_id: str, component: Component, reason: FaultReason, message: str) -> None:
        """The caller gives up on a site for this component: unreachable, or it refused."""
        if site_id in self.pending(component):
            self._bad[component].add(site_id)
            self._faults.append(BadReplyError(site_id, component, reason, message))

    def accept(self, site_id: str, envelope: Envelope) -> Component:
        """Parse a reply that came from a site and take it in; its component is returned.

        Raises:
            BadReplyError: it cannot be used (also MALFORMED and NOT_ASKED); recorded in ``faults``.
        """
        kind = REPLIES.get(envelope.kind)
        if kind is None:
            component = next((item for item in reversed(_ORDER) if item in self._asked), _ORDER[0])
            raise self._fault(site_id, component, FaultReason.MALFORMED, "not a reply of this protocol")
        component = Component(kind.KIND.removeprefix("secagg_").removesuffix("_reply"))
        try:
            reply: Reply = kind.from_envelope(envelope)
        except MalformedMessageError as error:
            raise self._fault(site_id, component, FaultReason.MALFORMED, error.message) from error
        if isinstance(reply, AdvertiseReply):
            self.accept_advertise(site_id, reply)
        elif isinstance(reply, ShareReply):
            self.accept_share(site_id, reply)
        elif isinstance(reply, UploadReply):
            self.accept_upload(site_id, reply)
        elif isinstance(reply, ConfirmReply):
            self.accept_confirm(site_id, reply)
        else:
            self.accept_unmask(site_id, reply)
        return component

    def build_advertise_requests(self) -> dict[str, AdvertiseRequest]:
        """A request for each invited site."""
        self._begin(Component.ADVERTISE, self._invited)
        request = AdvertiseRequest(attempt=self.attempt)
        return dict.fromkeys(self._invited, request)

    def accept_advertise(self, site_id: str, reply: AdvertiseReply) -> None:
        """Raises BadReplyError."""
        component, keys = Component.ADVERTISE, reply.keys
        self._admit(site_id, component, reply.attempt, keys.site_id)
        self._verify(component, keys.statement(self._session), keys.signature)
        seen = {key for item in self._keys.values() for key in (item.mask_public, item.share_public)}
        if keys.mask_public == keys.share_public or {keys.mask_public, keys.share_public} & seen:
            raise self._fault(site_id, component, FaultReason.KEY_USED_TWICE, "a public key stands twice")
        try:
            agree(_PROBE, keys.mask_public)
            agree(_PROBE, keys.share_public)
        except WeakKeyError as error:
            raise self._fault(site_id, component, FaultReason.WEAK_KEY, "key of small order") from error
        self._keys[site_id] = keys

    def build_share_requests(self) -> dict[str, ShareRequest]:
        """Closes the keys. Raises AttemptAbortedError (TOO_FEW_KEYS)."""
        sites = self._finish(Component.ADVERTISE, AbortReason.TOO_FEW_KEYS)
        self._keys = {site_id: self._keys[site_id] for site_id in sites}
        self._key_set = key_set_digest(
            self._session, [item.statement(self._session) for item in self._keys.values()]
        )
        self._begin(Component.SHARE, sites)
        request = ShareRequest(attempt=self.attempt, keys=tuple(self._keys.values()))
        return dict.fromkeys(sites, request)

    def accept_share(self, site_id: str, reply: ShareReply) -> None:
        """Raises BadReplyError."""
        component = Component.SHARE
        self._admit(site_id, component, reply.attempt, reply.site_id)
        if {share.recipient for share in reply.shares} != set(self._keys):
            raise self._fault(
                site_id, component, FaultReason.WRONG_RECIPIENTS, "one share for each site with keys expected"
            )
        for share in reply.shares:
            self._verify(component, share.statement(self._session, self._key_set), share.signature)
        self._shares[site_id] = {share.recipient: share for share in reply.shares}

    def build_upload_requests(self, weights_hash: bytes, request_hash: bytes) -> dict[str, UploadRequest]:
        """Closes the shares: whoever delivered them is in P. Raises AttemptAbortedError (TOO_FEW_SHARES)."""
        self._peers = self._finish(Component.SHARE, AbortReason.TOO_FEW_SHARES)
        self._begin(Component.UPLOAD, self._peers)
        self._terms = UploadTerms(
            session=self._session,
            key_set=self._key_set,
            peers=self._peers,
            weights_hash=weights_hash,
            request_hash=request_hash,
        ).digest()
        return {
            site_id: UploadRequest(
                attempt=self.attempt,
                site_id=site_id,
                weights_hash=weights_hash,
                request_hash=request_hash,
                shares=tuple(self._shares[dealer][site_id] for dealer in self._peers),
            )
            for site_id in self._peers
        }

    def accept_upload(self, site_id: str, reply: UploadReply) -> None:
        """Adds the masked vector to the running sum; it is not kept. Raises BadReplyError."""
        component = Component.UPLOAD
        self._admit(site_id, component, reply.attempt, reply.site_id)
        length = self.attempt.vector_length
        expected = length * self._session.parameters.word_bytes
        if len(reply.masked) != expected:
            raise self._fault(
                site_id, component, FaultReason.WRONG_LENGTH, f"{len(reply.masked)} bytes, not {expected}"
            )
        statement = UploadStatement(session=self._session, site_id=site_id, terms=self._terms)
        self._verify(component, statement, reply.signature)
        if self._sum is None:
            self._sum = zeros(length, self._bits)
        self._sum += from_bytes(reply.masked, self._bits)
        self._uploads[site_id] = reply.signature

    def close_uploads(self) -> tuple[str, ...]:
        """The survivors, from now on fixed. Raises AttemptAbortedError (TOO_FEW_UPLOADS)."""
        self._survivors = self._finish(Component.UPLOAD, AbortReason.TOO_FEW_UPLOADS)
        return self._survivors

    def build_confirm_requests(self) -> dict[str, ConfirmRequest]:
        """For each survivor; only where ``needs_confirmation``."""
        if not self.needs_confirmation:
            raise InternalError("nobody dropped: there is no survivor set to confirm")
        self._begin(Component.CONFIRM, self._survivors)
        request = ConfirmRequest(attempt=self.attempt, uploads=self._upload_signatures())
        return dict.fromkeys(self._survivors, request)

    def accept_confirm(self, site_id: str, reply: ConfirmReply) -> None:
        """Raises BadReplyError."""
        component = Component.CONFIRM
        self._admit(site_id, component, reply.attempt, reply.site_id)
        statement = SurvivorStatement(
            session=self._session, site_id=site_id, terms=self._terms, survivors=self._survivors
        )
        self._verify(component, statement, reply.signature)
        self._confirmations[site_id] = reply.signature

    def build_unmask_requests(self) -> dict[str, UnmaskRequest]:
        """For each survivor that can still answer. Raises AttemptAbortedError (TOO_FEW_CONFIRMATIONS)."""
        sites = self._survivors
        if self.needs_confirmation:
            sites = self._finish(Component.CONFIRM, AbortReason.TOO_FEW_CONFIRMATIONS)
        self._begin(Component.UNMASK, sites)
        request = UnmaskRequest(
            attempt=self.attempt,
            uploads=self._upload_signatures(),
            confirmations=tuple((site_id, self._confirmations[site_id]) for site_id in sites)
            if self.needs_confirmation
            else (),
        )
        return dict.fromkeys(sites, request)

    def accept_unmask(self, site_id: str, reply: UnmaskReply) -> None:
        """Checks each share against what its dealer committed to. Raises BadReplyError."""
        component = Component.UNMASK
        self._admit(site_id, component, reply.attempt, reply.site_id)
        expected = [(owner, "seed" if owner in self._survivors else "key") for owner in self._peers]
        if [(share.owner, share.kind) for share in reply.shares] != expected:
            raise self._fault(
                site_id, component, FaultReason.WRONG_SHARES, "not one share of each peer, of the right kind"
            )
        statement = RevealStatement(
            session=self._session,
            site_id=site_id,
            terms=self._terms,
            survivors=self._survivors,
            shares=tuple(share.value for share in reply.shares),
        )
        self._verify(component, statement, reply.signature)
        for share in reply.shares:
            dealt = self._shares[share.owner][site_id]
            commitment = dealt.seed_share_commitment if share.kind == "seed" else dealt.key_share_commitment
            if share_commitment(self._session, share.kind, share.owner, site_id, share.value) != commitment:
                raise self._fault(
                    site_id,
                    component,
                    FaultReason.WRONG_SHARES,
                    f"its share of {share.owner} is not the one that was dealt",
                )
        self._revealed[site_id] = {share.owner: share.value for share in reply.shares}

    def total(self) -> IntVector:
        """The exact sum of the survivors' vectors, int64[vector_length]. Ends the attempt.

        Raises:
            AttemptAbortedError: TOO_FEW_REVEALED_SHARES, or BAD_DEALER (named): shares that all are as
                their dealer committed to them, and yet do not give the secret that it signed.
        """
        self._finish(Component.UNMASK, AbortReason.TOO_FEW_REVEALED_SHARES)
        plus: list[bytes] = []
        minus: list[bytes] = []
        for owner in self._survivors:
            seed = self._reconstruct(owner)
            if seed_commitment(self._session, owner, seed) != self._keys[owner].seed_commitment:
                raise self._bad_dealer(owner, "mask seed")
            minus.append(self_mask_key(self._session, owner, seed))
        for owner in self.dropped:
            private = self._reconstruct(owner)
            if public_key(private) != self._keys[owner].mask_public:
                raise self._bad_dealer(owner, "mask key")
            for survivor in self._survivors:
                first, second = self._roster.ordered((owner, survivor))
                agreed = agree(private, self._keys[survivor].mask_public)
                mask_key = pair_mask_key(agreed, terms=self._terms, first=first, second=second)
                (minus if first == survivor else plus).append(mask_key)
        if self._sum is None:
            raise InternalError("no upload was added up")
        residues, self._sum = self._sum, None
        self._revealed.clear()
        apply_streams(residues, plus, minus)
        return centre(residues)

    def _reconstruct(self, owner: str) -> bytes:
        shares = {
            self._roster.shamir_index(holder): values[owner] for holder, values in self._revealed.items()
        }
        return combine_shares(shares, threshold=self._threshold)

    def _bad_dealer(self, owner: str, what: str) -> AttemptAbortedError:
        message = f"{owner} dealt shares that do not give the {what} it signed"
        self._faults.append(BadReplyError(owner, Component.SHARE, FaultReason.BAD_DEALER, message))
        return AttemptAbortedError(AbortReason.BAD_DEALER, message, peer=owner)

    def _upload_signatures(self) -> tuple[tuple[str, bytes], ...]:
        return tuple((site_id, self._uploads[site_id]) for site_id in self._survivors)

    def _begin(self, component: Component, sites: tuple[str, ...]) -> None:
        if component in self._asked:
            raise InternalError(f"{component} was asked for already")
        previous = _ORDER[: _ORDER.index(component)]
        skipped = {Component.CONFIRM} if component is Component.UNMASK else set()
        if any(item not in self._closed and item not in skipped for item in previous):
            raise InternalError(f"{component} comes after {', '.join(previous)}")
        self._asked[component] = sites

    def _finish(self, component: Component, reason: AbortReason) -> tuple[str, ...]:
        if component not in self._asked:
            raise InternalError(f"{component} was never asked for")
        if component in self._closed:
            raise InternalError(f"{component} is over already")
        self._closed.add(component)
        sites = self.answered(component)
        if len(sites) < self._threshold:
            missing = ", ".join(site for site in self._asked[component] if site not in sites)
            raise AttemptAbortedError(
                reason,
                f"{len(sites)} sites answered {component}, the threshold is {self._threshold}; "
                f"missing: {missing or 'none of those asked'}",
            )
        return sites

    def _admit(self, site_id: str, component: Component, attempt: AttemptId, claimed: str) -> None:
        if site_id not in self._asked.get(component, ()):
            raise self._fault(site_id, component, FaultReason.NOT_ASKED, "this site was not asked")
        if component in self._closed:
            raise self._fault(site_id, component, FaultReason.LATE, "the component is over")
        if site_id not in self.pending(component):
            raise self._fault(site_id, component, FaultReason.REPEATED, "this site has answered already")
        if attempt != self.attempt:
            raise self._fault(site_id, component, FaultReason.OTHER_ATTEMPT, "it is of another attempt")
        if claimed != site_id:
            raise self._fault(site_id, component, FaultReason.OTHER_SITE, "it speaks for another site")

    def _verify(self, component: Component, statement: Statement, signature: bytes) -> None:
        try:
            statement.verify(signature)
        except BadSignatureError as error:
            raise self._fault(
                statement.site_id, component, FaultReason.BAD_SIGNATURE, "its signature does not verify"
            ) from error

    def _fault(self, site_id: str, component: Component, reason: FaultReason, message: str) -> BadReplyError:
        error = BadReplyError(site_id, component, reason, message)
        self._faults.append(error)
        if reason not in _HARMLESS and component not in self._closed:
            self._bad[component].add(site_id)
        return error
