"""The perimeters as Debian's nginx runs them: who gets through, to what, how fast and how much."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from loopback_ports import free_port
from perimeter_pair import PerimeterPair, Site, ask, certificate_context, find_program

from deploy.perimeter import ROUTES, Limits
from shared.certificates import (
    Authority,
    issue_server_certificate,
    issue_site_certificate,
    load_key,
    make_authority,
    new_key,
    read_certificate,
    to_pem,
)
from shared.enrolment import open_request
from shared.private_keys import save_private_key

PULL = "/v1/fleet/pull-messages"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PerimeterPair]:
    find_program("nginx", "nginx")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pair = PerimeterPair(
            tmp_path_factory.mktemp("perimeter"),
            monkeypatch,
            limits=Limits(body_s=1, header_s=1, requests_per_s=10, burst=60),
        )
        try:
            pair.north, pair.south = pair.enrol("north"), pair.enrol("south")  # type: ignore[attr-defined]
            assert pair.write() == ("north", "south")
            pair.nginx.reload()
            yield pair
        finally:
            pair.stop()


@pytest.fixture
def north(pair: PerimeterPair) -> Site:
    return pair.north  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def south(pair: PerimeterPair) -> Site:
    return pair.south  # type: ignore[attr-defined, no-any-return]


def context_of(site: Site) -> ssl.SSLContext:
    folder = site.folder / "perimeter"
    return certificate_context(folder / "coordinator-ca.pem", folder / "tls.pem", folder / "tls.key")


def open_link(pair: PerimeterPair, context: ssl.SSLContext) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", pair.port), timeout=60)
    return context.wrap_socket(raw, server_hostname="127.0.0.1")


def made(pair: PerimeterPair, folder: Path, name: str, *, days: int, server: bool = False) -> ssl.SSLContext:
    """A certificate that the coordinator's authority signed and the index does not hold."""
    root = pair.home.authority.root
    pem = (root / "ca.pem").read_bytes()
    authority = Authority(certificate=read_certificate(pem, what="ca"), key=load_key(root / "ca.key"))
    return signed_context(pair, authority, folder, name, days=days, server=server)


def signed_context(
    pair: PerimeterPair, authority: Authority, folder: Path, name: str, *, days: int, server: bool = False
) -> ssl.SSLContext:
    key, now = new_key(), datetime.now(UTC) - timedelta(days=10)
    valid_for = timedelta(days=10 + days)
    if server:
        found = issue_server_certificate(
            authority, key.public_key(), hosts=(name,), now=now, valid_for=valid_for
        )
    else:
        found = issue_site_certificate(authority, key.public_key(), name=name, now=now, valid_for=valid_for)
    (folder / "c.pem").write_bytes(to_pem(found))
    save_private_key(key, folder / "c.key")
    return certificate_context(pair.home.authority.root / "ca.pem", folder / "c.pem", folder / "c.key")


def test_an_enrolled_site_reaches_every_fleet_route_through_both_perimeters(
    pair: PerimeterPair, north: Site
) -> None:
    nginx = pair.start_site(north)
    inner = certificate_context(north.folder / "supernode" / "perimeter-ca.pem")
    for route, _ in ROUTES:
        path = f"/v1/fleet/{route}"
        assert ask(north.port, inner, path, body=b"x" * 1000, headers=north.headers) == (
            200,
            {"path": path, "bytes": 1000},
        )
    big = b"x" * (6 * 2**20)
    status, answer = ask(north.port, inner, "/v1/fleet/push-object", body=big, headers=north.headers)
    assert (status, answer["bytes"]) == (200, len(big))
    assert ask(north.port, inner, PULL)[1] == {"refused": "not_own_node"}
    assert ask(north.port, inner, "/v1/control/start-run", headers=north.headers)[1] == {
        "refused": "not_served"
    }
    assert {line["site"] for line in pair.nginx.requests()[-11:]} == {"north"}
    assert all(north.headers["flwr-public-key"] not in str(line) for line in nginx.requests())


def no_certificate(pair: PerimeterPair, north: Site, south: Site, folder: Path) -> ssl.SSLContext:
    return certificate_context(pair.home.authority.root / "ca.pem")


def strangers(pair: PerimeterPair, north: Site, south: Site, folder: Path) -> ssl.SSLContext:
    other = make_authority("Lacuna coordinator", now=datetime.now(UTC), valid_for=timedelta(days=9))
    return signed_context(pair, other, folder, "north", days=9)


