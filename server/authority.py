"""The coordinator's authority: which certificates were issued to whom, which are revoked, and until when.

One authority serves all studies of a coordinator. A site's certificate is issued for the key in its
enrolment request, whose signer's fingerprint was read out of band; a later one for the same signer needs no
new comparison. Every certificate is in the index, and the perimeter lets in what is in the index and nothing
else: the authority's signature alone opens no door. Revoking a site revokes all its certificates and bars
its identity, so that the round driver leaves it out from the next round also where its link still stands.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from shared.canonical import canonical_json, parse_json
from shared.certificates import (
    Authority,
    issue_server_certificate,
    issue_site_certificate,
    key_bytes,
    load_key,
    make_authority,
    make_revocation_list,
    new_key,
    read_certificate,
    read_request,
    to_pem,
)
from shared.enrolment import EnrolmentRequest
from shared.errors import CoordinatorError, RefusedError, UsageError
from shared.home import private_directory, write_private
from shared.private_keys import save_private_key
from shared.site_certificate import ADDRESS, SiteCertificate

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365
REVOCATION_LIST_DAYS = 60
FOLDER = ".network"
"""Below the coordinator's root; no study id begins with a dot."""


@dataclass(frozen=True, kw_only=True)
class IssuedCertificate:
    """One line of the index. Times are unix seconds; ``revoked_at`` is None while it is good."""

    serial: str
    site_id: str
    identity_key: str
    tls_key_sha256: str
    node_key: str
    not_before: int
    not_after: int
    revoked_at: int | None = None
    reason: str = ""

    def good(self, now: datetime) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_at is None and now.timestamp() < self.not_after


def _serial(number: int) -> str:
    """As OpenSSL and nginx write it: whole bytes, upper case."""
    text = f"{number:X}"
    return text.zfill(len(text) + len(text) % 2)


