"""Ed25519 identities: who signed what.

A person or process is known by its public key; the key's fingerprint is what people compare out of
band. A signature always covers a domain (purpose and version) and length-prefixed parts, see
:mod:`shared.canonical`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.canonical import digest, framed
from shared.errors import MalformedMessageError, PeerError, SiteError
from shared.private_keys import load_private_key, save_private_key

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64


class BadSignatureError(PeerError):
    """A signature does not verify under the key it is claimed to be from."""


@dataclass(frozen=True)
class VerifyKey:
    """An Ed25519 public key (32 raw bytes)."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != PUBLIC_KEY_BYTES:
            raise MalformedMessageError(f"an Ed25519 public key has 32 bytes, not {len(self.raw)}")

    @classmethod
    def from_hex(cls, text: str) -> VerifyKey:
        """Parse 64 lower-case hex digits. Raises MalformedMessageError."""
        try:
            raw = bytes.fromhex(text)
        except ValueError as error:
            raise MalformedMessageError(f"not a hex public key: {text[:80]!r}") from error
        if raw.hex() != text:
            raise MalformedMessageError("a public key is written as 64 lower-case hex digits")
        return cls(raw)

    def hex(self) -> str:
        return self.raw.hex()

    @property
    def fingerprint(self) -> str:
        """``SHA256:`` and 16 groups of 4 hex digits; what people read to one another."""
        text = digest("lacuna/fingerprint/v1", self.raw).hex()
        return "SHA256:" + "-".join(text[i : i + 4] for i in range(0, 64, 4))

    def verify(self, signature: bytes, domain: str, *parts: bytes) -> None:
        """Check a signature over ``framed(domain, *parts)``.

        Raises:
            BadSignatureError: it does not verify.
        """
        try:
            self.verify_raw(signature, framed(domain, *parts))
        except BadSignatureError as error:
            raise BadSignatureError(
                f"signature for {domain} does not verify under key {self.raw.hex()[:16]}..."
            ) from error

    def verify_raw(self, signature: bytes, message: bytes) -> None:
        """Check a signature over the message as it is. Raises BadSignatureError."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError) as error:
            raise BadSignatureError(
                f"a signature does not verify under key {self.raw.hex()[:16]}..."
            ) from error


class SigningKey:
    """An Ed25519 private key. Its repr never shows it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.verify_key = VerifyKey(
            key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        )

    def __repr__(self) -> str:
        return f"SigningKey(<redacted>, public={self.verify_key.hex()[:16]}...)"

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read an unencrypted PKCS #8 PEM file that only its owner can read.

        Raises:
            SiteError: missing, readable by others, or not such a key.
        """
        key = load_private_key(path)
        if not isinstance(key, Ed25519PrivateKey):
            raise SiteError(f"{path} holds a key of another kind than Ed25519")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key as PEM with mode 0600. Raises SiteError if the file exists already."""
        save_private_key(self._key, path)

    def sign(self, domain: str, *parts: bytes) -> bytes:
        """64-byte signature over ``framed(domain, *parts)``."""
        return self._key.sign(framed(domain, *parts))

    def sign_raw(self, message: bytes) -> bytes:
        """64-byte signature over the message as it is: for formats with a framing of their own (DSSE)."""
        return self._key.sign(message)
