"""Keys of one attempt: two X25519 pairs and a mask seed, and everything derived from them.

Derivation is HKDF-SHA-256 (RFC 5869) with an ``info`` that frames purpose, session, both ids and all that
was signed; shares travel under ChaCha20-Poly1305 (RFC 8439).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.secagg.session import Session
from privacy.secret_random import SecretRandom
from shared.canonical import digest, framed

PUBLIC_BYTES = 32
SEED_BYTES = 32
SHARE_BYTES = 32
SEALED_BYTES = 2 * SHARE_BYTES + 16
_ONE_TIME_NONCE = bytes(12)


class WeakKeyError(Exception):
    """A peer's public key is a point of small order: the agreed secret would be known to all."""


class UnsealingError(Exception):
    """A sealed share does not open: another key, another attempt, or changed bytes."""


class AttemptKeys:
    """The secrets of one attempt. They live in memory only; the repr never shows them.

    :meth:`wipe` overwrites them. Python may have copied bytes elsewhere: it is the best that can be done
    here, and no defence against who can read the process's memory.
    """

    def __init__(self, entropy: SecretRandom) -> None:
        self._mask_private = bytearray(entropy.bytes(32))
        self._share_private = bytearray(entropy.bytes(32))
        self._seed = bytearray(entropy.bytes(SEED_BYTES))
        self._agreed: dict[tuple[int, bytes], bytearray] = {}
        self._keys = [
            X25519PrivateKey.from_private_bytes(bytes(s)) for s in (self._mask_private, self._share_private)
        ]
        self.mask_public, self.share_public = (key.public_key().public_bytes_raw() for key in self._keys)

    def __repr__(self) -> str:
        return "AttemptKeys(<redacted>)"

    def __reduce__(self) -> str:
        raise TypeError("keys of an attempt are never serialised")

    @property
    def mask_private(self) -> bytes:
        return bytes(self._mask_private)

    @property
    def share_private(self) -> bytes:
        return bytes(self._share_private)

    def agree_on_masks(self, public: bytes) -> bytes:
        """:func:`agree` with the mask key. Computed once for a peer, and forgotten by :meth:`wipe`."""
        return self._agreed_with(0, public)

    def agree_on_shares(self, public: bytes) -> bytes:
        """:func:`agree` with the share key. Computed once for a peer, and forgotten by :meth:`wipe`."""
        return self._agreed_with(1, public)

    def _agreed_with(self, which: int, public: bytes) -> bytes:
        if (which, public) not in self._agreed:
            self._agreed[which, public] = bytearray(agree(self._keys[which], public))
        return bytes(self._agreed[which, public])

    @property
    def seed(self) -> bytes:
        return bytes(self._seed)

    def wipe(self) -> None:
        for secret in (self._mask_private, self._share_private, self._seed, *self._agreed.values()):
            secret[:] = bytes(len(secret))
        self._agreed.clear()
        self._keys.clear()


def public_key(private: bytes) -> bytes:
    """32 raw bytes of the X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes | X25519PrivateKey, public: bytes) -> bytes:
    """X25519 (RFC 7748). Raises WeakKeyError for a public key of small order."""
    key = X25519PrivateKey.from_private_bytes(private) if isinstance(private, bytes) else private
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise WeakKeyError("public key of small order") from error


def _derive(secret: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def seed_commitment(session: Session, site_id: str, seed: bytes) -> bytes:
    """H(mask seed), 32 bytes: signed with the keys."""
    return digest("lacuna/secagg/seed/v1", *session.parts(), site_id.encode(), seed)


def share_commitment(session: Session, kind: str, owner: str, recipient: str, share: bytes) -> bytes:
    """H(share), 32 bytes: signed by the dealer, so that a wrong share names who revealed it."""
    return digest(
        "lacuna/secagg/share-value/v1",
        *session.parts(),
        kind.encode(),
        owner.encode(),
        recipient.encode(),
        share,
    )


def self_mask_key(session: Session, site_id: str, seed: bytes) -> bytes:
    """Key of the stream that a site adds to its own vector."""
    return _derive(seed, framed("lacuna/secagg/self-mask/v1", *session.parts(), site_id.encode()))


def pair_mask_key(agreed: bytes, *, terms: bytes, first: str, second: str) -> bytes:
    """Key of the stream that ``first`` (earlier in the roster) adds and ``second`` subtracts.

    ``terms`` is the digest of :class:`privacy.secagg.statements.UploadTerms`: two sites that were given
    other weights, another request, other keys or other peers get streams that do not cancel.
    """
    return _derive(agreed, framed("lacuna/secagg/pair-mask/v1", terms, first.encode(), second.encode()))


def _sealing(agreed: bytes, *, key_set: bytes, dealer: str, recipient: str) -> tuple[ChaCha20Poly1305, bytes]:
    context = framed("lacuna/secagg/sealed-share/v1", key_set, dealer.encode(), recipient.encode())
    return ChaCha20Poly1305(_derive(agreed, context)), context


def seal_share(agreed: bytes, plaintext: bytes, *, key_set: bytes, dealer: str, recipient: str) -> bytes:
    """64 bytes (seed share, mask-key share) as 80 bytes. The key serves one message: the nonce is fixed."""
    cipher, context = _sealing(agreed, key_set=key_set, dealer=dealer, recipient=recipient)
    return cipher.encrypt(_ONE_TIME_NONCE, plaintext, context)


def unseal_share(agreed: bytes, sealed: bytes, *, key_set: bytes, dealer: str, recipient: str) -> bytes:
    """The inverse. Raises UnsealingError."""
    cipher, context = _sealing(agreed, key_set=key_set, dealer=dealer, recipient=recipient)
    try:
        return cipher.decrypt(_ONE_TIME_NONCE, sealed, context)
    except InvalidTag as error:
        raise UnsealingError(f"the share that {dealer} dealt to {recipient} does not open") from error
