"""The perimeters, made from the roster: what sits between a SuperNode, the network, and the SuperLink.

At the coordinator, nginx lets enrolled certificates reach Flower's Fleet API and nothing else; the SuperLink
itself listens on loopback. At a site, nginx adds the certificate (a SuperNode has none) and knows one
destination. Everything that the two need is written into one folder, a part of it for each system user, so
that installing is copying and ``chown``. Secrets and loopback certificates that are there already stay.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jinja2
from cryptography import x509

from client.site_network import SiteNetwork
from deploy.consortium_keys import make_server_certificate
from server.coordinator_home import CoordinatorHome
from shared.errors import UsageError
from shared.home import private_directory, write_private
from shared.node_keys import node_key_header

SUPERLINK_PORT = 23900
PORT_USERS = ("lacuna-perimeter", "lacuna-coordinator", "lacuna-superlink", "root")
LOOPBACK_DAYS = 730
OWN_POLLS_A_MINUTE, FEWEST_POLLS_A_MINUTE = 20, 6
"""A SuperNode asks every 3 s; it gives a request up after 30 s."""
RENEW_BEFORE = timedelta(days=60)

ROUTES = (
    ("activate-node", "64k"),
    ("deactivate-node", "64k"),
    ("send-node-heartbeat", "64k"),
    ("pull-messages", "64k"),
    ("push-messages", "2m"),
    ("get-run", "64k"),
    ("get-fab", "64k"),
    ("push-object", "8m"),
    ("pull-object", "64k"),
    ("confirm-message-received", "64k"),
)
"""Flower 1.41's Fleet routes that a SuperNode with a registered key uses, and the largest body of each.
Arrays travel in objects of 5 MiB. ``register-node`` and ``unregister-node`` are the operator's."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds at the perimeters. A SuperNode polls every 3 s and moves objects two at a time.

    ``polls_per_s`` is what all sites together may ask whether there is a message for them: each look costs
    the SuperLink about 20 ms of its one process, message or not (``tests/benchmarks/load.md``). From 25 sites
    on polls wait their turn in nginx.
    """

    polls_per_s: float = 8.0
    requests_per_s: int = 50
    burst: int = 200
    connections: int = 16
    header_s: int = 10
    body_s: int = 10
    message_bytes: str = "64k"
    object_bytes: str = "8m"


def write_coordinator_perimeter(
    home: CoordinatorHome,
    out: Path,
    *,
    listen: str | None = None,
    superlink_port: int = SUPERLINK_PORT,
    users: Sequence[str] = PORT_USERS,
    limits: Limits | None = None,
    now: datetime | None = None,
) -> tuple[str, ...]:
    """Write or renew the coordinator's folder: ``perimeter``, ``superlink``, ``superexec``, ``operator``.

    Args:
        listen: Address and port of nginx; by default every address, at the port that hospitals were told.
        users: Who may open the SuperLink's port, for ``coordinator.nft``.

    Returns:
        The sites that are let in.

    Raises:
        CoordinatorError: no authority is set up.
        UsageError: the folder cannot be written.
    """
    authority, at = home.authority, now or datetime.now(UTC)
    host, _, port = authority.address.rpartition(":")
    authority.write_revocation_list(now=at)
    good = [line for line in authority.index() if line.good(at)]
    sites = tuple(sorted({line.site_id for line in good}))
    limits = limits or Limits()
    entries = [
        {"serial": line.serial, "node_key": node_key_header(line.node_key), "site_id": line.site_id}
        for line in good
    ]
    try:
        parts = _folders(out, ("perimeter", "superlink", "superexec", "operator"))
        _loopback_certificate(parts["superlink"], "superlink", ("localhost", "127.0.0.1"), at)
        _secret(parts["superlink"] / "superexec.secret")
        for name in ("server.pem", "server.key", "ca.pem", "crl.pem"):
            _copy(authority.root / name, parts["perimeter"] / name)
        _copy(parts["superlink"] / "ca.pem", parts["perimeter"] / "superlink-ca.pem")
        for part in ("superexec", "operator"):
            _copy(parts["superlink"] / "ca.pem", parts[part] / "superlink-ca.pem")
        _copy(parts["superlink"] / "superexec.secret", parts["superexec"] / "superexec.secret")
        values = {
            "entries": entries,
            "host": host,
            "listen": listen or port,
            "superlink": f"127.0.0.1:{superlink_port}",
            "limits": limits,
            "polls_a_minute": _polls_a_minute(len(sites), limits),
            "routes": ROUTES,
        }
        _render("coordinator.conf.j2", parts["perimeter"] / "nginx.conf", values)
        _render("fleet.conf.j2", parts["perimeter"] / "fleet.conf", values)
        _render("coordinator.nft.j2", out / "coordinator.nft", {"port": superlink_port, "users": users})
        write_private(parts["superlink"] / "superlink.env", f"LACUNA_PORT={superlink_port}\n".encode())
        write_private(parts["superexec"] / "superexec.env", f"LACUNA_PORT={superlink_port}\n".encode())
        config = (
            f'[superlink]\ndefault = "lacuna"\n\n[superlink.lacuna]\naddress = "127.0.0.1:{superlink_port}"\n'
            f"root-certificates = {json.dumps(str((parts['operator'] / 'superlink-ca.pem').absolute()))}\n"
        )
        write_private(parts["operator"] / "config.toml", config.encode())
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from error
    return sites


def _polls_a_minute(sites: int, limits: Limits) -> int | None:
    """Of each site; None where a SuperNode's own pace, 20 a minute, is slow enough."""
    share = int(60 * limits.polls_per_s / max(sites, 1))
    return None if share >= OWN_POLLS_A_MINUTE else max(share, FEWEST_POLLS_A_MINUTE)


