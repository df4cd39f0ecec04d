"""Enrolment at the coordinator: fingerprints read out of band, one key a name, one name a key."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from small_plan import Keys, small_plan

from server.coordinator_home import CoordinatorHome
from server.gating import decide, release
from server.study_store import StudyStore
from shared.enrolment import make_request
from shared.errors import CoordinatorError, MalformedMessageError, RefusedError, UsageError
from shared.home import write_private
from shared.identity import SigningKey
from shared.plan_package import write_plan_package


@pytest.fixture
def home(tmp_path: Path) -> CoordinatorHome:
    home = CoordinatorHome(tmp_path / "coordinator")
    home.init("study")
    return home


def enrol(home: CoordinatorHome, name: str, key: SigningKey, role: str = "site") -> None:
    request = make_request(role=role, name=name, key=key)  # type: ignore[arg-type]
    home.enrol("study", request, fingerprint=key.verify_key.fingerprint)


def test_init_makes_a_private_key_once_and_each_study_once(home: CoordinatorHome) -> None:
    key = home.key().verify_key
    assert home.key_path.stat().st_mode & 0o777 == 0o600
    home.init("second")
    assert home.key().verify_key == key
    assert home.studies() == ["second", "study"]
    with pytest.raises(CoordinatorError, match="exists already"):
        home.init("study")
    for name in ("Bad Name", "", "../x", "a/b"):
        with pytest.raises(UsageError, match="is not a name"):
            home.init(name)


def test_unknown_studies_are_named_with_those_there_are(home: CoordinatorHome, tmp_path: Path) -> None:
    with pytest.raises(CoordinatorError, match=r"no study 'other'.*studies: study"):
        home.study("other")
    with pytest.raises(CoordinatorError, match="no coordinator's key"):
        CoordinatorHome(tmp_path / "empty").key()


def test_a_request_with_another_fingerprint_is_refused_and_nobody_enrolled(home: CoordinatorHome) -> None:
    key, other = SigningKey.generate(), SigningKey.generate()
    with pytest.raises(RefusedError, match="carries the key") as caught:
        home.enrol(
            "study",
            make_request(role="site", name="north", key=key),
            fingerprint=other.verify_key.fingerprint,
        )
    assert "another channel" in caught.value.diagnostics()
    assert home.enrolled("study") == {"sites": {}, "officer": None}


def test_a_malformed_request_is_refused(home: CoordinatorHome) -> None:
    with pytest.raises(MalformedMessageError):
        home.enrol("study", b"{}", fingerprint="SHA256:x")


def test_one_name_one_key_and_one_key_one_name(home: CoordinatorHome) -> None:
    key, officer = SigningKey.generate(), SigningKey.generate()
    enrol(home, "north", key)
    enrol(home, "north", key)
    enrol(home, "dr-x", officer, role="officer")
    with pytest.raises(CoordinatorError, match="enrolled already, with another key"):
        enrol(home, "north", SigningKey.generate())
    with pytest.raises(CoordinatorError, match="an officer is enrolled already"):
        enrol(home, "dr-y", SigningKey.generate(), role="officer")
    for taken in (key, officer, home.key()):
        with pytest.raises(CoordinatorError, match="somebody else"):
            enrol(home, "south", taken)
    assert list(home.enrolled("study")["sites"]) == ["north"]


def test_the_roster_needs_three_sites_and_the_officer(home: CoordinatorHome) -> None:
    for name in ("c", "a"):
        enrol(home, name, SigningKey.generate())
    with pytest.raises(CoordinatorError, match="2 sites and no officer"):
        home.roster("study")
    enrol(home, "b", SigningKey.generate())
    with pytest.raises(CoordinatorError, match="3 sites and no officer"):
        home.roster("study")
    enrol(home, "dr-x", SigningKey.generate(), role="officer")
    roster = home.roster("study")
    assert [site.site_id for site in roster.sites] == ["a", "b", "c"]
    assert roster.coordinator_key == home.key().verify_key.hex()


def test_nobody_is_enrolled_after_the_plan_is_signed(home: CoordinatorHome) -> None:
    (home.study("study") / "plan").mkdir()
    with pytest.raises(CoordinatorError, match="the plan is signed"):
        enrol(home, "late", SigningKey.generate())


def test_a_damaged_list_is_named(home: CoordinatorHome) -> None:
    write_private(home.study("study") / "enrolled.json", b"[]")
    with pytest.raises(CoordinatorError, match=r"enrolled\.json is damaged"):
        home.enrolled("study")


# gating: what is missing or damaged is said before anything is judged


@pytest.fixture
def signed(tmp_path: Path) -> tuple[StudyStore, SigningKey]:
    keys = Keys.of(3)
    root = tmp_path / "coordinator" / "gated"
    root.mkdir(parents=True, mode=0o700)
    networks = tmp_path / "network"
    networks.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    plan = small_plan(keys, model__autoencoder_sha256=digest, model__prior_sha256=digest)
    write_plan_package(root / "plan", plan, key=keys.coordinator, autoencoder=networks, prior=networks)
    return StudyStore(root), keys.coordinator


def test_the_gate_needs_a_candidate(signed: tuple[StudyStore, SigningKey]) -> None:
    store, key = signed
    with pytest.raises(CoordinatorError, match="no candidate to judge"):
        decide(store, key)
    with pytest.raises(CoordinatorError, match="has not decided yet"):
        release(store, key)


def test_a_study_without_evidence_is_refused_by_name_and_that_is_signed(
    signed: tuple[StudyStore, SigningKey],
) -> None:
    store, key = signed
    store.candidate_path.write_bytes(b"candidate")
    decision = decide(store, key)
    assert not decision.released
    failed = {condition.name for condition in decision.conditions if not condition.passed}
    assert {"attempts-charged", "rounds-complete"} <= failed
    assert store.decision_path.exists()
    store.close()


@pytest.mark.parametrize("receipts", [b"[]", b"{}", b'{"heads": {"site-0": {}}}', b"not json"])
def test_damaged_receipts_are_named(signed: tuple[StudyStore, SigningKey], receipts: bytes) -> None:
    store, key = signed
    store.candidate_path.write_bytes(b"candidate")
    store.evidence.mkdir()
    write_private(store.receipts_path, receipts)
    with pytest.raises(CoordinatorError, match=r"receipts\.json is damaged"):
        decide(store, key)
    store.close()


def test_a_released_study_is_not_judged_again(signed: tuple[StudyStore, SigningKey]) -> None:
    store, key = signed
    store.candidate_path.write_bytes(b"candidate")
    store.bundle_path.mkdir()
    with pytest.raises(CoordinatorError, match="released already"):
        decide(store, key)
    shutil.rmtree(store.bundle_path)
