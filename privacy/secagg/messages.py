"""The ten messages of an attempt. ``shared/WIRE_FORMAT.md`` lists every field and bound.

``from_envelope`` raises MalformedMessageError for whatever is not exactly such a message; that a message
is well formed says nothing about whether it is acceptable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from privacy.secagg.keys import PUBLIC_BYTES, SEALED_BYTES, SHARE_BYTES
from privacy.secagg.masking import PIECE_BYTES
from privacy.secagg.message_fields import (
    exact_fields,
    open_body,
    read_attempt,
    read_hex,
    read_ledger_head,
    read_list,
    read_signature,
    read_site,
    read_sites,
    same_length,
    split_blob,
    write_attempt,
)
from privacy.secagg.session import AttemptId, Session
from privacy.secagg.statements import KeyStatement, ShareStatement
from shared.canonical import DIGEST_BYTES, canonical_json
from shared.errors import MalformedMessageError
from shared.identity import SIGNATURE_BYTES
from shared.wire import MAX_FRAME_BYTES, Blob, Envelope

DEALT_SHARE_BYTES = SEALED_BYTES + 2 * DIGEST_BYTES + SIGNATURE_BYTES
MAX_PIECES = MAX_FRAME_BYTES // PIECE_BYTES
"""Bound on the blobs of a masked vector: as many as a frame can hold."""
ShareKind = Literal["seed", "key"]


@dataclass(frozen=True, kw_only=True)
class KeyAdvertisement:
    """A site's public keys for one attempt, signed by its identity."""

    site_id: str
    mask_public: bytes
    share_public: bytes
    seed_commitment: bytes
    ledger_head: dict[str, Any]
    signature: bytes

    @cached_property
    def _canonical_head(self) -> bytes:
        return canonical_json(self.ledger_head)

    NAMES: ClassVar[set[str]] = {"site", "mask_public", "share_public", "seed", "ledger_head", "signature"}

    def statement(self, session: Session) -> KeyStatement:
        return KeyStatement(
            session=session,
            site_id=self.site_id,
            mask_public=self.mask_public,
            share_public=self.share_public,
            seed_commitment=self.seed_commitment,
            ledger_head=self._canonical_head,
        )

    def to_body(self) -> dict[str, Any]:
        return {
            "site": self.site_id,
            "mask_public": self.mask_public.hex(),
            "share_public": self.share_public.hex(),
            "seed": self.seed_commitment.hex(),
            "ledger_head": self.ledger_head,
            "signature": self.signature.hex(),
        }

    @classmethod
    def from_body(cls, value: Any) -> KeyAdvertisement:
        body = exact_fields(value, cls.NAMES, what="keys")
        return cls(
            site_id=read_site(body["site"], what="keys"),
            mask_public=read_hex(body["mask_public"], PUBLIC_BYTES, what="mask_public"),
            share_public=read_hex(body["share_public"], PUBLIC_BYTES, what="share_public"),
            seed_commitment=read_hex(body["seed"], DIGEST_BYTES, what="seed"),
            ledger_head=read_ledger_head(body["ledger_head"]),
            signature=read_signature(body["signature"], what="keys"),
        )


@dataclass(frozen=True, kw_only=True)
class DealtShare:
    """What one dealer gives one recipient: 80 sealed bytes, two commitments, a signature (208 bytes)."""

    dealer: str
    recipient: str
    ciphertext: bytes
    seed_share_commitment: bytes
    key_share_commitment: bytes
    signature: bytes

    def statement(self, session: Session, key_set: bytes) -> ShareStatement:
        return ShareStatement(
            session=session,
            site_id=self.dealer,
            recipient=self.recipient,
            key_set=key_set,
            ciphertext=self.ciphertext,
            seed_share_commitment=self.seed_share_commitment,
            key_share_commitment=self.key_share_commitment,
        )

    def to_bytes(self) -> bytes:
        return self.ciphertext + self.seed_share_commitment + self.key_share_commitment + self.signature

    @classmethod
    def from_bytes(cls, data: bytes, *, dealer: str, recipient: str) -> DealtShare:
        ends = (SEALED_BYTES, SEALED_BYTES + DIGEST_BYTES, SEALED_BYTES + 2 * DIGEST_BYTES)
        return cls(
            dealer=dealer,
            recipient=recipient,
            ciphertext=data[: ends[0]],
            seed_share_commitment=data[ends[0] : ends[1]],
            key_share_commitment=data[ends[1] : ends[2]],
            signature=data[ends[2] :],
        )


