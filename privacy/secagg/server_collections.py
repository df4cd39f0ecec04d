"""What the server collects, one class for each kind of reply: keys, shares, uploads, confirmations, reveals.

Each class admits replies of the sites that were asked, verifies them, and keeps what later rounds need. None
trusts a reply: a bad one raises :class:`BadReplyError` and its site counts as dropped from there on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from privacy.secagg.keys import WeakKeyError, agree, share_commitment
from privacy.secagg.masking import Words, add_pieces, zeros
from privacy.secagg.messages import (
    AdvertiseReply,
    ConfirmReply,
    DealtShare,
    KeyAdvertisement,
    ShareReply,
    UnmaskReply,
    UploadReply,
)
from privacy.secagg.reasons import BadReplyError, Component, FaultReason
from privacy.secagg.session import AttemptId, Session
from privacy.secagg.statements import RevealStatement, Statement, SurvivorStatement, UploadStatement
from shared.identity import BadSignatureError

_PROBE = bytes([1]) * 32
"""Any X25519 private key: agreeing with it shows a point of small order."""
_HARMLESS = frozenset({FaultReason.NOT_ASKED, FaultReason.REPEATED, FaultReason.LATE})


@dataclass(kw_only=True)
class Collection(ABC):
    """Replies to one component of one attempt."""

    component: ClassVar[Component]
    session: Session
    asked: tuple[str, ...]
    """Sites that a request was built for, in roster order."""
    bad: set[str] = field(default_factory=set)
    """Sites whose answer cannot come any more: given up, or it was unusable."""
    closed: bool = False

    @property
    @abstractmethod
    def replies(self) -> Mapping[str, object]:
        """What was accepted, by site."""

    @property
    def answered(self) -> tuple[str, ...]:
        """Sites whose reply was accepted, in roster order."""
        return self.session.roster.ordered(self.replies)

    @property
    def pending(self) -> tuple[str, ...]:
        """Sites that were asked and from which an acceptable reply can still come."""
        gone = {*self.replies, *self.bad}
        return tuple(site_id for site_id in self.asked if site_id not in gone)

    def accept(self, site_id: str, reply: Any) -> None:
        """Verify a reply and take it in. Raises BadReplyError; its site is then out, unless harmless."""
        try:
            self._admit(site_id, reply.attempt, _claimed(reply))
            self._take(site_id, reply)
        except BadReplyError as error:
            if error.reason not in _HARMLESS and not self.closed:
                self.bad.add(site_id)
            raise

    @abstractmethod
    def _take(self, site_id: str, reply: Any) -> None:
        """Check what is particular to this component, then store. Raises BadReplyError."""

    def fault(self, site_id: str, reason: FaultReason, message: str) -> BadReplyError:
        return BadReplyError(site_id, self.component, reason, message)

    def _admit(self, site_id: str, attempt: AttemptId, claimed: str) -> None:
        if site_id not in self.asked:
            raise self.fault(site_id, FaultReason.NOT_ASKED, "this site was not asked")
        if self.closed:
            raise self.fault(site_id, FaultReason.LATE, "the component is over")
        if site_id not in self.pending:
            raise self.fault(site_id, FaultReason.REPEATED, "this site has answered already")
        if attempt != self.session.attempt:
            raise self.fault(site_id, FaultReason.OTHER_ATTEMPT, "it is of another attempt")
        if claimed != site_id:
            raise self.fault(site_id, FaultReason.OTHER_SITE, "it speaks for another site")

    def _verify(self, statement: Statement, signature: bytes) -> None:
        try:
            statement.verify(signature)
        except BadSignatureError as error:
            raise self.fault(
                statement.site_id, FaultReason.BAD_SIGNATURE, "its signature does not verify"
            ) from error


def _claimed(reply: Any) -> str:
    site_id: str = reply.keys.site_id if isinstance(reply, AdvertiseReply) else reply.site_id
    return site_id


@dataclass(kw_only=True)
class KeyCollection(Collection):
    """Signed keys of an attempt."""

    component: ClassVar[Component] = Component.ADVERTISE
    keys: dict[str, KeyAdvertisement] = field(default_factory=dict)

    @property
    def replies(self) -> Mapping[str, object]:
        return self.keys

    def in_order(self) -> dict[str, KeyAdvertisement]:
        """The keys in roster order: what every site is sent, and what the key set is hashed over."""
        return {site_id: self.keys[site_id] for site_id in self.answered}

    def _take(self, site_id: str, reply: AdvertiseReply) -> None:
        keys = reply.keys
        self._verify(keys.statement(self.session), keys.signature)
        seen = {key for item in self.keys.values() for key in (item.mask_public, item.share_public)}
        if keys.mask_public == keys.share_public or {keys.mask_public, keys.share_public} & seen:
            raise self.fault(site_id, FaultReason.KEY_USED_TWICE, "a public key stands twice")
        try:
            agree(_PROBE, keys.mask_public)
            agree(_PROBE, keys.share_public)
        except WeakKeyError as error:
            raise self.fault(site_id, FaultReason.WEAK_KEY, "key of small order") from error
        self.keys[site_id] = keys


@dataclass(kw_only=True)
class ShareCollection(Collection):
    """Dealt shares: from each dealer one for each site with keys."""

    component: ClassVar[Component] = Component.SHARE
    key_set: bytes
    shares: dict[str, dict[str, DealtShare]] = field(default_factory=dict)
    """By dealer, then recipient."""

    @property
    def replies(self) -> Mapping[str, object]:
        return self.shares

    def _take(self, site_id: str, reply: ShareReply) -> None:
        if {share.recipient for share in reply.shares} != set(self.asked):
            raise self.fault(
                site_id, FaultReason.WRONG_RECIPIENTS, "one share for each site with keys expected"
            )
        for share in reply.shares:
            self._verify(share.statement(self.session, self.key_set), share.signature)
        self.shares[site_id] = {share.recipient: share for share in reply.shares}


@dataclass(kw_only=True)
class UploadCollection(Collection):
    """The running sum of masked vectors, and who is in it under which signature. No vector is kept."""

    component: ClassVar[Component] = Component.UPLOAD
    terms: bytes
    signatures: dict[str, bytes] = field(default_factory=dict)
    total: Words = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.total = zeros(0, self.session.parameters.modulus_bits)

    @property
    def replies(self) -> Mapping[str, object]:
        return self.signatures

    def signed(self, sites: Iterable[str]) -> tuple[tuple[str, bytes], ...]:
        """Sites with their upload signatures, as requests carry them."""
        return tuple((site_id, self.signatures[site_id]) for site_id in sites)

    def _take(self, site_id: str, reply: UploadReply) -> None:
        length, parameters = self.session.attempt.vector_length, self.session.parameters
        expected = length * parameters.word_bytes
        if reply.masked_bytes != expected:
            raise self.fault(site_id, FaultReason.WRONG_LENGTH, f"{reply.masked_bytes} bytes, not {expected}")
        statement = UploadStatement(session=self.session, site_id=site_id, terms=self.terms)
        self._verify(statement, reply.signature)
        if not self.signatures:
            self.total = zeros(length, parameters.modulus_bits)
        add_pieces(self.total, reply.masked)
        self.signatures[site_id] = reply.signature


@dataclass(kw_only=True)
class ConfirmationCollection(Collection):
    """The survivors' signatures under the one survivor set."""

    component: ClassVar[Component] = Component.CONFIRM
    terms: bytes
    survivors: tuple[str, ...]
    signatures: dict[str, bytes] = field(default_factory=dict)

    @property
    def replies(self) -> Mapping[str, object]:
        return self.signatures

    def _take(self, site_id: str, reply: ConfirmReply) -> None:
        statement = SurvivorStatement(
            session=self.session, site_id=site_id, terms=self.terms, survivors=self.survivors
        )
        self._verify(statement, reply.signature)
        self.signatures[site_id] = reply.signature


