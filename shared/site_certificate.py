"""What comes back to a site after enrolment: its certificate, and where and how to reach the coordinator.

Signed by the coordinator's identity, which the site has pinned: so the authority that the site's perimeter
trusts from then on hangs on the fingerprint that people read to one another, and on nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shared.attestation import Statement, open_signed_by, sign_statement
from shared.certificates import issued_by, read_certificate
from shared.errors import MalformedMessageError, RefusedError
from shared.identity import SigningKey

CERTIFICATE_PREDICATE = "site-certificate/v1"
MAX_CERTIFICATE_BYTES = 64 * 1024
ADDRESS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?:[1-9][0-9]{0,4}")
_FIELDS = ("site_id", "identity_key", "certificate", "authority", "address")


@dataclass(frozen=True, kw_only=True)
class SiteCertificate:
    """A site's certificate in PEM, the authority that signed it, and ``host:port`` of the coordinator."""

    site_id: str
    identity_key: str
    certificate: str
    authority: str
    address: str

    @property
    def not_after(self) -> datetime:
        """When the certificate ends (UTC)."""
        return read_certificate(self.certificate.encode(), what="the certificate").not_valid_after_utc

    @property
    def public_key(self) -> Any:
        """The key that the certificate is for."""
        return read_certificate(self.certificate.encode(), what="the certificate").public_key()


def sign_certificate(value: SiteCertificate, key: SigningKey) -> bytes:
    """JSON bytes for the site, signed by the coordinator."""
    predicate = {field: getattr(value, field) for field in _FIELDS}
    return sign_statement(
        Statement(predicate_type=CERTIFICATE_PREDICATE, subjects=(), predicate=predicate), key
    )


def open_certificate(data: bytes, *, coordinator: str) -> SiteCertificate:
    """Verify and parse.

    Args:
        coordinator: The coordinator's fingerprint, as the site has pinned it.

    Raises:
        RefusedError: signed by somebody else than the pinned coordinator.
        MalformedMessageError, BadSignatureError: it does not parse or verify.
    """
    statement, _ = open_signed_by(
        data,
        fingerprint=coordinator,
        predicate_type=CERTIFICATE_PREDICATE,
        what="site certificate",
        max_bytes=MAX_CERTIFICATE_BYTES,
        refusal=lambda key: RefusedError(
            f"the certificate file is signed by {key.fingerprint}, the pinned coordinator is {coordinator}",
            remedy="ask the coordinator, over another channel, for its fingerprint and for the file again",
        ),
    )
    predicate = statement.predicate
    if set(predicate) != set(_FIELDS) or not all(isinstance(text, str) for text in predicate.values()):
        raise MalformedMessageError(f"site certificate: holds exactly {', '.join(_FIELDS)}, all text")
    value = SiteCertificate(**predicate)
    if not ADDRESS.fullmatch(value.address) or int(value.address.rpartition(":")[2]) > 65535:
        raise MalformedMessageError(f"site certificate: {value.address[:80]!r} is not host:port")
    certificate = read_certificate(value.certificate.encode(), what="the site's certificate")
    authority = read_certificate(value.authority.encode(), what="the authority's certificate")
    if not issued_by(certificate, authority):
        raise MalformedMessageError("site certificate: was not issued by the authority beside it")
    return value
