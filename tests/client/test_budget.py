"""A site's budget is a wall for whole plans, and what is shown of it adds up."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_plan import Keys, small_plan

from client import workbench
from client.budget_picture import budget_picture
from client.budget_report import MAX_HISTORY, site_budget
from client.reservations import Reservation, check_room, open_reservations
from client.serving import ServeOptions, open_ledger, serve_study
from client.site_home import SiteHome, init_site
from client.site_policy import SitePolicy, save_policy
from deploy.cli.main import main
from privacy.dp.accounting import PrivacyEvent, epsilon
from privacy.dp.execution_plan import ExecutionPlan
from privacy.ledger import Budget, Charge, Ledger
from shared.errors import BudgetExceededError, RefusedError, UsageError
from shared.exit_codes import ExitCode
from shared.identity import SigningKey, VerifyKey
from shared.plan_package import PlanPackage, write_plan_package
from shared.study_plan import StudyPlan

DELTA = 1e-5


class Hospital:
    """A site's home, with plans that it approves as a person would or that are just put there."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, SiteHome(root / "home" / "site")
        init_site(self.home, name="site-0")
        self.keys = Keys([self.home.identity(), SigningKey.generate(), SigningKey.generate()])
        network = root / "network"
        network.write_bytes(b"weights")
        self._digest = hashlib.sha256(b"weights").hexdigest()
        policy = self.home.policy()
        for name, key in (
            ("coordinator", self.keys.coordinator.verify_key),
            ("officer", self.keys.officer.verify_key),
            *((f"site-{i}", self.keys.sites[i].verify_key) for i in (1, 2)),
        ):
            policy = policy.pinned(name, VerifyKey.from_hex(key.hex()).fingerprint)
        save_policy(policy, self.home.policy_path)

    def package(self, study_id: str, **changes: Any) -> PlanPackage:
        root = self.root / "packages" / study_id
        plan = small_plan(
            self.keys, study_id=study_id,
            model__autoencoder_sha256=self._digest, model__prior_sha256=self._digest, **changes,
        )  # fmt: skip
        network = self.root / "network"
        return write_plan_package(root, plan, key=self.keys.coordinator, autoencoder=network, prior=network)

    def set_cap(self, cap: float) -> None:
        save_policy(
            SitePolicy.model_validate({**self.home.policy().model_dump(), "max_total_epsilon": cap}),
            self.home.policy_path,
        )

    def charge(self, plan: StudyPlan, attempts: int, *, purpose: Any = "train") -> None:
        with open_ledger(self.home) as ledger:
            charge(ledger, plan, attempts, purpose=purpose, cap=self.home.policy().max_total_epsilon)