@dataclass(kw_only=True)
class RevealCollection(Collection):
    """Revealed shares, each checked against what its dealer committed to."""

    component: ClassVar[Component] = Component.UNMASK
    terms: bytes
    peers: tuple[str, ...]
    survivors: tuple[str, ...]
    dealt: dict[str, dict[str, DealtShare]]
    revealed: dict[str, dict[str, bytes]] = field(default_factory=dict, repr=False)
    """By holder, then owner."""

    @property
    def replies(self) -> Mapping[str, object]:
        return self.revealed

    def _take(self, site_id: str, reply: UnmaskReply) -> None:
        expected = [(owner, "seed" if owner in self.survivors else "key") for owner in self.peers]
        if [(share.owner, share.kind) for share in reply.shares] != expected:
            raise self.fault(
                site_id, FaultReason.WRONG_SHARES, "not one share of each peer, of the right kind"
            )
        statement = RevealStatement(
            session=self.session,
            site_id=site_id,
            terms=self.terms,
            survivors=self.survivors,
            shares=tuple(share.value for share in reply.shares),
        )
        self._verify(statement, reply.signature)
        for share in reply.shares:
            dealt = self.dealt[share.owner][site_id]
            commitment = dealt.seed_share_commitment if share.kind == "seed" else dealt.key_share_commitment
            if share_commitment(self.session, share.kind, share.owner, site_id, share.value) != commitment:
                raise self.fault(
                    site_id,
                    FaultReason.WRONG_SHARES,
                    f"its share of {share.owner} is not the one that was dealt",
                )
        self.revealed[site_id] = {share.owner: share.value for share in reply.shares}