@dataclass(frozen=True, kw_only=True)
class RevealedShare:
    """One share in the clear: of a survivor's mask seed or of a dropped site's mask key, never both."""

    owner: str
    kind: ShareKind
    value: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class AdvertiseRequest:
    """Server to site: make keys for this attempt."""

    KIND: ClassVar[str] = "secagg_advertise"
    attempt: AttemptId

    def to_envelope(self) -> Envelope:
        return Envelope(kind=self.KIND, body={"attempt": write_attempt(self.attempt)})

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> AdvertiseRequest:
        body = open_body(envelope, cls.KIND, {"attempt"}, blobs=0)
        return cls(attempt=read_attempt(body["attempt"]))


@dataclass(frozen=True, kw_only=True)
class AdvertiseReply:
    """Site to server: the signed keys."""

    KIND: ClassVar[str] = "secagg_advertise_reply"
    attempt: AttemptId
    keys: KeyAdvertisement

    def to_envelope(self) -> Envelope:
        body = {"attempt": write_attempt(self.attempt), "keys": self.keys.to_body()}
        return Envelope(kind=self.KIND, body=body)

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> AdvertiseReply:
        body = open_body(envelope, cls.KIND, {"attempt", "keys"}, blobs=0)
        return cls(attempt=read_attempt(body["attempt"]), keys=KeyAdvertisement.from_body(body["keys"]))


@dataclass(frozen=True, kw_only=True)
class ShareRequest:
    """Server to site: all keys of the attempt; deal shares to their owners."""

    KIND: ClassVar[str] = "secagg_share"
    attempt: AttemptId
    keys: tuple[KeyAdvertisement, ...]

    def to_envelope(self) -> Envelope:
        body = {"attempt": write_attempt(self.attempt), "keys": [item.to_body() for item in self.keys]}
        return Envelope(kind=self.KIND, body=body)

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> ShareRequest:
        body = open_body(envelope, cls.KIND, {"attempt", "keys"}, blobs=0)
        keys = tuple(KeyAdvertisement.from_body(item) for item in read_list(body["keys"], what="keys"))
        if len({item.site_id for item in keys}) != len(keys):
            raise MalformedMessageError("keys: a site stands twice")
        return cls(attempt=read_attempt(body["attempt"]), keys=keys)


@dataclass(frozen=True, kw_only=True)
class ShareReply:
    """Site to server: a dealt share for every site of the key set, the dealer included."""

    KIND: ClassVar[str] = "secagg_share_reply"
    attempt: AttemptId
    site_id: str
    shares: tuple[DealtShare, ...]

    def to_envelope(self) -> Envelope:
        body = {
            "attempt": write_attempt(self.attempt),
            "site": self.site_id,
            "recipients": [share.recipient for share in self.shares],
        }
        return Envelope(kind=self.KIND, body=body, blobs=(b"".join(item.to_bytes() for item in self.shares),))

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> ShareReply:
        body = open_body(envelope, cls.KIND, {"attempt", "site", "recipients"}, blobs=1)
        site_id = read_site(body["site"], what="site")
        recipients = read_sites(body["recipients"], what="recipients")
        pieces = split_blob(envelope.blobs[0], len(recipients), DEALT_SHARE_BYTES, what="shares")
        shares = tuple(
            DealtShare.from_bytes(piece, dealer=site_id, recipient=recipient)
            for recipient, piece in zip(recipients, pieces, strict=True)
        )
        return cls(attempt=read_attempt(body["attempt"]), site_id=site_id, shares=shares)