def self_signed(pair: PerimeterPair, north: Site, south: Site, folder: Path) -> ssl.SSLContext:
    other = make_authority("north", now=datetime.now(UTC), valid_for=timedelta(days=9))
    (folder / "c.pem").write_bytes(to_pem(other.certificate))
    save_private_key(other.key, folder / "c.key")
    return certificate_context(pair.home.authority.root / "ca.pem", folder / "c.pem", folder / "c.key")


def expired(pair: PerimeterPair, north: Site, south: Site, folder: Path) -> ssl.SSLContext:
    return made(pair, folder, "north", days=-1)


def not_in_the_index(pair: PerimeterPair, north: Site, south: Site, folder: Path) -> ssl.SSLContext:
    return made(pair, folder, "north", days=9)


def a_servers(pair: PerimeterPair, north: Site, south: Site, folder: Path) -> ssl.SSLContext:
    return made(pair, folder, "127.0.0.1", days=9, server=True)


def another_sites(pair: PerimeterPair, north: Site, south: Site, folder: Path) -> ssl.SSLContext:
    return context_of(south)


@pytest.mark.parametrize(
    ("certificate", "refused"),
    [
        (no_certificate, "certificate_missing"),
        (strangers, "certificate_invalid"),
        (self_signed, "certificate_invalid"),
        (expired, "certificate_invalid"),
        (not_in_the_index, "not_enrolled"),
        (a_servers, "certificate_invalid"),
        (another_sites, "not_enrolled"),
    ],
    ids=["none", "strangers", "self-signed", "expired", "not in the index", "a server's", "another site's"],
)
def test_other_certificates_are_refused_by_name(
    pair: PerimeterPair,
    north: Site,
    south: Site,
    tmp_path: Path,
    certificate: Callable[..., ssl.SSLContext],
    refused: str,
) -> None:
    """Each shows the SuperNode's key of north, which is public."""
    before = len(pair.superlink.seen)
    context = certificate(pair, north, south, tmp_path)
    status, answer = ask(pair.port, context, PULL, headers=north.headers)
    assert (status, answer) == (403, {"refused": refused})
    assert len(pair.superlink.seen) == before


@pytest.mark.parametrize(
    "path",
    [
        "/", "/health", "/docs", "/openapi.json", "/v1/control/start-run", "/v1/control/register-node",
        "/v1/runtime/pull-app-inputs", "/v1/fleet/", "/v1/fleet/register-node", "/v1/fleet/unregister-node",
        "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/V1/fleet/pull-messages",
        "//v1/control/start-run", "/v1/fleet/pull-messages/../../control/start-run",
    ],
)  # fmt: skip
def test_nothing_but_the_fleet_routes_is_served(pair: PerimeterPair, north: Site, path: str) -> None:
    before = len(pair.superlink.seen)
    status, answer = ask(pair.port, context_of(north), path, headers=north.headers)
    assert (status, answer) == (404, {"refused": "not_served"})
    assert len(pair.superlink.seen) == before


def test_only_posts_of_bounded_size(pair: PerimeterPair, north: Site) -> None:
    before = len(pair.superlink.seen)
    context = context_of(north)
    for path, size in (
        (PULL, 70_000),
        ("/v1/fleet/push-messages", 3 * 2**20),
        ("/v1/fleet/push-object", 9 * 2**20),
    ):
        try:
            status, answer = ask(pair.port, context, path, body=b"x" * size, headers=north.headers)
            assert (status, answer) == (413, {"refused": "too_large"})
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            pass  # nginx closes without reading what it will not take
    large = north.headers | {"x-large": "x" * 9000}
    assert ask(pair.port, context, PULL, headers=large)[1]["refused"] in ("too_large", "malformed")
    for method in ("GET", "PUT", "DELETE"):
        assert ask(pair.port, context, PULL, method=method, headers=north.headers)[0] == 405
    assert len(pair.superlink.seen) == before


@pytest.mark.parametrize(
    "begun",
    [
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nflwr-public-key: KEY\r\n"
        b"Content-Length: 99\r\n\r\nx",
    ],
    ids=["header", "body"],
)
def test_slow_requests_are_given_up_before_they_reach_the_superlink(
    pair: PerimeterPair, north: Site, begun: bytes
) -> None:
    before = len(pair.superlink.seen)
    with open_link(pair, context_of(north)) as link:
        link.sendall(begun.replace(b"KEY", north.headers["flwr-public-key"].encode()))
        started = time.monotonic()
        answer = b""
        try:
            while data := link.recv(4096):
                answer += data
        except ConnectionResetError:
            pass
    assert time.monotonic() - started < 15, "the limit is 1 s here"
    assert b" 200 " not in answer
    assert len(pair.superlink.seen) == before


