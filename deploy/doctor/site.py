"""The site's doctor: from keys and ledger to the coordinator's door."""

from __future__ import annotations

import os
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from client.site_home import SiteHome
from client.site_network import SiteNetwork
from deploy.doctor import checks
from deploy.doctor.checks import Finding, bad, good, look


@dataclass(frozen=True, kw_only=True)
class SiteParts:
    """Where the parts of a site are, as on this machine."""

    socket: Path
    perimeter: str = "127.0.0.1:9443"
    node_port: int = 9094
    device: str = "cpu"


def examine_site(home: SiteHome, parts: SiteParts) -> list[Finding]:
    """Everything that a site needs for a study, in the order in which one would mend it."""
    network = SiteNetwork(home)
    host, _, number = parts.perimeter.rpartition(":")
    return checks.examine(
        [
            ("versions", checks.versions),
            ("identity", partial(_identity, home)),
            ("policy", partial(_policy, home)),
            ("ledger", partial(_ledger, home)),
            ("disk", lambda: checks.disk(home.root)),
            ("device", lambda: checks.gpu(parts.device)),
            ("agent", partial(_agent, parts.socket)),
            ("certificate", partial(_certificate, network)),
            (
                "perimeter",
                lambda: checks.port(
                    "perimeter", host, int(number), mend="systemctl status lacuna-perimeter; its error.log"
                ),
            ),
            (
                "SuperNode",
                lambda: checks.port(
                    "SuperNode",
                    "127.0.0.1",
                    parts.node_port,
                    mend="systemctl status lacuna-supernode; after a crash it is refused for up to 60 s",
                ),
            ),
            ("coordinator", partial(_coordinator, network)),
        ]
    )


def _identity(home: SiteHome) -> Finding:
    key = home.identity().verify_key
    return good("identity", f"{home.site_id}, {key.fingerprint[:26]}...")


def _policy(home: SiteHome) -> Finding:
    policy = home.policy()
    missing = [name for name in ("coordinator", "officer") if name not in policy.pins()]
    needed = policy.min_sites - 1
    if missing or len(policy.peers) < needed:
        words = f"{len(policy.peers)} peers pinned" + "".join(f", no {name}" for name in missing)
        mend = "lacuna site pin NAME SHA256:... or lacuna site import-sheet; a plan with others is refused"
        return look("policy", words, mend)
    return good("policy", f"coordinator, officer and {len(policy.peers)} peers pinned")


def _ledger(home: SiteHome) -> Finding:
    lost = [path for path in (home.ledger_path, home.counter_path) if not path.exists()]
    if lost:
        mend = "restore the newest copy; without it retire this site's identity (deploy/OPERATING.md, ledger)"
        return bad("ledger", f"missing: {', '.join(map(str, lost))}", mend)
    if home.root.parent in home.counter_path.absolute().parents:
        mend = "set LACUNA_COUNTER_DIR outside of LACUNA_HOME: one backup must not take both"
        return look("ledger", "its witness lies in the same folder", mend)
    return good("ledger", f"with its witness in {home.counter_path.parent}")


def _agent(socket: Path) -> Finding:
    from client.agent_link import AgentUnreachableError
    from client.health import agent_is_healthy

    try:
        agent_is_healthy(socket)
    except AgentUnreachableError as error:
        mend = "systemctl status lacuna-agent@STUDY; lacuna site serve says what is missing"
        return bad("agent", error.message, mend)
    return good("agent", f"answers at {socket}")


def _certificate(network: SiteNetwork) -> Finding:
    value = network.certificate()
    mend = "lacuna site request --renew, the coordinator certifies, lacuna site install-certificate"
    return checks.expiry("certificate", value.not_after, mend=mend, now=datetime.now(UTC))


def _coordinator(network: SiteNetwork) -> Finding:
    """Straight to the coordinator's perimeter, past this site's own, with the site's certificate."""
    value = network.certificate()
    host, _, number = value.address.rpartition(":")
    context = ssl.create_default_context(cadata=value.authority)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tls.pem"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(value.certificate)
        context.load_cert_chain(path, network.tls_key)
    try:
        offset_s = checks.clock_offset_s(host, int(number), context, host)
    except ssl.SSLCertVerificationError as error:
        mend = "somebody else answers at that address, or the coordinator has another authority: call them"
        return bad("coordinator", f"{value.address}: {error.verify_message}", mend)
    except OSError as error:
        mend = "name resolution and the hospital's firewall: this one destination has to be open"
        return bad("coordinator", f"{value.address}: {error.strerror or error}", mend)
    return checks.clock(offset_s)