@dataclass(frozen=True, kw_only=True)
class UploadRequest:
    """Server to one site: its peers P (itself included), their shares for it, hashes of what to work on."""

    KIND: ClassVar[str] = "secagg_upload"
    attempt: AttemptId
    site_id: str
    weights_hash: bytes
    request_hash: bytes
    shares: tuple[DealtShare, ...]

    @property
    def peers(self) -> tuple[str, ...]:
        """P, as the server lists it."""
        return tuple(share.dealer for share in self.shares)

    def to_envelope(self) -> Envelope:
        body = {
            "attempt": write_attempt(self.attempt),
            "site": self.site_id,
            "weights_hash": self.weights_hash.hex(),
            "request_hash": self.request_hash.hex(),
            "peers": list(self.peers),
        }
        return Envelope(kind=self.KIND, body=body, blobs=(b"".join(item.to_bytes() for item in self.shares),))

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> UploadRequest:
        names = {"attempt", "site", "weights_hash", "request_hash", "peers"}
        body = open_body(envelope, cls.KIND, names, blobs=1)
        site_id = read_site(body["site"], what="site")
        peers = read_sites(body["peers"], what="peers")
        pieces = split_blob(envelope.blobs[0], len(peers), DEALT_SHARE_BYTES, what="shares")
        return cls(
            attempt=read_attempt(body["attempt"]),
            site_id=site_id,
            weights_hash=read_hex(body["weights_hash"], DIGEST_BYTES, what="weights_hash"),
            request_hash=read_hex(body["request_hash"], DIGEST_BYTES, what="request_hash"),
            shares=tuple(
                DealtShare.from_bytes(piece, dealer=dealer, recipient=site_id)
                for dealer, piece in zip(peers, pieces, strict=True)
            ),
        )


@dataclass(frozen=True, kw_only=True)
class UploadReply:
    """Site to server: the masked vector (little-endian words, in pieces) and the signed terms."""

    KIND: ClassVar[str] = "secagg_upload_reply"
    attempt: AttemptId
    site_id: str
    signature: bytes
    masked: tuple[Blob, ...] = field(repr=False)
    """Pieces of PIECE_BYTES, the last one shorter or as long."""

    @property
    def masked_bytes(self) -> int:
        """Size of the whole vector."""
        return sum(len(piece) for piece in self.masked)

    def to_envelope(self) -> Envelope:
        body = {
            "attempt": write_attempt(self.attempt),
            "site": self.site_id,
            "signature": self.signature.hex(),
        }
        return Envelope(kind=self.KIND, body=body, blobs=self.masked)

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> UploadReply:
        pieces = envelope.blobs
        if not 1 <= len(pieces) <= MAX_PIECES:
            raise MalformedMessageError(
                f"masked vector: 1 to {MAX_PIECES} pieces expected, not {len(pieces)}"
            )
        if any(len(piece) != PIECE_BYTES for piece in pieces[:-1]) or not 1 <= len(pieces[-1]) <= PIECE_BYTES:
            raise MalformedMessageError(f"masked vector: each piece but the last has {PIECE_BYTES} bytes")
        body = open_body(envelope, cls.KIND, {"attempt", "site", "signature"}, blobs=len(pieces))
        return cls(
            attempt=read_attempt(body["attempt"]),
            site_id=read_site(body["site"], what="site"),
            signature=read_signature(body["signature"], what="upload signature"),
            masked=pieces,
        )


def _read_signed_sites(sites: Any, signatures: Any, *, what: str) -> tuple[tuple[str, bytes], ...]:
    names = read_sites(sites, what=what)
    values = read_list(signatures, what=what)
    same_length(names, values, what=what)
    return tuple((name, read_signature(value, what=what)) for name, value in zip(names, values, strict=True))


@dataclass(frozen=True, kw_only=True)
class ConfirmRequest:
    """Server to survivors, only after a drop: the set U and the upload signature of each of them."""

    KIND: ClassVar[str] = "secagg_confirm"
    attempt: AttemptId
    uploads: tuple[tuple[str, bytes], ...]

    @property
    def survivors(self) -> tuple[str, ...]:
        return tuple(site_id for site_id, _ in self.uploads)

    def to_envelope(self) -> Envelope:
        body = {
            "attempt": write_attempt(self.attempt),
            "survivors": list(self.survivors),
            "uploads": [signature.hex() for _, signature in self.uploads],
        }
        return Envelope(kind=self.KIND, body=body)

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> ConfirmRequest:
        body = open_body(envelope, cls.KIND, {"attempt", "survivors", "uploads"}, blobs=0)
        uploads = _read_signed_sites(body["survivors"], body["uploads"], what="survivors")
        return cls(attempt=read_attempt(body["attempt"]), uploads=uploads)


