"""Enrolment over a network: keys made at the site, a certificate for them and nobody else's, revocation."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.site_home import SiteHome, init_site
from client.site_network import SiteNetwork
from client.site_policy import save_policy
from server.authority import CertificateAuthority
from server.coordinator_home import CoordinatorHome
from shared.certificates import make_request, new_key
from shared.enrolment import MachineKeys, open_request
from shared.enrolment import make_request as make_enrolment_request
from shared.errors import (
    CoordinatorError,
    LacunaError,
    MalformedMessageError,
    RefusedError,
    SiteError,
    UsageError,
)
from shared.identity import SigningKey
from shared.node_keys import make_node_key
from shared.site_certificate import sign_certificate


@dataclass
class Hospital:
    network: SiteNetwork
    request: bytes

    @property
    def fingerprint(self) -> str:
        return self.network.home.identity().verify_key.fingerprint


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorHome:
    home = CoordinatorHome(tmp_path / "coordinator")
    home.init("study")
    home.authority.create(address="lacuna.example.org:443")
    return home


@pytest.fixture
def hospital(tmp_path: Path, coordinator: CoordinatorHome, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    return make_hospital(tmp_path, coordinator, monkeypatch, "north")


def make_hospital(
    tmp_path: Path, coordinator: CoordinatorHome, monkeypatch: pytest.MonkeyPatch, name: str
) -> Hospital:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters" / name))
    home = SiteHome(tmp_path / name / "site")
    init_site(home, name=name)
    pinned = home.policy().pinned("coordinator", coordinator.key().verify_key.fingerprint)
    save_policy(pinned, home.policy_path)
    network = SiteNetwork(home)
    return Hospital(network, network.request())


def enrol(coordinator: CoordinatorHome, hospital: Hospital, study: str = "study") -> bytes:
    coordinator.enrol(study, hospital.request, fingerprint=hospital.fingerprint)
    return sign_certificate(coordinator.certify(hospital.request), coordinator.key())


def openssl_verify(coordinator: CoordinatorHome, certificate: str, *more: str) -> str:
    """What OpenSSL, which nginx uses, says of a certificate under our authority and revocation list."""
    root = coordinator.authority.root
    path = root / "asked.pem"
    path.write_text(certificate)
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-crl_check", "-CAfile", root / "ca.pem", "-CRLfile",
         root / "crl.pem", *more, path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_keys_are_made_at_the_site_and_none_of_them_leaves(
    coordinator: CoordinatorHome, hospital: Hospital
) -> None:
    root = hospital.network.root
    reply = enrol(coordinator, hospital)
    private = [path.read_text().split("\n")[2] for path in (root / "tls.next.key", root / "supernode")]
    assert all(len(line) > 40 for line in private)
    for data in (hospital.request, reply):
        text = json.dumps(json.loads(data)) + str(open_request(hospital.request))
        assert not any(line in text for line in private)
    installed = hospital.network.install(reply)
    assert installed.address == "lacuna.example.org:443"
    assert {path.name: path.stat().st_mode & 0o777 for path in root.iterdir() if path.suffix != ".pub"} == {
        "certificate.json": 0o600, "tls.key": 0o600, "supernode": 0o600,
    }  # fmt: skip
    assert "asked.pem: OK" in openssl_verify(coordinator, installed.certificate, "-purpose", "sslclient")
    assert "unsuitable" in openssl_verify(coordinator, installed.certificate, "-purpose", "sslserver")
    server = (coordinator.authority.root / "server.pem").read_text()
    assert "OK" in openssl_verify(
        coordinator, server, "-purpose", "sslserver", "-verify_hostname", "lacuna.example.org"
    )
    assert "mismatch" in openssl_verify(coordinator, server, "-verify_hostname", "other.example.org")


def test_a_revoked_site_is_revoked_for_good(coordinator: CoordinatorHome, hospital: Hospital) -> None:
    installed = hospital.network.install(enrol(coordinator, hospital))
    authority = coordinator.authority
    assert authority.revoke("north", reason="lost laptop") == 1
    assert authority.revoke("north", reason="again") == 0
    assert "certificate revoked" in openssl_verify(coordinator, installed.certificate)
    assert authority.revoked_identities() == {installed.identity_key}
    for request in (hospital.request, hospital.network.request(renew=True)):
        with pytest.raises(RefusedError, match="was revoked"):
            coordinator.certify(request)
    with pytest.raises(UsageError, match="no certificate was issued"):
        authority.revoke("south", reason="")


def test_renewal_is_for_a_new_key_and_needs_no_new_comparison(
    coordinator: CoordinatorHome, hospital: Hospital
) -> None:
    first = hospital.network.install(enrol(coordinator, hospital))
    with pytest.raises(SiteError, match="has a certificate"):
        hospital.network.request()
    old_key = hospital.network.tls_key.read_bytes()
    renewal = hospital.network.request(renew=True)
    waiting = hospital.network.next_tls_key.read_bytes()
    hospital.network.request(renew=True)
    assert hospital.network.next_tls_key.read_bytes() == waiting, "asking twice does not lose the key"
    assert hospital.network.tls_key.read_bytes() == old_key, "in use until the new certificate is here"
    second = hospital.network.install(sign_certificate(coordinator.certify(renewal), coordinator.key()))
    assert hospital.network.tls_key.read_bytes() != old_key
    assert second.certificate != first.certificate
    assert [line.good(datetime.now(UTC)) for line in coordinator.authority.index()] == [True, True]
    assert "OK" in openssl_verify(coordinator, first.certificate)


def test_the_same_request_gets_the_same_certificate(coordinator: CoordinatorHome, hospital: Hospital) -> None:
    enrol(coordinator, hospital)
    first = coordinator.certify(hospital.request)
    coordinator.init("second")
    assert enrol(coordinator, hospital, "second")
    assert coordinator.certify(hospital.request) == first
    assert len(coordinator.authority.index()) == 1


def test_the_last_day_is_the_certificates(coordinator: CoordinatorHome, hospital: Hospital) -> None:
    coordinator.enrol("study", hospital.request, fingerprint=hospital.fingerprint)
    then = datetime.now(UTC) - timedelta(days=40)
    request = open_request(hospital.request)
    old = coordinator.authority.issue(request, days=30, now=then)
    assert "expired" in openssl_verify(coordinator, old.certificate)
    assert not coordinator.authority.index()[0].good(datetime.now(UTC))
    assert coordinator.authority.issue(request).certificate != old.certificate


def test_who_is_not_enrolled_gets_no_certificate(
    coordinator: CoordinatorHome, hospital: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RefusedError, match="enrolled here"):
        coordinator.certify(hospital.request)
    with pytest.raises(RefusedError, match="carries the key"):
        coordinator.enrol("study", hospital.request, fingerprint="SHA256:" + "-".join(["0000"] * 16))
    assert coordinator.authority.index() == []


def forged(name: str, key: SigningKey, **machines: str) -> bytes:
    return make_enrolment_request(role="site", name=name, key=key, machines=MachineKeys(**machines))


def test_machine_keys_of_others_are_refused(
    coordinator: CoordinatorHome, hospital: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol(coordinator, hospital)
    machines = open_request(hospital.request).machines
    assert machines is not None
    thief = SigningKey.generate()
    own_node = make_node_key(tmp_path, "thief").public.read_text()
    own_tls = make_request(new_key(), name="thief").decode()
    for request, message in (
        (forged("thief", thief, tls_request=own_tls, node_key=machines.node_key), "SuperNode's key"),
        (forged("thief", thief, tls_request=machines.tls_request, node_key=own_node), "is not for 'thief'"),
        (forged("north", thief, tls_request=make_request(new_key(), name="north").decode(),
                node_key=own_node), "another"),
    ):  # fmt: skip
        with pytest.raises(LacunaError, match=message):
            name = open_request(request).name
            coordinator.enrol("study", request, fingerprint=thief.verify_key.fingerprint)
            coordinator.authority.issue(open_request(request))
            pytest.fail(name)


@pytest.mark.parametrize(
    "machines",
    [
        {"tls_request": "x", "node_key": "x"},
        {"tls_request": make_request(new_key(), name="other").decode(), "node_key": "x"},
        {"tls_request": make_request(new_key(), name="north").decode(), "node_key": "ssh-ed25519 AAAA"},
        {"tls_request": make_request(new_key(), name="north").decode() * 40, "node_key": "x"},
    ],
)
def test_machine_keys_that_do_not_parse_are_refused(machines: dict[str, str]) -> None:
    request = forged("north", SigningKey.generate(), **machines)
    with pytest.raises(MalformedMessageError):
        open_request(request)


def test_a_site_installs_only_its_own_certificate_from_its_own_coordinator(
    coordinator: CoordinatorHome, hospital: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = enrol(coordinator, hospital)
    south = make_hospital(tmp_path, coordinator, monkeypatch, "south")
    with pytest.raises(RefusedError, match="for 'north'"):
        south.network.install(reply)
    stranger = CoordinatorHome(tmp_path / "stranger")
    stranger.init("study")
    stranger.authority.create(address="127.0.0.1:8443")
    foreign = sign_certificate(stranger.authority.issue(open_request(hospital.request)), stranger.key())
    with pytest.raises(RefusedError, match="pinned coordinator"):
        hospital.network.install(foreign)
    envelope = json.loads(reply)
    envelope["payload"] = envelope["payload"][:-8] + "AAAAAAA="
    with pytest.raises(LacunaError):
        hospital.network.install(json.dumps(envelope).encode())
    with pytest.raises(SiteError, match="has no certificate"):
        hospital.network.certificate()
    hospital.network.install(reply)
    with pytest.raises(SiteError, match="no request waits"):
        hospital.network.install(reply)


def test_the_authority_is_made_once_and_asked_for_by_name(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path / "coordinator")
    with pytest.raises(CoordinatorError, match="no network"):
        _ = authority.address
    for address in ("host", "host:0", "host:99999", "a b:1", ":443", "-x:1"):
        with pytest.raises(UsageError, match="HOST:PORT"):
            authority.create(address=address)
    authority.create(address="10.0.0.1:8443")
    assert authority.root.stat().st_mode & 0o777 == 0o700
    assert (authority.root / "ca.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(CoordinatorError, match="already"):
        authority.create(address="10.0.0.1:8443")
    assert CoordinatorHome(tmp_path / "coordinator").studies() == []
