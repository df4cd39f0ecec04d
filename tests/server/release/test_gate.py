# ruff: noqa: E501, ARG005 - the table of cases reads better with one case a line
"""The gate: releases the honest study, and names each condition that a tampered one breaks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from release_study import (
    AT,
    AUDIT_ATTEMPT,
    SITES,
    Study,
    attempt_records,
    honest_counts,
    make_ledger,
    make_study,
    make_verdict,
)

from privacy.audit.verdict import PlantedLeak
from privacy.compliance.approvals import approve_plan, open_decision
from privacy.dp.accounting import PrivacyEvent
from privacy.dp.execution_plan import ExecutionPlan
from privacy.ledger import Charge
from privacy.ledger_chain import LedgerHead, read_export
from server.release.gate import GateDecision, evaluate_gate, sign_decision
from server.release.gate_conditions import conditions_of
from shared.errors import CoordinatorError
from shared.identity import SigningKey
from shared.plan_package import sign_plan
from shared.study_plan import StudyPlan, parse_plan

_counter = itertools.count()


def failed(decision: GateDecision) -> set[str]:
    return {condition.name for condition in decision.failed}


def ledgers(study: Study, site: str, data: bytes) -> dict[str, Any]:
    return {"ledgers": {**study.inputs.ledgers, site: data}}


def verdicts(study: Study, sites: Sequence[str] = SITES, **changes: Any) -> dict[str, Any]:
    made = {
        s: make_verdict(study.keys, study.plan, s, study.inputs.candidate_sha256, **changes) for s in sites
    }
    return {"verdicts": {**study.inputs.verdicts, **made}}


def other_ledger(study: Study, site: str = "alpha", **changes: Any) -> bytes:
    values = {"records": attempt_records(), "plan": study.plan, **changes}
    root = study.root / f"other-{next(_counter)}"
    return make_ledger(
        root, values.pop("key", study.keys[site]), values.pop("plan"), values.pop("records"), **values
    )


def weakened(study: Study, **privacy: Any) -> StudyPlan:
    value = study.plan.model_dump(mode="json")
    value["privacy"].update(privacy)
    return parse_plan(value, what="weakened")


def extra_charges(study: Study, purpose: Any, first: int, count: int) -> tuple[Charge, ...]:
    execution = ExecutionPlan.from_study_plan(study.plan)
    event = execution.training_event() if purpose == "train" else execution.audit_event()
    return tuple(
        Charge(
            study_id=study.plan.study_id, plan_sha256=study.plan.digest().hex(), purpose=purpose, round=1,
            attempt=first + i, event=event, run_id="run-1",
        )
        for i in range(count)
    )  # fmt: skip


def flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def less_noise(purpose: str, event: PrivacyEvent) -> PrivacyEvent:
    """A charge that claims twice the noise that the plan has."""
    if purpose == "audit":
        return event
    return replace(event, noise_multiplier_world=2 * event.noise_multiplier_world)


def records_without(attempt: int) -> tuple[Any, ...]:
    return tuple(record for record in attempt_records() if record.attempt != attempt)


def second_audit() -> tuple[Any, ...]:
    audit = attempt_records()[-1]
    return (*attempt_records(), replace(audit, attempt=AUDIT_ATTEMPT + 1))


def stale_head(study: Study) -> dict[str, Any]:
    """A head that alpha signed at 50 entries: the export given to the gate is an older copy."""
    key = study.keys["alpha"]
    export = read_export(study.inputs.ledgers["alpha"], key.verify_key)
    head = LedgerHead.sign(key, ledger_id=export.ledger_id, length=50, entry_hash=b"\1" * 32)
    return {"seen_heads": {"alpha": [head]}}


def few(study: Study, divisor: int) -> tuple[int, ...]:
    return tuple(count // divisor for count in honest_counts(study.plan))


def copied(study: Study) -> tuple[int, ...]:
    return (*honest_counts(study.plan)[:-1], 400)


def skewed_control(study: Study) -> tuple[int, ...]:
    """The public model alone tells members from others: the audit is broken."""
    counts = list(honest_counts(study.plan))
    counts[18:22] = [8 * 400, 8 * 80, 0, 0]
    return tuple(counts)


def split_members(study: Study) -> tuple[int, ...]:
    counts = list(honest_counts(study.plan))
    counts[0:6] = [0, 0, 0, 0, 16 * 40, 16 * 200]
    counts[6:12] = [16 * 200, 16 * 40, 0, 0, 0, 0]
    return tuple(counts)


CASES: list[tuple[str, Callable[[Study], dict[str, Any]], str]] = [
    ("ledger missing", lambda s: {"ledgers": {k: v for k, v in s.inputs.ledgers.items() if k != "beta"}}, "ledgers-present"),
    ("ledger flipped", lambda s: ledgers(s, "beta", flipped(s.inputs.ledgers["beta"])), "ledgers-verify"),
    ("ledger of another site", lambda s: ledgers(s, "beta", s.inputs.ledgers["alpha"]), "ledgers-verify"),
    ("ledger of a stranger", lambda s: ledgers(s, "delta", s.inputs.ledgers["alpha"]), "ledgers-present"),
    ("ledger by a foreign key", lambda s: ledgers(s, "alpha", other_ledger(s, key=SigningKey.generate())), "ledgers-verify"),
    ("ledger of another plan", lambda s: ledgers(s, "alpha", other_ledger(s, plan=weakened(s, epsilon=9.0))), "ledgers-of-plan"),
    ("ledger empty", lambda s: ledgers(s, "alpha", b""), "ledgers-verify"),
    ("ledger older than a receipt", stale_head, "ledgers-fresh"),
    ("completed attempt not charged", lambda s: ledgers(s, "alpha", other_ledger(s, records=records_without(4))), "attempts-charged"),
    ("audit not charged", lambda s: ledgers(s, "alpha", other_ledger(s, records=records_without(AUDIT_ATTEMPT))), "attempts-charged"),
    ("charge with more noise claimed", lambda s: ledgers(s, "alpha", other_ledger(s, event=less_noise)), "charges-mechanism"),
    ("charge nobody opened", lambda s: ledgers(s, "alpha", other_ledger(s, also=extra_charges(s, "train", 200, 1))), "attempts-known"),
    ("too many attempts", lambda s: ledgers(s, "alpha", other_ledger(s, also=extra_charges(s, "train", 200, 9))), "attempts-within"),
    ("over budget", lambda s: ledgers(s, "alpha", other_ledger(s, also=extra_charges(s, "train", 200, 9))), "budget"),
    ("too many audits charged", lambda s: ledgers(s, "alpha", other_ledger(s, also=extra_charges(s, "audit", 200, 2))), "attempts-within"),
    ("unprotected charge", lambda s: ledgers(s, "alpha", other_ledger(s, event=lambda _, e: PrivacyEvent.unprotected())), "budget"),
    ("round missing", lambda s: {"attempts": records_without(4)}, "rounds-complete"),
    ("no record of attempts", lambda s: {"attempts": ()}, "attempts-charged"),
    ("audit repeated until it passes", lambda s: {"attempts": second_audit()}, "audit-once"),
    ("no audit", lambda s: {"attempts": records_without(AUDIT_ATTEMPT)}, "audit-once"),
    ("verdict missing", lambda s: {"verdicts": {k: v for k, v in s.inputs.verdicts.items() if k != "beta"}}, "verdicts-present"),
    ("no verdicts", lambda s: {"verdicts": {}}, "verdicts-recomputed"),
    ("verdict unsigned", lambda s: {"verdicts": {**s.inputs.verdicts, "beta": b"{}"}}, "verdicts-present"),
    ("verdict flipped", lambda s: {"verdicts": {**s.inputs.verdicts, "beta": flipped(s.inputs.verdicts["beta"])}}, "verdicts-present"),
    ("verdict of another site", lambda s: {"verdicts": {**s.inputs.verdicts, "beta": s.inputs.verdicts["alpha"]}}, "verdicts-present"),
    ("verdict of another candidate", lambda s: verdicts(s, ["beta"], candidate_sha256="9" * 64), "verdicts-candidate"),
    ("candidate changed after the audit", lambda s: {"candidate_sha256": "9" * 64}, "verdicts-candidate"),
    ("verdict of another audit", lambda s: verdicts(s, ["beta"], attempt=7), "audit-once"),
    ("verdicts of different counts", lambda s: verdicts(s, ["beta"], pooled_counts=few(s, 2)), "verdicts-agree"),
    ("members can be told", lambda s: verdicts(s, pooled_counts=honest_counts(s.plan, leak=True)), "audit-membership-attack"),
    ("members can be told, says one site", lambda s: verdicts(s, ["gamma"], pooled_counts=honest_counts(s.plan, leak=True)), "audit-membership-attack"),
    ("too few patients", lambda s: verdicts(s, pooled_counts=few(s, 40)), "audit-power"),
    ("public model tells members", lambda s: verdicts(s, pooled_counts=skewed_control(s)), "audit-control-public-loss"),
    ("members differ from members", lambda s: verdicts(s, pooled_counts=split_members(s)), "audit-control-members"),
    ("planted leak not seen", lambda s: verdicts(s, planted_leak=PlantedLeak(auc=0.5, n_planted=16, n_fresh=16)), "audit-control-planted-leak"),
    ("copies", lambda s: verdicts(s, pooled_counts=copied(s)), "audit-copies"),
    ("veto", lambda s: verdicts(s, ["gamma"], veto=True), "no-veto"),
    ("another autoencoder", lambda s: {"autoencoder_sha256": "9" * 64}, "public-parts"),
    ("plan unsigned", lambda s: {"plan_envelope": b""}, "plan-signed"),
    ("plan signed by another", lambda s: {"plan_envelope": sign_plan(s.plan, SigningKey.generate())}, "plan-signed"),
    ("plan not approved by one", lambda s: {"plan_approvals": {k: v for k, v in s.inputs.plan_approvals.items() if k != "beta"}}, "plan-approved"),
    ("plan approval of another site", lambda s: {"plan_approvals": {**s.inputs.plan_approvals, "beta": s.inputs.plan_approvals["alpha"]}}, "plan-approved"),
    ("plan approval of another plan", lambda s: {"plan_approvals": {**s.inputs.plan_approvals, "beta": approve_plan(weakened(s, epsilon=9.0), key=s.keys["beta"], site_id="beta")}}, "plan-approved"),
    ("no approvals and no ledgers", lambda s: {"plan_approvals": None, "ledgers": {}}, "plan-approved"),
]  # fmt: skip


def test_the_honest_study_is_released_and_every_condition_listed(study: Study) -> None:
    decision = study.decide()
    assert failed(decision) == set()
    assert decision.released
    assert [condition.name for condition in decision.conditions] == list(conditions_of(study.plan))
    assert all(c.figure and c.title for c in decision.conditions)
    assert all(1 < site.epsilon_world <= 8 < site.epsilon_colluding for site in decision.spending)


@pytest.mark.parametrize(("change", "condition"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_each_tampering_is_refused_by_name(
    study: Study, change: Callable[[Study], dict[str, Any]], condition: str
) -> None:
    decision = study.decide(**change(study))
    assert not decision.released
    assert condition in failed(decision)
    assert decision.condition(condition).reason
    assert [c.name for c in decision.conditions] == list(conditions_of(study.plan))
    assert decision.to_dict()["decision"] == "refuse"


def test_a_plan_weakened_after_training_is_refused(study: Study) -> None:
    plan = weakened(study, epsilon=20.0)
    decision = study.decide(plan=plan, plan_envelope=sign_plan(plan, study.coordinator))
    assert {"ledgers-of-plan", "plan-approved", "verdicts-recomputed"} <= failed(decision)


def test_nothing_but_garbage_gives_a_whole_list_and_no_exception(study: Study) -> None:
    garbage = dict.fromkeys(SITES, b"\xff{garbage")
    decision = study.decide(
        ledgers=garbage, verdicts=garbage, plan_approvals=garbage, plan_envelope=b"\0", attempts=(), at=""
    )
    assert [c.name for c in decision.conditions] == list(conditions_of(study.plan))
    assert failed(decision) >= set(conditions_of(study.plan)) - {
        "plan-sound",
        "public-parts",
        "ledgers-present",
    }
    assert all(c.reason for c in decision.failed)
    sign_decision(decision, study.coordinator, at=AT)


def test_approvals_not_collected_are_implied_by_charges_under_the_plan(study: Study) -> None:
    decision = study.decide(plan_approvals=None)
    assert decision.released
    assert "implied" in decision.condition("plan-approved").reason


def test_unprotected_study_fails_the_attack_on_its_own_and_the_budget(tmp_path: Path) -> None:
    leaky = make_study(tmp_path, mode="unprotected")
    counts = honest_counts(leaky.plan, leak=True)
    made = {
        s: make_verdict(leaky.keys, leaky.plan, s, leaky.inputs.candidate_sha256, pooled_counts=counts)
        for s in SITES
    }
    decision = leaky.decide(verdicts=made)
    assert {"budget", "audit-membership-attack"} <= failed(decision)
    assert "infinite" in decision.condition("budget").figure
    assert decision.condition("audit-membership-attack").figure.startswith("0.9")
    predicate = open_decision(leaky.signed_decision(decision), plan=leaky.plan).predicate
    assert predicate["spending"][0]["epsilon_world"] == "infinite"


def test_decision_is_signed_by_the_coordinator_over_all_evidence(study: Study) -> None:
    statement = open_decision(study.signed_decision(), plan=study.plan)
    assert statement.subjects["models/denoiser.safetensors"] == study.inputs.candidate_sha256
    assert len(statement.subjects) == 2 + 2 + 3 * len(SITES)
    with pytest.raises(CoordinatorError):
        sign_decision(evaluate_gate(study.inputs), study.keys["alpha"], at=AT)