@dataclass(frozen=True, kw_only=True)
class ConfirmReply:
    """Site to server: its signature under U, the only one it gives for this attempt."""

    KIND: ClassVar[str] = "secagg_confirm_reply"
    attempt: AttemptId
    site_id: str
    signature: bytes

    def to_envelope(self) -> Envelope:
        body = {
            "attempt": write_attempt(self.attempt),
            "site": self.site_id,
            "signature": self.signature.hex(),
        }
        return Envelope(kind=self.KIND, body=body)

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> ConfirmReply:
        body = open_body(envelope, cls.KIND, {"attempt", "site", "signature"}, blobs=0)
        return cls(
            attempt=read_attempt(body["attempt"]),
            site_id=read_site(body["site"], what="site"),
            signature=read_signature(body["signature"], what="confirmation"),
        )


@dataclass(frozen=True, kw_only=True)
class UnmaskRequest:
    """Server to survivors: U with upload signatures, and after a drop at least t confirmations of U."""

    KIND: ClassVar[str] = "secagg_unmask"
    attempt: AttemptId
    uploads: tuple[tuple[str, bytes], ...]
    confirmations: tuple[tuple[str, bytes], ...]

    @property
    def survivors(self) -> tuple[str, ...]:
        return tuple(site_id for site_id, _ in self.uploads)

    def to_envelope(self) -> Envelope:
        body = {
            "attempt": write_attempt(self.attempt),
            "survivors": list(self.survivors),
            "uploads": [signature.hex() for _, signature in self.uploads],
            "confirmed_by": [site_id for site_id, _ in self.confirmations],
            "confirmations": [signature.hex() for _, signature in self.confirmations],
        }
        return Envelope(kind=self.KIND, body=body)

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> UnmaskRequest:
        names = {"attempt", "survivors", "uploads", "confirmed_by", "confirmations"}
        body = open_body(envelope, cls.KIND, names, blobs=0)
        return cls(
            attempt=read_attempt(body["attempt"]),
            uploads=_read_signed_sites(body["survivors"], body["uploads"], what="survivors"),
            confirmations=_read_signed_sites(
                body["confirmed_by"], body["confirmations"], what="confirmations"
            ),
        )


@dataclass(frozen=True, kw_only=True)
class UnmaskReply:
    """Site to server: one share of each peer, of one kind or the other."""

    KIND: ClassVar[str] = "secagg_unmask_reply"
    attempt: AttemptId
    site_id: str
    shares: tuple[RevealedShare, ...]
    signature: bytes

    def to_envelope(self) -> Envelope:
        body = {
            "attempt": write_attempt(self.attempt),
            "site": self.site_id,
            "owners": [share.owner for share in self.shares],
            "kinds": [share.kind for share in self.shares],
            "signature": self.signature.hex(),
        }
        return Envelope(kind=self.KIND, body=body, blobs=(b"".join(item.value for item in self.shares),))

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> UnmaskReply:
        names = {"attempt", "site", "owners", "kinds", "signature"}
        body = open_body(envelope, cls.KIND, names, blobs=1)
        owners = read_sites(body["owners"], what="owners")
        kinds = read_list(body["kinds"], what="kinds")
        same_length(owners, kinds, what="kinds")
        if any(kind not in ("seed", "key") for kind in kinds):
            raise MalformedMessageError("kinds: each is seed or key")
        pieces = split_blob(envelope.blobs[0], len(owners), SHARE_BYTES, what="revealed shares")
        return cls(
            attempt=read_attempt(body["attempt"]),
            site_id=read_site(body["site"], what="site"),
            shares=tuple(
                RevealedShare(owner=owner, kind=kind, value=value)
                for owner, kind, value in zip(owners, kinds, pieces, strict=True)
            ),
            signature=read_signature(body["signature"], what="reveal"),
        )


Request = AdvertiseRequest | ShareRequest | UploadRequest | ConfirmRequest | UnmaskRequest
Reply = AdvertiseReply | ShareReply | UploadReply | ConfirmReply | UnmaskReply
REQUESTS: dict[str, type[Request]] = {
    kind.KIND: kind for kind in (AdvertiseRequest, ShareRequest, UploadRequest, ConfirmRequest, UnmaskRequest)
}
REPLIES: dict[str, type[Reply]] = {
    kind.KIND: kind for kind in (AdvertiseReply, ShareReply, UploadReply, ConfirmReply, UnmaskReply)
}
