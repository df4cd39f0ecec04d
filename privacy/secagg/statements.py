"""What is signed, exactly: one class for each statement, with its domain and its parts.

Each statement begins with :meth:`Session.parts` (study, run, round, attempt, purpose, vector length,
roster hash, parameters hash), so none can be presented in another attempt, study or role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from privacy.secagg.session import Session, set_digest
from shared.canonical import digest
from shared.identity import SigningKey, VerifyKey


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A domain and byte parts to sign."""

    domain: ClassVar[str]
    session: Session
    site_id: str

    def claims(self) -> tuple[bytes, ...]:
        raise NotImplementedError

    def parts(self) -> tuple[bytes, ...]:
        return (*self.session.parts(), self.site_id.encode(), *self.claims())

    def sign(self, key: SigningKey) -> bytes:
        return key.sign(self.domain, *self.parts())

    def verify(self, signature: bytes) -> None:
        """Under the key that the roster has for the site. Raises BadSignatureError."""
        key: VerifyKey = self.session.roster.key(self.site_id)
        key.verify(signature, self.domain, *self.parts())

    def digest(self) -> bytes:
        return digest(self.domain, *self.parts())


@dataclass(frozen=True, kw_only=True)
class KeyStatement(Statement):
    """The keys of a site for an attempt, the hash of its mask seed, and the head of its ledger."""

    domain: ClassVar[str] = "lacuna/secagg/keys/v1"
    mask_public: bytes
    share_public: bytes
    seed_commitment: bytes
    ledger_head: bytes

    def claims(self) -> tuple[bytes, ...]:
        return (self.mask_public, self.share_public, self.seed_commitment, self.ledger_head)


def key_set_digest(session: Session, statements: Sequence[KeyStatement]) -> bytes:
    """32 bytes for all keys of an attempt, in roster order, as a site was given them."""
    return digest("lacuna/secagg/key-set/v1", *session.parts(), *(item.digest() for item in statements))


@dataclass(frozen=True, kw_only=True)
class ShareStatement(Statement):
    """One dealt share: its ciphertext, and commitments to the two shares inside."""

    domain: ClassVar[str] = "lacuna/secagg/share/v1"
    recipient: str
    key_set: bytes
    ciphertext: bytes
    seed_share_commitment: bytes
    key_share_commitment: bytes

    def claims(self) -> tuple[bytes, ...]:
        return (
            self.recipient.encode(),
            self.key_set,
            self.ciphertext,
            self.seed_share_commitment,
            self.key_share_commitment,
        )


@dataclass(frozen=True, kw_only=True)
class UploadTerms:
    """What all uploads of one attempt must agree on; pair masks are bound to it."""

    session: Session
    key_set: bytes
    peers: tuple[str, ...]
    weights_hash: bytes
    request_hash: bytes

    def digest(self) -> bytes:
        return digest(
            "lacuna/secagg/upload-terms/v1",
            *self.session.parts(),
            self.key_set,
            set_digest(self.peers),
            self.weights_hash,
            self.request_hash,
        )


@dataclass(frozen=True, kw_only=True)
class UploadStatement(Statement):
    """A site uploaded a masked vector under these terms (32-byte digest)."""

    domain: ClassVar[str] = "lacuna/secagg/upload/v1"
    terms: bytes

    def claims(self) -> tuple[bytes, ...]:
        return (self.terms,)


@dataclass(frozen=True, kw_only=True)
class SurvivorStatement(Statement):
    """The one survivor set that a site will ever accept for this attempt."""

    domain: ClassVar[str] = "lacuna/secagg/survivors/v1"
    terms: bytes
    survivors: tuple[str, ...]

    def claims(self) -> tuple[bytes, ...]:
        return (self.terms, set_digest(self.survivors))


@dataclass(frozen=True, kw_only=True)
class RevealStatement(Statement):
    """The shares that a site reveals, so that a wrong one can be held against it."""

    domain: ClassVar[str] = "lacuna/secagg/reveal/v1"
    terms: bytes
    survivors: tuple[str, ...]
    shares: tuple[bytes, ...]

    def claims(self) -> tuple[bytes, ...]:
        return (self.terms, set_digest(self.survivors), *self.shares)
