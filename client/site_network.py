"""A site's side of the link to the coordinator: its machines' keys, its certificate, and how long it holds.

The keys are made here and stay here; what leaves are a certificate request and a public key, signed by the
site's identity. A renewal makes a new key beside the old one, which is in use until the new certificate is
installed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from client.site_home import SiteHome
from shared.canonical import canonical_json, parse_json
from shared.certificates import key_bytes, load_key, make_request, new_key
from shared.enrolment import MachineKeys
from shared.enrolment import make_request as make_enrolment_request
from shared.errors import RefusedError, SiteError
from shared.home import private_directory, write_private
from shared.node_keys import make_node_key
from shared.private_keys import save_private_key
from shared.site_certificate import SiteCertificate, open_certificate

FOLDER = ".network"
"""Below the site's root; no study id begins with a dot."""


@dataclass(frozen=True)
class SiteNetwork:
    """Files under ``site/.network``. ``tls.key`` belongs to ``certificate.json``, ``tls.next.key`` waits."""

    home: SiteHome

    @property
    def root(self) -> Path:
        return self.home.root / FOLDER

    @property
    def tls_key(self) -> Path:
        return self.root / "tls.key"

    @property
    def next_tls_key(self) -> Path:
        return self.root / "tls.next.key"

    @property
    def node_key(self) -> Path:
        return self.root / "supernode"

    def request(self, *, renew: bool = False) -> bytes:
        """The site's enrolment request with its machines' public keys, which are made where missing.

        Without a certificate the same request comes out again each time. With ``renew`` it is for a new
        TLS key, which :meth:`install` puts in place of the old one.

        Raises:
            SiteError: no site is set up, or there is a certificate and ``renew`` is not asked for.
        """
        name, identity = self.home.site_id, self.home.identity()
        private_directory(self.root)
        if not self.node_key.exists():
            make_node_key(self.root, self.node_key.name)
        if self.tls_key.exists() and not renew:
            raise SiteError(
                "this site has a certificate", remedy="ask for the next one: lacuna site request --renew"
            )
        if not self.next_tls_key.exists():
            save_private_key(new_key(), self.next_tls_key)
        machines = MachineKeys(
            tls_request=make_request(load_key(self.next_tls_key), name=name).decode(),
            node_key=self.node_key.with_suffix(".pub").read_text().strip(),
        )
        return make_enrolment_request(role="site", name=name, key=identity, machines=machines)

    def install(self, data: bytes) -> SiteCertificate:
        """Take the certificate file that the coordinator sent back.

        Raises:
            RefusedError: signed by another coordinator than the pinned one, for another site or identity,
                or for a key that is not the one that waits.
            SiteError: no coordinator is pinned, or no request was made.
        """
        pinned = self.home.policy().coordinator_fingerprint
        if pinned is None:
            raise SiteError(
                "no coordinator is pinned", remedy="lacuna site pin coordinator SHA256:... (read to you)"
            )
        value = open_certificate(data, coordinator=pinned)
        own = self.home.identity().verify_key.hex()
        if (value.site_id, value.identity_key) != (self.home.site_id, own):
            raise RefusedError(f"the certificate is for {value.site_id!r}, or for another key of that name")
        if not self.next_tls_key.exists():
            raise SiteError("no request waits for a certificate", remedy="lacuna site request --out FILE")
        key = load_key(self.next_tls_key)
        if key_bytes(value.public_key) != key_bytes(key.public_key()):
            raise RefusedError(
                "the certificate is for another TLS key than the one that this site asked for last",
                remedy="send the request again and install what comes back for it",
            )
        write_private(self.root / "certificate.json", canonical_json(asdict(value)))
        self.next_tls_key.replace(self.tls_key)
        return value

    def certificate(self) -> SiteCertificate:
        """What is installed. Raises SiteError if nothing is."""
        path = self.root / "certificate.json"
        if not path.exists():
            raise SiteError(
                "this site has no certificate",
                remedy="lacuna site request --out FILE, then lacuna site install-certificate FILE",
            )
        value = parse_json(path.read_bytes(), what=str(path))
        try:
            return SiteCertificate(**value)
        except TypeError as error:
            raise SiteError(f"{path} is damaged") from error