def write_site_perimeter(
    network: SiteNetwork,
    out: Path,
    *,
    listen: str = "127.0.0.1:9443",
    address: str | None = None,
    node_port: int = 9094,
    socket: str = "/run/lacuna/agent.sock",
    agent_uid: int | None = None,
    limits: Limits | None = None,
    now: datetime | None = None,
) -> str:
    """Write or renew the site's folder: ``perimeter``, ``supernode``, ``courier``.

    Args:
        listen: Where the SuperNode finds nginx: host and port, on loopback or an inner network.
        address: ``host:port`` to which nginx connects; by default where the certificate says.
        socket: The agent's socket, for the courier.
        agent_uid: Who may own that socket.

    Returns:
        ``host:port`` of the coordinator.

    Raises:
        SiteError: no certificate is installed.
        UsageError: the folder cannot be written.
    """
    certificate, at = network.certificate(), now or datetime.now(UTC)
    host = certificate.address.rpartition(":")[0]
    try:
        parts = _folders(out, ("perimeter", "supernode", "courier"))
        perimeter, node = parts["perimeter"], parts["supernode"]
        inner = listen.rpartition(":")[0]
        _loopback_certificate(perimeter, "local", tuple(dict.fromkeys((inner, "localhost"))), at)
        _copy(perimeter / "ca.pem", node / "perimeter-ca.pem")
        write_private(perimeter / "tls.pem", certificate.certificate.encode())
        write_private(perimeter / "coordinator-ca.pem", certificate.authority.encode())
        _copy(network.tls_key, perimeter / "tls.key")
        _copy(network.node_key, node / "node.key")
        _secret(node / "superexec.secret")
        _copy(node / "superexec.secret", parts["courier"] / "superexec.secret")
        values = {
            "node_key": node_key_header(network.node_key.with_suffix(".pub").read_text()),
            "listen": listen,
            "address": address or certificate.address,
            "host": host,
            "limits": limits or Limits(),
        }
        _render("site.conf.j2", perimeter / "nginx.conf", values)
        owner = "" if agent_uid is None else f' agent-uids="{agent_uid}"'
        environment = {
            "LACUNA_PERIMETER": listen,
            "LACUNA_NODE_PORT": str(node_port),
            "LACUNA_NODE_CONFIG": f'agent-socket="{socket}"{owner}',
        }
        for part in ("supernode", "courier"):
            _environment_file(parts[part] / f"{part}.env", environment)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from error
    return certificate.address


def _folders(out: Path, names: Sequence[str]) -> dict[str, Path]:
    out.mkdir(parents=True, exist_ok=True, mode=0o755)
    found = {name: out / name for name in names}
    for path in found.values():
        if not path.exists():
            private_directory(path)
    return found


def _loopback_certificate(folder: Path, name: str, hosts: tuple[str, ...], now: datetime) -> None:
    """Made where missing, for other hosts, or about to end; otherwise left, so that nothing need restart."""
    path = folder / f"{name}.pem"
    if path.exists():
        found = x509.load_pem_x509_certificate(path.read_bytes())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        known = {
            str(name)
            for name in (*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.IPAddress))
        }
        if found.not_valid_after_utc - now > RENEW_BEFORE and known == set(hosts):
            return
    (folder / f"{name}.key").unlink(missing_ok=True)
    make_server_certificate(folder, name=name, hosts=hosts, valid_for=timedelta(days=LOOPBACK_DAYS))


def _secret(path: Path) -> None:
    if not path.exists():
        write_private(path, secrets.token_bytes(32))


def _copy(source: Path, target: Path) -> None:
    write_private(target, source.read_bytes())


def _environment_file(path: Path, values: dict[str, str]) -> None:
    """Lines that systemd's EnvironmentFile and docker-compose's env_file read alike: no quoting around."""
    write_private(path, "".join(f"{name}={value}\n" for name, value in values.items()).encode())


def _render(template: str, path: Path, values: dict[str, object]) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "nginx"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - nginx, not HTML; every value is checked where it comes in
    )
    write_private(path, environment.get_template(template).render(values).encode())
