"""Doctors: a healthy site and coordinator are called so; each thing that breaks is named with its mending."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from perimeter_pair import PerimeterPair, Site, find_program

from client.agent_service import AgentServer
from client.health import agent_is_healthy
from client.site_policy import save_policy
from deploy.doctor import checks
from deploy.doctor.checks import report
from deploy.doctor.coordinator import CoordinatorParts, examine_coordinator
from deploy.doctor.site import SiteParts, examine_site
from deploy.perimeter import write_coordinator_perimeter
from shared.errors import SiteError
from shared.identity import SigningKey
from shared.wire import Envelope


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PerimeterPair]:
    find_program("nginx", "nginx")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pair = PerimeterPair(tmp_path_factory.mktemp("doctor"), monkeypatch)
        try:
            site = pair.enrol("north")
            pair.write()
            pair.nginx.reload()
            pair.start_site(site)
            pair.north = site  # type: ignore[attr-defined]
            yield pair
        finally:
            pair.stop()


@pytest.fixture
def site(pair: PerimeterPair, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(pair.root / "counters" / "north"))
    return pair.north  # type: ignore[attr-defined, no-any-return]


def echo(envelope: Envelope, _: object) -> Envelope:
    return envelope


def found(findings: list[checks.Finding]) -> dict[str, checks.Finding]:
    assert all(finding.mend or finding.state == "good" for finding in findings)
    return {finding.name: finding for finding in findings}


def test_a_healthy_site(pair: PerimeterPair, site: Site, tmp_path: Path) -> None:
    home = site.network.home
    policy = home.policy()
    for name in ("officer", "south", "west"):
        policy = policy.pinned(name, SigningKey.generate().verify_key.fingerprint)
    save_policy(policy, home.policy_path)
    server = AgentServer(echo)
    server.listen_unix(tmp_path / "agent.sock")
    parts = SiteParts(
        socket=tmp_path / "agent.sock", perimeter=f"127.0.0.1:{site.port}", node_port=pair.superlink.port
    )
    with server:
        findings = examine_site(home, parts)
    states = {finding.name: (finding.state, finding.found) for finding in findings}
    assert {name: state for name, (state, _) in states.items() if state != "good"} in ({}, {"disk": "bad"})
    assert report(findings)["fit"] == (states["disk"][0] == "good")
    json.dumps(report(findings))


def test_what_is_broken_at_a_site_is_named(
    pair: PerimeterPair, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = SiteParts(socket=tmp_path / "none.sock", perimeter="127.0.0.1:1", node_port=1, device="cuda")
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path))
    monkeypatch.setattr(checks, "version", "{}.0".format)
    seen = found(examine_site(site.network.home, parts))
    for name in ("versions", "ledger", "agent", "perimeter", "SuperNode"):
        assert seen[name].state == "bad", name
    assert "restore the newest copy" in seen["ledger"].mend
    assert "heartbeat" in seen["SuperNode"].mend or "60 s" in seen["SuperNode"].mend
    certificate = site.network.root / "certificate.json"
    kept = certificate.read_bytes()
    try:
        certificate.unlink()
        seen = found(examine_site(site.network.home, parts))
        assert seen["certificate"].state == seen["coordinator"].state == "bad"
        assert "install-certificate" in seen["certificate"].mend
    finally:
        certificate.write_bytes(kept)


@pytest.mark.parametrize(
    ("offset_s", "state"), [(0.0, "good"), (-20.0, "look"), (6.0, "bad"), (-400.0, "bad"), (3.0, "look")]
)
def test_a_clock_that_flower_refuses_is_bad(offset_s: float, state: str) -> None:
    assert checks.clock(offset_s).state == state


@pytest.mark.parametrize(
    ("error_s", "state", "words"),
    [
        (0.02, "good", "at most 0.0 s off"),
        (9.0, "look", "at most 9.0 s off"),
        (None, "look", "nobody keeps it"),
    ],
)
def test_a_coordinators_clock_that_nobody_keeps_is_named(
    error_s: float | None, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "clock_error_s", lambda: error_s)
    finding = checks.synchronised()
    assert (finding.state, words in finding.found) == (state, True)
    assert ("chrony" in finding.mend) == (state != "good")


def test_the_kernel_is_asked_about_the_clock() -> None:
    """An error in seconds, or None: which of them is this machine's business."""
    error_s = checks.clock_error_s()
    assert error_s is None or 0 <= error_s < 16


@pytest.mark.parametrize(("days", "state"), [(200, "good"), (10, "look"), (-1, "bad")])
def test_certificates_are_warned_of_before_they_end(days: int, state: str) -> None:
    now = datetime.now(UTC)
    finding = checks.expiry("certificate", now + timedelta(days=days), mend="renew", now=now)
    assert finding.state == state
    assert (finding.mend == "renew") == (state != "good")


def test_a_coordinators_doctor_sees_a_perimeter_that_is_out_of_date(
    pair: PerimeterPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = CoordinatorParts(perimeter=pair.folder, superlink_port=pair.superlink.port)
    seen = found(examine_coordinator(pair.home, parts))
    bad = {name: finding.found for name, finding in seen.items() if finding.state == "bad"}
    assert set(bad) <= {"disk"}
    assert "clock" in seen
    assert seen["perimeter"].state == seen["SuperLink"].state == "good"
    monkeypatch.setattr(checks, "WARN_DAYS", 500)
    pair.enrol("late")
    seen = found(examine_coordinator(pair.home, parts))
    assert seen["perimeter's roster"].state == "bad"
    assert "1 certificates are missing" in seen["perimeter's roster"].found
    assert seen["site certificates"].state == "look"
    broken = CoordinatorParts(perimeter=tmp_path, superlink_port=1)
    seen = found(examine_coordinator(pair.home, broken))
    assert seen["SuperLink"].state == seen["revocation list"].state == "bad"
    write_coordinator_perimeter(
        pair.home, pair.folder, listen=f"127.0.0.1:{pair.port}", superlink_port=pair.superlink.port,
        now=datetime.now(UTC) - timedelta(days=50),
    )  # fmt: skip
    assert found(examine_coordinator(pair.home, parts))["revocation list"].state == "look"


def test_an_agent_says_that_it_lives_also_while_it_works(tmp_path: Path) -> None:
    busy, release = threading.Event(), threading.Event()

    def work(envelope: Envelope, peer: Any) -> Envelope:
        busy.set()
        release.wait(30)
        return envelope

    from client.agent_link import UnixAddress, exchange

    server = AgentServer(work)
    server.listen_unix(tmp_path / "agent.sock")
    address = UnixAddress(path=tmp_path / "agent.sock")
    with server:
        sender = threading.Thread(
            target=exchange, args=(Envelope("work", {}), address), kwargs={"timeout_s": 60}
        )
        sender.start()
        assert busy.wait(30)
        agent_is_healthy(tmp_path / "agent.sock")
        release.set()
        sender.join()
    with pytest.raises(SiteError, match="does not answer"):
        agent_is_healthy(tmp_path / "agent.sock")
