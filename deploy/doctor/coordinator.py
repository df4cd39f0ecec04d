"""The coordinator's doctor: authority, perimeter, SuperLink, studies."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from cryptography import x509

from deploy.doctor import checks
from deploy.doctor.checks import Finding, bad, good, look
from server.coordinator_home import CoordinatorHome
from shared.certificates import read_certificate


@dataclass(frozen=True, kw_only=True)
class CoordinatorParts:
    """Where the parts of the coordinator are. ``perimeter`` is the folder that ``perimeter --out`` wrote."""

    perimeter: Path
    superlink_port: int = 23900


def examine_coordinator(home: CoordinatorHome, parts: CoordinatorParts) -> list[Finding]:
    """Everything that a study needs from the coordinator's machine."""
    authority = home.authority
    return checks.examine(
        [
            ("versions", checks.versions),
            ("key", lambda: good("key", f"{home.key().verify_key.fingerprint[:26]}...")),
            ("clock", checks.synchronised),
            ("disk", lambda: checks.disk(home.root)),
            ("server certificate", partial(_server, authority.root)),
            ("revocation list", partial(_revocation_list, parts.perimeter / "perimeter" / "crl.pem")),
            ("site certificates", partial(_sites, home)),
            ("perimeter's roster", partial(_roster, home, parts.perimeter / "perimeter" / "nginx.conf")),
            ("SuperLink", partial(_superlink, parts)),
            ("SuperLink's port", partial(_loopback_only, parts.superlink_port)),
            ("perimeter", partial(_perimeter, home)),
        ]
    )


def _server(root: Path) -> Finding:
    found = read_certificate((root / "server.pem").read_bytes(), what="server.pem")
    mend = "lacuna coordinator renew-server, then perimeter --out DIR and reload nginx"
    return checks.expiry("server certificate", found.not_valid_after_utc, mend=mend, now=datetime.now(UTC))


def _revocation_list(path: Path) -> Finding:
    found = x509.load_pem_x509_crl(path.read_bytes())
    ends = found.next_update_utc or datetime.now(UTC)
    mend = "lacuna coordinator perimeter --out DIR and reload nginx: an old list keeps every site out"
    return checks.expiry("revocation list", ends, mend=mend, now=datetime.now(UTC), warn_days=15)


def _sites(home: CoordinatorHome) -> Finding:
    now = datetime.now(UTC)
    latest: dict[str, int] = {}
    for line in home.authority.index():
        if line.revoked_at is None:
            latest[line.site_id] = max(latest.get(line.site_id, 0), line.not_after)
    soon = {
        site: datetime.fromtimestamp(at, UTC)
        for site, at in latest.items()
        if datetime.fromtimestamp(at, UTC) - now < timedelta(days=checks.WARN_DAYS)
    }
    if soon:
        words = ", ".join(f"{site} ends {at:%Y-%m-%d}" for site, at in sorted(soon.items()))
        return look("site certificates", words, "they renew: lacuna site request --renew; you certify")
    return good("site certificates", f"{len(latest)} sites, none ends within {checks.WARN_DAYS} days")


def _roster(home: CoordinatorHome, path: Path) -> Finding:
    text, now = path.read_text(), datetime.now(UTC)
    wanted = {line.serial for line in home.authority.index() if line.good(now)}
    known = {line.serial for line in home.authority.index() if f'"{line.serial}:' in text}
    if known == wanted:
        return good("perimeter's roster", f"{len(wanted)} certificates, as in the index")
    mend = "lacuna coordinator perimeter --out DIR and reload nginx"
    revoked = len(known - wanted)
    words = f"{len(wanted - known)} certificates are missing, {revoked} are in it that are not good"
    return bad("perimeter's roster", words, mend)


def _superlink(parts: CoordinatorParts) -> Finding:
    from deploy.superlink_health import superlink_answers

    if superlink_answers(parts.superlink_port, parts.perimeter / "operator" / "superlink-ca.pem"):
        return good("SuperLink", f"answers on 127.0.0.1:{parts.superlink_port}")
    mend = "systemctl status lacuna-superlink, and its journal"
    return bad("SuperLink", f"does not answer on 127.0.0.1:{parts.superlink_port}", mend)


def _loopback_only(port: int) -> Finding:
    """From the kernel's table: who reaches this port may submit runs."""
    open_to = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            local, state = line.split()[1], line.split()[3]
            address, _, number = local.rpartition(":")
            if state == "0A" and int(number, 16) == port and address not in ("0100007F", f"{1 << 24:032X}"):
                open_to.add(address)
    if open_to:
        mend = "start the SuperLink with --host 127.0.0.1: its Control API is open to whoever reaches it"
        return bad("SuperLink's port", f"{port} listens on other addresses than loopback", mend)
    return good("SuperLink's port", f"{port} is on loopback alone")


def _perimeter(home: CoordinatorHome) -> Finding:
    """As a hospital would see it, but for a certificate: the door has to refuse, by name."""
    host, _, number = home.authority.address.rpartition(":")
    context = ssl.create_default_context(cafile=str(home.authority.root / "ca.pem"))
    try:
        checks.clock_offset_s(host, int(number), context, host)
    except ssl.SSLCertVerificationError as error:
        return bad("perimeter", f"{host}:{number}: {error.verify_message}", "nginx shows another certificate")
    except OSError as error:
        mend = "systemctl status lacuna-coordinator-perimeter; name resolution and firewall"
        return bad("perimeter", f"{host}:{number}: {error.strerror or error}", mend)
    return good("perimeter", f"answers at {host}:{number}")