def test_plain_http_and_old_tls_are_refused(pair: PerimeterPair, north: Site) -> None:
    with socket.create_connection(("127.0.0.1", pair.port), timeout=20) as raw:
        raw.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert b"not_tls" in raw.recv(4096)
    context = context_of(north)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol|handshake"):
        ask(pair.port, context, PULL, headers=north.headers)


def test_a_flood_is_slowed_and_other_sites_are_served_meanwhile(
    pair: PerimeterPair, north: Site, south: Site
) -> None:
    """The bound here is 60 at once and 10 a second for one certificate; south is another one."""
    flood, statuses = context_of(north), []
    with open_link(pair, flood) as link:
        request = (
            f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nflwr-public-key: "
            f"{north.headers['flwr-public-key']}\r\n\r\n"
        ).encode()
        sent = 0
        while b"429" not in b"".join(statuses) and sent < 20_000:
            link.sendall(request * 100)
            sent += 100
            statuses.append(link.recv(1 << 20))
        assert b'{"refused":"too_many"}' in b"".join(statuses)
        assert ask(pair.port, context_of(south), PULL, headers=south.headers)[0] == 200


def test_many_sites_polls_wait_their_turn_and_nothing_else_does(
    pair: PerimeterPair, north: Site, south: Site
) -> None:
    """As from 25 sites on: here a share of polls is given that makes each site's turn come every 5 s."""
    few = Limits(polls_per_s=0.4)
    assert "zone=polls" not in (pair.folder / "perimeter" / "nginx.conf").read_text()
    pair.write(limits=few)
    pair.nginx.reload()
    try:
        for site in (north, south):
            ask(pair.port, context_of(site), PULL, headers=site.headers)
        began = time.monotonic()
        assert ask(pair.port, context_of(north), "/v1/fleet/push-object", headers=north.headers)[0] == 200
        others_s = time.monotonic() - began
        assert ask(pair.port, context_of(north), PULL, headers=north.headers)[0] == 200
        assert time.monotonic() - began > 3 > others_s
    finally:
        pair.write()
        pair.nginx.reload()


def test_a_revoked_site_is_out_after_a_reload_on_open_links_too(pair: PerimeterPair, tmp_path: Path) -> None:
    west = pair.enrol("west")
    pair.write()
    pair.nginx.reload()
    context = context_of(west)
    with open_link(pair, context) as link:
        request = (
            f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nflwr-public-key: "
            f"{west.headers['flwr-public-key']}\r\n\r\n"
        ).encode()
        link.sendall(request)
        assert b" 200 " in link.recv(4096)
        pair.home.authority.revoke("west", reason="test")
        assert "west" not in pair.write()
        pair.nginx.reload()
        try:
            link.sendall(request)
            assert link.recv(4096) == b""
        except OSError:
            pass
    assert ask(pair.port, context, PULL, headers=west.headers) == (403, {"refused": "certificate_invalid"})


def test_a_renewed_certificate_is_let_in_beside_the_old_one(pair: PerimeterPair, south: Site) -> None:
    from deploy.perimeter import write_site_perimeter
    from shared.site_certificate import sign_certificate

    old = context_of(south)
    request = south.network.request(renew=True)
    assert open_request(request).name == "south"
    south.network.install(sign_certificate(pair.home.certify(request), pair.home.key()))
    secret = (south.folder / "supernode" / "superexec.secret").read_bytes()
    local = (south.folder / "perimeter" / "local.pem").read_bytes()
    write_site_perimeter(south.network, south.folder, listen=f"127.0.0.1:{south.port}")
    assert (south.folder / "supernode" / "superexec.secret").read_bytes() == secret
    assert (south.folder / "perimeter" / "local.pem").read_bytes() == local, "nothing need restart"
    assert ask(pair.port, context_of(south), PULL, headers=south.headers)[1] == {"refused": "not_enrolled"}
    pair.write()
    pair.nginx.reload()
    for context in (old, context_of(south)):
        assert ask(pair.port, context, PULL, headers=south.headers)[0] == 200


