"""X.509 for the links between machines: an authority, requests, certificates, a revocation list.

Only what Lacuna needs: NIST P-256 keys for machines, P-384 for authorities, one level below an authority,
certificates for exactly one use (a site's link, or a server). Private keys are written with mode 0600 and
never overwritten. Source: RFC 5280 (profile), RFC 2986 (requests).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import MalformedMessageError, SiteError
from shared.private_keys import load_private_key

MAX_PEM_BYTES = 16 * 1024
SKEW = timedelta(hours=1)
"""Certificates are valid from an hour before they are made: clocks differ."""


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A certificate that signs others, and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_authority(name: str, *, now: datetime, valid_for: timedelta) -> Authority:
    """A new self-signed authority that may sign end certificates and revocation lists, nothing below."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(name)
    builder = _builder(subject, subject, key.public_key(), now, valid_for)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(authority=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    return Authority(certificate=builder.sign(key, hashes.SHA384()), key=key)


def make_request(key: ec.EllipticCurvePrivateKey, *, name: str) -> bytes:
    """A certificate signing request (PEM) for ``name``, signed by the key that it is for."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(name)).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes, *, name: str) -> ec.EllipticCurvePublicKey:
    """The public key of a request for ``name``.

    Raises:
        MalformedMessageError: no request, for another name, of another kind of key, or not signed by it.
    """
    if len(pem) > MAX_PEM_BYTES:
        raise MalformedMessageError(f"a certificate request has at most {MAX_PEM_BYTES} bytes")
    try:
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
        if not request.is_signature_valid:
            raise MalformedMessageError("the certificate request is not signed by the key that it carries")
    except (ValueError, TypeError, InvalidSignature) as error:
        raise MalformedMessageError("not a certificate request (PEM)") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in ("secp256r1", "secp384r1"):
        raise MalformedMessageError("the certificate request has no NIST P-256 or P-384 key")
    if request.subject != _name(name):
        raise MalformedMessageError(f"the certificate request is not for {name!r}")
    return key


def issue_site_certificate(
    authority: Authority, key: ec.EllipticCurvePublicKey, *, name: str, now: datetime, valid_for: timedelta
) -> x509.Certificate:
    """A certificate with which a site's perimeter shows itself to the coordinator's."""
    return _issue(authority, key, name, ExtendedKeyUsageOID.CLIENT_AUTH, (), now, valid_for)


def issue_server_certificate(
    authority: Authority,
    key: ec.EllipticCurvePublicKey,
    *,
    hosts: Iterable[str],
    now: datetime,
    valid_for: timedelta,
) -> x509.Certificate:
    """A certificate for a server under the given DNS names and IP addresses."""
    names = tuple(hosts)
    return _issue(authority, key, names[0], ExtendedKeyUsageOID.SERVER_AUTH, names, now, valid_for)


def make_revocation_list(
    authority: Authority, revoked: Iterable[tuple[int, datetime]], *, now: datetime, valid_for: timedelta
) -> x509.CertificateRevocationList:
    """A signed list of revoked serial numbers with the time of each revocation."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - SKEW)
        .next_update(now + valid_for)
        .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
        .add_extension(_authority_identifier(authority), critical=False)
    )
    for serial, at in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(authority.key, hashes.SHA384())


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh NIST P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A NIST key from its file. Raises SiteError: missing, open to others, or another kind of key."""
    key = load_private_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SiteError(f"{path} holds a key of another kind than a NIST curve's")
    return key


def read_certificate(pem: bytes, *, what: str) -> x509.Certificate:
    """Parse one PEM certificate. Raises MalformedMessageError naming ``what``."""
    if len(pem) > MAX_PEM_BYTES:
        raise MalformedMessageError(f"{what} has more than {MAX_PEM_BYTES} bytes")
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise MalformedMessageError(f"{what} is not a PEM certificate") from error


def to_pem(item: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return item.public_bytes(serialization.Encoding.PEM)


def key_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """The key as DER SubjectPublicKeyInfo: what is compared and hashed."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority's key signed the certificate, and names itself as its issuer."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _issue(
    authority: Authority,
    key: ec.EllipticCurvePublicKey,
    name: str,
    use: x509.ObjectIdentifier,
    hosts: tuple[str, ...],
    now: datetime,
    valid_for: timedelta,
) -> x509.Certificate:
    builder = _builder(_name(name), authority.certificate.subject, key, now, valid_for)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(authority=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=True)
    builder = builder.add_extension(_authority_identifier(authority), critical=False)
    if hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority.key, hashes.SHA384())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    valid_for: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + valid_for)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _authority_identifier(authority: Authority) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