class CertificateAuthority:
    """Files under ``coordinator/.network``; one operator at a time (a lock file)."""

    def __init__(self, coordinator_root: Path) -> None:
        self.root = coordinator_root / FOLDER

    # set up

    @property
    def exists(self) -> bool:
        return (self.root / "ca.key").exists()

    def create(self, *, address: str, now: datetime | None = None) -> None:
        """Make the authority and the coordinator's server certificate for ``HOST:PORT``.

        Raises:
            UsageError: not an address.
            CoordinatorError: there is an authority already.
        """
        if not ADDRESS.fullmatch(address) or int(address.rpartition(":")[2]) > 65535:
            raise UsageError(f"{address!r} is not HOST:PORT, the address at which hospitals reach you")
        if self.exists:
            raise CoordinatorError(f"{self.root} holds an authority already", remedy="see network.json there")
        at = now or datetime.now(UTC)
        private_directory(self.root.parent)
        private_directory(self.root)
        authority = make_authority("Lacuna coordinator", now=at, valid_for=timedelta(days=AUTHORITY_DAYS))
        write_private(self.root / "network.json", canonical_json({"address": address}))
        write_private(self.root / "ca.pem", to_pem(authority.certificate))
        save_private_key(authority.key, self.root / "ca.key")
        self.renew_server(now=at)
        self.write_revocation_list(now=at)

    def renew_server(self, *, now: datetime | None = None) -> None:
        """A new key and certificate for the coordinator's own perimeter."""
        host = self.address.rpartition(":")[0]
        key = new_key()
        certificate = issue_server_certificate(
            self._authority(),
            key.public_key(),
            hosts=(host,),
            now=now or datetime.now(UTC),
            valid_for=timedelta(days=CERTIFICATE_DAYS),
        )
        (self.root / "server.key").unlink(missing_ok=True)
        save_private_key(key, self.root / "server.key")
        write_private(self.root / "server.pem", to_pem(certificate))

    @property
    def address(self) -> str:
        """``host:port`` at which hospitals reach the coordinator. Raises CoordinatorError without one."""
        path = self.root / "network.json"
        if not path.exists():
            raise CoordinatorError(
                "this coordinator has no network set up",
                remedy="lacuna coordinator init-network --address HOST:PORT",
            )
        value = parse_json(path.read_bytes(), what=str(path))
        if not isinstance(value, dict) or not isinstance(value.get("address"), str):
            raise CoordinatorError(f"{path} is damaged")
        return str(value["address"])

    def _authority(self) -> Authority:
        if not self.exists:
            raise CoordinatorError(
                "this coordinator has no authority",
                remedy="lacuna coordinator init-network --address HOST:PORT",
            )
        pem = (self.root / "ca.pem").read_bytes()
        return Authority(certificate=read_certificate(pem, what="ca.pem"), key=load_key(self.root / "ca.key"))

    # certificates

    def issue(
        self, request: EnrolmentRequest, *, days: int = CERTIFICATE_DAYS, now: datetime | None = None
    ) -> SiteCertificate:
        """A certificate for an enrolled site. Whether it is enrolled, the caller has checked.

        The same key gets the same certificate again, as long as that is good.

        Raises:
            RefusedError: the identity or the TLS key was revoked, or the name stands for another identity.
            CoordinatorError: the request carries no machine keys.
        """
        if request.machines is None:
            raise CoordinatorError(
                f"the request of {request.name!r} carries no keys of its machines",
                remedy="the site makes a new one: lacuna site request --out FILE",
            )
        at = now or datetime.now(UTC)
        key = read_request(request.machines.tls_request.encode(), name=request.name)
        digest = hashlib.sha256(key_bytes(key)).hexdigest()
        with self._locked():
            index = self.index()
            self._check(request, digest, index)
            line = next((known for known in index if known.tls_key_sha256 == digest and known.good(at)), None)
            if line is None:
                certificate = issue_site_certificate(
                    self._authority(), key, name=request.name, now=at, valid_for=timedelta(days=days)
                )
                line = IssuedCertificate(
                    serial=_serial(certificate.serial_number),
                    site_id=request.name,
                    identity_key=request.key.hex(),
                    tls_key_sha256=digest,
                    node_key=request.machines.node_key.strip(),
                    not_before=int(certificate.not_valid_before_utc.timestamp()),
                    not_after=int(certificate.not_valid_after_utc.timestamp()),
                )
                write_private(self._certificate_path(line), to_pem(certificate))
                self._write([*index, line])
        return SiteCertificate(
            site_id=request.name,
            identity_key=request.key.hex(),
            certificate=self._certificate_path(line).read_text(),
            authority=(self.root / "ca.pem").read_text(),
            address=self.address,
        )

    def _check(self, request: EnrolmentRequest, digest: str, index: list[IssuedCertificate]) -> None:
        identity = request.key.hex()
        if identity in self.revoked_identities():
            raise RefusedError(
                f"{request.name!r} was revoked: its identity gets no certificate any more",
                remedy="the site makes a new identity, under a new name, and asks to be enrolled",
            )
        node_key = request.machines.node_key.strip() if request.machines else ""
        for line in index:
            own = line.identity_key == identity
            if line.tls_key_sha256 == digest and (line.revoked_at is not None or not own):
                raise RefusedError(
                    f"the TLS key in the request of {request.name!r} was revoked, or is another site's",
                    remedy="the site makes a new key: lacuna site request --renew --out FILE",
                )
            if line.site_id == request.name and not own:
                raise RefusedError(f"{request.name!r} has certificates under another identity")
            if line.node_key == node_key and not own:
                raise RefusedError(f"the SuperNode's key of {request.name!r} is another site's")

    def revoke(self, site_id: str, *, reason: str, now: datetime | None = None) -> int:
        """Revoke every certificate of a site and bar its identity. Returns how many there were.

        Raises:
            UsageError: no certificate was issued to that name.
        """
        at = int((now or datetime.now(UTC)).timestamp())
        with self._locked():
            index = self.index()
            if not any(line.site_id == site_id for line in index):
                raise UsageError(f"no certificate was issued to {site_id!r}")
            changed = [
                replace(line, revoked_at=at, reason=reason)
                if line.site_id == site_id and line.revoked_at is None
                else line
                for line in index
            ]
            self._write(changed)
        self.write_revocation_list(now=now)
        return sum(before != after for before, after in zip(index, changed, strict=True))

    def write_revocation_list(self, *, now: datetime | None = None) -> None:
        """Sign ``crl.pem`` anew; it holds for 60 days, and every perimeter that is written renews it."""
        revoked = [
            (int(line.serial, 16), datetime.fromtimestamp(line.revoked_at, UTC))
            for line in self.index()
            if line.revoked_at is not None
        ]
        found = make_revocation_list(
            self._authority(),
            revoked,
            now=now or datetime.now(UTC),
            valid_for=timedelta(days=REVOCATION_LIST_DAYS),
        )
        write_private(self.root / "crl.pem", to_pem(found))

    # index

    def index(self) -> list[IssuedCertificate]:
        """Every certificate ever issued, oldest first."""
        path = self.root / "certificates.json"
        if not path.exists():
            return []
        value = parse_json(path.read_bytes(), what=str(path))
        try:
            return [IssuedCertificate(**line) for line in value["certificates"]]
        except (KeyError, TypeError) as error:
            raise CoordinatorError(f"{path} is damaged") from error

    def revoked_identities(self) -> frozenset[str]:
        """Hex identity keys of revoked sites."""
        return frozenset(line.identity_key for line in self.index() if line.revoked_at is not None)

    def _write(self, index: list[IssuedCertificate]) -> None:
        data = canonical_json({"certificates": [asdict(line) for line in index]})
        write_private(self.root / "certificates.json", data)

    def _certificate_path(self, line: IssuedCertificate) -> Path:
        folder = private_directory(self.root / "issued")
        return folder / f"{line.serial}.pem"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._authority()
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