def charge(
    ledger: Ledger, plan: StudyPlan, attempts: int, *, cap: float | None, purpose: Any = "train"
) -> None:
    execution = ExecutionPlan.from_study_plan(plan)
    event = execution.training_event() if purpose == "train" else execution.audit_event()
    for _ in range(attempts):
        number = max(ledger.charged_attempts(plan.study_id), default=0) + 1
        ledger.reserve(
            Charge(
                study_id=plan.study_id, plan_sha256=plan.digest().hex(), purpose=purpose,
                round=number, attempt=number, event=event,
            ),
            Budget(epsilon=cap, delta=DELTA),
            max_attempts=plan.privacy.max_attempts,
        )  # fmt: skip


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    monkeypatch.setenv("LACUNA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    return Hospital(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[Any, str, str]]]:
    def call(*words: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        shown = capsys.readouterr()
        return stop.value.code, shown.out, shown.err

    yield call


def test_a_plan_that_would_pass_the_cap_is_refused_and_leaves_nothing(hospital: Hospital, run: Any) -> None:
    """Two plans of epsilon 8 fit under a cap of 14, three do not (closed forms: 12.4 and 16.1)."""
    hospital.set_cap(14.0)
    for study in ("one", "two"):
        code, _, err = run("site", "approve", str(hospital.package(study).root))
        assert code == 0, err
    third = hospital.package("three")
    code, _, err = run("site", "approve", str(third.root))
    assert code == ExitCode.REFUSED
    assert "its cap is 14 " in err and "one, two" in err and "Spent: 0;" in err and "end-study" in err
    assert hospital.home.studies() == ["one", "two"]
    assert run("site", "end-study", "one", "--yes")[0] == 0
    assert run("site", "approve", str(third.root))[0] == 0
    code, _, err = run("site", "approve", str(hospital.package("four").root))
    assert code == ExitCode.REFUSED and "three, two" in err


def test_what_was_spent_by_an_ended_study_still_counts(hospital: Hospital, run: Any) -> None:
    one = hospital.package("one")
    run("site", "approve", str(one.root))
    hospital.charge(one.plan, 3)
    hospital.charge(one.plan, 1, purpose="audit")
    before = site_budget(hospital.home).total.reported
    assert run("site", "end-study", "one", "--yes")[0] == 0
    report = site_budget(hospital.home)
    assert report.total.reported == before > 0
    assert report.shares.reserved == 0 and report.studies[0].state == "ended"
    path = str(hospital.root / "ledger.json")
    assert run("site", "export-ledger", "--out", path)[0] == 0
    (row,) = json.loads(run("compliance", "budget", path, "--json")[1])
    assert not row["fault"] and row["epsilon_world"] == pytest.approx(before, rel=0.01)
    hospital.set_cap(before + 0.01)
    code, _, err = run("site", "approve", str(hospital.package("two").root))
    assert code == ExitCode.REFUSED and f"Spent: {before:.4g}" in err


def test_an_ended_study_charges_nothing_and_is_not_served(hospital: Hospital, run: Any) -> None:
    one = hospital.package("one")
    run("site", "approve", str(one.root))
    assert run("site", "end-study", "one", "--yes")[0] == 0
    with pytest.raises(BudgetExceededError, match="ended"):
        hospital.charge(one.plan, 1)
    with pytest.raises(RefusedError, match="ended at this site, for good"):
        serve_study(hospital.home, "one", ServeOptions(socket_path=hospital.root / "s"))
    assert run("site", "approve", str(one.root))[0] == ExitCode.REFUSED
    assert run("site", "end-study", "one", "--yes")[0] == ExitCode.USAGE
    with open_ledger(hospital.home) as ledger, pytest.raises(UsageError):
        ledger.record("study-ended", {"study_id": "one"})


def test_a_plan_without_room_is_not_served(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hospital lowered its cap after it approved: no scan is touched, no socket opened."""
    hospital.home.study("one").mkdir()
    hospital.package("one").root.rename(hospital.home.study("one") / "plan")
    monkeypatch.setattr(workbench, "SiteWorkbench", lambda **_: pytest.fail("patients were loaded"))
    hospital.set_cap(7.0)
    with pytest.raises(BudgetExceededError, match="its cap is 7 "):
        serve_study(hospital.home, "one", ServeOptions(socket_path=hospital.root / "s"))
    assert not (hospital.root / "s").exists()


def test_spent_reserved_and_left_add_up(hospital: Hospital, run: Any) -> None:
    one, two = hospital.package("one"), hospital.package("two")
    for package in (one, two):
        assert run("site", "approve", str(package.root))[0] == 0
    hospital.charge(one.plan, 2)
    hospital.charge(two.plan, 1)
    hospital.charge(one.plan, 1, purpose="audit")
    report = site_budget(hospital.home)
    first, second = report.studies
    own = ExecutionPlan.from_study_plan(one.plan)
    charged = [own.training_event()] * 2 + [own.audit_event()]
    assert first.shares.spent == epsilon(charged, DELTA).reported
    planned = own.planned_epsilon().reported
    assert first.shares.spent + first.shares.reserved == pytest.approx(planned, rel=1e-9)
    for shares in (first.shares, second.shares, report.shares):
        assert shares.spent + shares.reserved + (shares.left or 0) == pytest.approx(shares.cap, rel=1e-9)
    other = ExecutionPlan.from_study_plan(two.plan)
    everything = [own.training_event()] * own.max_attempts + [own.audit_event()] * own.max_audit_attempts
    everything += [other.training_event()] * other.max_attempts
    everything += [other.audit_event()] * other.max_audit_attempts
    whole = epsilon(everything, DELTA).reported
    assert report.shares.spent + report.shares.reserved == pytest.approx(whole, rel=1e-6)
    assert report.total.reported < first.world.reported + second.world.reported
    assert [(p.purpose, p.round) for p in first.history] == [("train", 1), ("train", 2), ("audit", 3)]
    assert report.history[-1].epsilon == report.total.reported
    assert [p.epsilon for p in report.history] == sorted(p.epsilon for p in report.history)


def test_expired_plans_hold_nothing_back(hospital: Hospital, run: Any) -> None:
    run("site", "approve", str(hospital.package("one", expires="2098-01-01").root))
    assert site_budget(hospital.home).shares.reserved > 7
    later = site_budget(hospital.home, today=date(2098, 1, 2))
    assert later.studies[0].state == "expired" and later.shares.reserved == 0
    assert later.studies[0].left == 8.0


def test_the_command_shows_table_json_and_plot(hospital: Hospital, run: Any) -> None:
    one = hospital.package("one")
    run("site", "approve", str(one.root))
    hospital.charge(one.plan, 2)
    path = hospital.root / "budget.png"
    code, out, err = run("site", "budget", "--json", "--plot", str(path))
    assert code == 0, err
    value = json.loads(out)
    (study,) = value["studies"]
    assert study["epsilon"] + study["reserved"] + study["left"] == pytest.approx(8.0)
    total = value["total"]
    assert total["epsilon"] + total["reserved"] + total["left"] == pytest.approx(total["cap"])
    assert [p["charge"] for p in total["history"]] == [1, 2]
    assert is_png(path.read_bytes())
    code, out, _ = run("site", "budget")
    assert code == 0 and "reserved" in out and "left" in out and "all studies" in out
    assert f"{study['epsilon']:.3f}" in out and f"{study['reserved']:.3f}" in out
    bar = next(line for line in out.splitlines() if line.startswith("one ") and "▒" in line)
    assert bar.count("█") / 40 == pytest.approx(study["epsilon"] / 8, abs=1 / 40)
    assert bar.count("█") + bar.count("▒") + bar.count("·") == 40


def is_png(data: bytes) -> bool:
    """Signature, and a whole image: every chunk's checksum holds up to the last."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, kind = 8, b""
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind = data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        place += 12 + length
    return kind == b"IEND"


def test_unprotected_attempts_show_as_infinite_and_close_the_wall(hospital: Hospital, run: Any) -> None:
    one = hospital.package("one")
    with open_ledger(hospital.home) as ledger:
        ledger.reserve(
            Charge(
                study_id="leaky", plan_sha256="00" * 32, purpose="train", round=1, attempt=1,
                event=PrivacyEvent.unprotected(),
            ),
            Budget(epsilon=None, delta=DELTA),
        )  # fmt: skip
    report = site_budget(hospital.home)
    assert report.studies[0].state == "no plan"
    value = report.to_dict()
    assert value["total"]["epsilon"] == "infinite" and value["total"]["left"] == 0.0
    assert "Infinity" not in json.dumps(value)
    assert is_png(budget_picture(report))
    assert run("site", "budget")[0] == 0
    code, _, err = run("site", "approve", str(one.root))
    assert code == ExitCode.REFUSED and "Spent: inf" in err


def test_a_long_history_is_thinned_and_ends_with_the_last_charge(hospital: Hospital) -> None:
    plan = small_plan(hospital.keys, privacy__max_attempts=1000)
    with open_ledger(hospital.home) as ledger:
        charge(ledger, plan, 90, cap=None)
    history = site_budget(hospital.home).history
    assert MAX_HISTORY // 2 < len(history) <= MAX_HISTORY + 1 and history[-1].charge == 90


STUDIES = ("a", "b", "c", "d")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cap=st.sampled_from([9.0, 13.0, 20.0]),
    steps=st.lists(st.tuples(st.sampled_from(["approve", "charge", "end"]), st.sampled_from(STUDIES)),
                   max_size=14),
)  # fmt: skip
def test_whatever_is_approved_can_be_charged_in_full_and_never_passes_the_cap(
    tmp_path_factory: pytest.TempPathFactory, cap: float, steps: list[tuple[str, str]]
) -> None:
    """The two halves of the wall: a plan that was let in never meets it, and nothing climbs over it."""
    root = tmp_path_factory.mktemp("wall")
    plans = {study: small_plan(KEYS, study_id=study) for study in STUDIES}
    policy = SitePolicy(max_total_epsilon=cap)
    approved: set[str] = set()
    ended: set[str] = set()
    with Ledger.open(root / "l", key=SigningKey.generate(), counter_path=root / "w", create=True) as ledger:
        for action, study in steps:
            open_plans = [Reservation.of(plans[other], ledger.entries()) for other in approved - ended]
            if action == "approve":
                try:
                    check_room(plans[study], policy=policy, entries=ledger.entries(), others=open_plans)
                    approved.add(study)
                except RefusedError:
                    continue
            elif action == "end" and study in approved - ended:
                ledger.end_study(study)
                ended.add(study)
            elif action == "charge" and study in approved - ended:
                used = len(ledger.charged_attempts(study))
                if used < plans[study].privacy.max_attempts:
                    charge(ledger, plans[study], 1, cap=cap)
            assert ledger.spent(delta=DELTA).reported <= cap
        for study in approved - ended:
            left = plans[study].privacy.max_attempts - len(ledger.charged_attempts(study))
            charge(ledger, plans[study], left, cap=cap)
        assert ledger.spent(delta=DELTA).reported <= cap


KEYS = Keys.of(3)


def test_a_plan_that_does_not_open_holds_nothing_back(hospital: Hospital, run: Any) -> None:
    run("site", "approve", str(hospital.package("one").root))
    (hospital.home.study("one") / "plan" / "plan.json").write_bytes(b"x")
    with open_ledger(hospital.home) as ledger:
        assert open_reservations(hospital.home, ledger.entries()) == []
    assert site_budget(hospital.home).studies[0].state == "no plan"