def test_a_sites_perimeter_talks_to_its_coordinator_alone(
    pair: PerimeterPair, north: Site, tmp_path: Path
) -> None:
    """Somebody who took over the coordinator's address, without its key, gets nothing."""
    from perimeter_pair import EchoSuperLink, Nginx

    from deploy.consortium_keys import make_server_certificate
    from deploy.perimeter import write_site_perimeter

    make_server_certificate(tmp_path)
    impostor = EchoSuperLink(tmp_path)
    impostor.start()
    try:
        folder, port = tmp_path / "site", free_port()
        write_site_perimeter(
            north.network,
            folder,
            listen=f"127.0.0.1:{port}",
            address=f"127.0.0.1:{impostor.port}",
        )
        nginx = Nginx(folder / "perimeter" / "nginx.conf", tmp_path / "prefix")
        nginx.start(port)
        try:
            inner = certificate_context(folder / "supernode" / "perimeter-ca.pem")
            answer = ask(port, inner, PULL, headers=north.headers)
            assert answer == (502, {"refused": "coordinator_unreachable"})
            assert impostor.seen == []
        finally:
            nginx.stop()
    finally:
        impostor.stop()


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (200, 200),
        (429, 503),
        (500, 503),
        (502, 502),
        (503, 503),
        (504, 504),
        (401, 401),
        (403, 403),
    ],
)
def test_a_supernode_is_told_to_try_again_where_flower_would_give_up(
    pair: PerimeterPair, tmp_path: Path, north: Site, status: int, told: int
) -> None:
    """A SuperNode outlives 502, 503 and 504 alone; what it must act on (401, 403) comes through as it is."""
    from perimeter_pair import Nginx

    from deploy.perimeter import write_site_perimeter

    port = free_port()
    write_site_perimeter(north.network, tmp_path / "site", listen=f"127.0.0.1:{port}")
    nginx = Nginx(tmp_path / "site" / "perimeter" / "nginx.conf", tmp_path / "prefix")
    nginx.start(port)
    pair.superlink.status = status
    try:
        inner = certificate_context(tmp_path / "site" / "supernode" / "perimeter-ca.pem")
        answer, body = ask(port, inner, PULL, body=b"x", headers=north.headers)
    finally:
        pair.superlink.status = 200
        nginx.stop()
    assert answer == told
    refused = {429: "try_again", 500: "try_again", 502: "coordinator_unreachable"}
    refused[504] = refused[502]
    assert body.get("refused") == refused.get(status)
    assert status in refused or body["path"] == PULL


def test_logs_are_rotated_and_nginx_writes_on_in_the_new_file(
    pair: PerimeterPair, north: Site, tmp_path: Path
) -> None:
    """The rules as they are installed, with this test's folder and user in the place of the perimeter's."""
    logrotate = find_program("logrotate", "logrotate")
    source = Path(__file__).parents[2] / "deploy" / "nginx" / "lacuna-perimeter.logrotate"
    user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
    rules = source.read_text().replace("/var/lib/lacuna-perimeter/", f"{pair.nginx.prefix}/")
    rules = rules.replace("lacuna-perimeter lacuna-perimeter", f"{user} {group}")
    (tmp_path / "rules").write_text(rules)
    (tmp_path / "rules").chmod(0o644)
    log = pair.nginx.prefix / "access.jsonl"
    ask(pair.port, context_of(north), PULL, headers=north.headers)
    before = len(pair.nginx.requests())
    subprocess.run(
        [logrotate, "--force", "--state", str(tmp_path / "state"), str(tmp_path / "rules")],
        check=True, capture_output=True,
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not log.exists() or not log.stat().st_size:
        assert time.monotonic() < deadline, "nginx did not open its log anew"
        ask(pair.port, context_of(north), PULL, headers=north.headers)
        time.sleep(0.1)
    rotated = (pair.nginx.prefix / "access.jsonl.1").read_text().splitlines()
    assert len(rotated) >= before
    assert pair.nginx.requests()[-1]["site"] == "north"


def test_the_port_rules_parse(pair: PerimeterPair) -> None:
    """As nft reads them; which users they let pass is tested in a namespace of its own, as root."""
    nft = find_program("nft", "nftables")
    rules = (pair.folder / "coordinator.nft").read_text()
    for user, stand_in in (("perimeter", "www-data"), ("coordinator", "nobody"), ("superlink", "daemon")):
        rules = rules.replace(f"lacuna-{user}", stand_in)
    done = subprocess.run([nft, "-c", "-f", "-"], input=rules, capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("nft needs root, also to check")
    assert done.returncode == 0, done.stderr
