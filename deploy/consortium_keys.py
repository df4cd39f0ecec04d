"""Certificates for one machine's loopback: TLS between a perimeter, Flower's servers and its nodes.

They live as long as the folder that they are in and protect loopback only. Between machines it is the
coordinator's authority that counts: :mod:`server.authority`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from shared.certificates import issue_server_certificate, make_authority, new_key, to_pem
from shared.private_keys import save_private_key

VALID_FOR = timedelta(days=90)


@dataclass(frozen=True, kw_only=True)
class ServerCertificate:
    """PEM files: the authority that clients trust, the server's certificate and key."""

    authority: Path
    certificate: Path
    key: Path


def make_server_certificate(
    folder: Path,
    *,
    name: str = "superlink",
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1"),
    valid_for: timedelta = VALID_FOR,
) -> ServerCertificate:
    """An authority used once (its key is not kept) and a certificate of ``NAME.key`` for the hosts."""
    now = datetime.now(UTC)
    authority = make_authority("Lacuna loopback", now=now, valid_for=valid_for)
    key = new_key()
    certificate = issue_server_certificate(
        authority, key.public_key(), hosts=hosts, now=now, valid_for=valid_for
    )
    files = ServerCertificate(
        authority=folder / "ca.pem", certificate=folder / f"{name}.pem", key=folder / f"{name}.key"
    )
    files.authority.write_bytes(to_pem(authority.certificate))
    files.certificate.write_bytes(to_pem(certificate))
    save_private_key(key, files.key)
    return files
