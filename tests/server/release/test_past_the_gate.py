# ruff: noqa: E501, ARG005 - the table of attempts reads better with one attempt a line
"""Nothing talks past the gate: every attempt that somebody could make is refused, each by its name.

Four doors stand between a candidate and a receiver: the site that approves the plan, the gate's decision, the
release that needs approvals of that decision, and whoever verifies the bundle. Each attempt below starts from
an honest study, cheats in one respect with every key that its author would hold, and has to be refused at the
door that it is meant to pass, in words that name it.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from release_study import (
    ASKING,
    AT,
    AUDIT_ATTEMPT,
    COINS,
    SITES,
    Study,
    attempt_records,
    honest_counts,
    make_ledger,
    make_mechanism,
    make_opening,
    make_study,
    make_verdict,
    reseal,
    sha256,
)

from client.site_policy import SitePolicy
from privacy.audit.counts import CONTROL_WEIGHT, PRIMARY_WEIGHT, CountsLayout
from privacy.audit.verdict import PlantedLeak
from privacy.audit.verdict_statement import make_verdict_statement, sign_verdict
from privacy.compliance.approvals import APPROVAL_PREDICATE, approve_decision, approve_plan
from privacy.compliance.release_log import log_head, read_log_file
from privacy.compliance.verify import verify_bundle
from privacy.ledger_chain import LedgerHead, read_export
from server.release.gate import GateDecision, evaluate_gate, sign_decision
from server.release.log import append_withdrawal
from shared.attestation import Statement, Subject, sign_statement
from shared.canonical import canonical_json
from shared.errors import LacunaError
from shared.identity import SigningKey
from shared.plan_package import sign_plan
from shared.study_plan import StudyPlan, parse_plan

_counter = itertools.count()
AFTER_THE_LAST_DAY = "2100-01-01T00:00:00Z"


def changed_plan(study: Study, clause: str, **changes: Any) -> StudyPlan:
    value = study.plan.model_dump(mode="json")
    value[clause].update(changes)
    return parse_plan(value, what="changed")


# doors: each returns the words of the refusal, or fails the test where the attempt passes


def at_the_gate(study: Study, **inputs: Any) -> str:
    decision = study.decide(**inputs)
    assert not decision.released, "the attempt passed the gate"
    return "\n".join(f"{c.name}: {c.reason}" for c in decision.failed)


def at_the_release(study: Study, **evidence: Any) -> str:
    path = study.root / f"past-{next(_counter)}"
    try:
        study.release(path, **evidence)
    except LacunaError as error:
        assert not path.exists()
        return error.message
    pytest.fail("the attempt was released")


def at_verification(study: Study, change: Callable[[Path], Any], **options: Any) -> str:
    path = study.root / f"past-{next(_counter)}"
    log = path.with_suffix(".jsonl")
    study.release(path, log_path=log)
    more = change(path)
    report = verify_bundle(path, **{**options, **(more or {})})
    assert not report.passed, "the attempt was verified"
    return "\n".join(f"{check.name}: {check.detail}" for check in report.failed)


def at_a_site(study: Study, plan: StudyPlan, **policy: Any) -> str:
    own = SitePolicy(
        coordinator_fingerprint=study.coordinator.verify_key.fingerprint,
        officer_fingerprint=study.keys["officer"].verify_key.fingerprint,
        peers={site: study.keys[site].verify_key.fingerprint for site in SITES[1:]},
        **policy,
    )
    assert own.refusals(study.plan, own_site="alpha", own_key=study.keys["alpha"].verify_key) == ()
    refused = own.refusals(plan, own_site="alpha", own_key=study.keys["alpha"].verify_key)
    assert refused, "the site approved"
    return "\n".join(refused)


# what a cheat holds


def verdicts(study: Study, site: str, data: bytes | None) -> dict[str, Any]:
    kept = {**study.inputs.verdicts, site: data}
    return {"verdicts": {name: value for name, value in kept.items() if value is not None}}


def signed_verdict(study: Study, site: str, **changes: Any) -> bytes:
    return make_verdict(study.keys, study.plan, site, study.inputs.candidate_sha256, **changes)


def unsigned(data: bytes) -> bytes:
    envelope = json.loads(data)
    return json.dumps({**envelope, "signatures": []}, separators=(",", ":"), sort_keys=True).encode()


def flattered(study: Study, site: str) -> bytes:
    """Counts of a leak, under the words of an honest verdict, really signed by the site."""
    values: dict[str, Any] = {
        "candidate_sha256": study.inputs.candidate_sha256, "run_id": "run-1", "attempt": AUDIT_ATTEMPT,
        "site_id": site, "survivors": SITES, "planted_leak": PlantedLeak(auc=1.0, n_planted=16, n_fresh=16),
        "veto": False,
    }  # fmt: skip
    leaky = make_verdict_statement(study.plan, pooled_counts=honest_counts(study.plan, leak=True), **values)
    good = make_verdict_statement(study.plan, pooled_counts=honest_counts(study.plan), **values)
    return sign_verdict(replace(leaky, verdict=good.verdict), study.keys[site])


def ledger(study: Study, data: bytes, site: str = "alpha") -> dict[str, Any]:
    return {"ledgers": {**study.inputs.ledgers, site: data}}


def fresh_ledger(study: Study, **options: Any) -> bytes:
    """A ledger that alpha really signs, with what it leaves out or claims."""
    records = options.pop("records", attempt_records())
    return make_ledger(
        study.root / f"cheat-{next(_counter)}", study.keys["alpha"], study.plan, records, **options
    )


def edited(data: bytes) -> bytes:
    """One charge taken out of the export, everything else as signed."""
    envelope = json.loads(data)
    payload = json.loads(base64.b64decode(envelope["payload"]))
    del payload["predicate"]["entries"][4]
    envelope["payload"] = base64.b64encode(canonical_json(payload)).decode()
    return canonical_json(envelope)


def newer_head(study: Study) -> dict[str, Any]:
    key = study.keys["alpha"]
    export = read_export(study.inputs.ledgers["alpha"], key.verify_key)
    head = LedgerHead.sign(
        key, ledger_id=export.ledger_id, length=export.head.length + 2, entry_hash=b"\1" * 32
    )
    return {"seen_heads": {"alpha": [head]}}


def second_audit(study: Study, *, recorded: bool) -> dict[str, Any]:
    """The first audit's counts did not please; another one is made, at every site, with noise of its own."""
    first = attempt_records()[-1]
    both = (*attempt_records(), replace(first, attempt=AUDIT_ATTEMPT + 1))
    shown = both if recorded else (*attempt_records()[:-1], both[-1])
    made = {site: signed_verdict(study, site, attempt=AUDIT_ATTEMPT + 1) for site in SITES}
    root = study.root / f"cheat-{next(_counter)}"
    ledgers = {site: make_ledger(root / site, study.keys[site], study.plan, both) for site in SITES}
    return {"attempts": shown, "verdicts": made, "ledgers": ledgers}


def under_another_plan(study: Study, **audit: Any) -> dict[str, Any]:
    """The plan's audit clause is weakened after training; coordinator signs again, verdicts are made anew."""
    plan = changed_plan(study, "audit", **audit)
    made = {site: make_verdict(study.keys, plan, site, study.inputs.candidate_sha256) for site in SITES}
    return {"plan": plan, "plan_envelope": sign_plan(plan, study.coordinator), "verdicts": made}


def re_signed(study: Study, plan: StudyPlan) -> dict[str, Any]:
    return {"plan": plan, "plan_envelope": sign_plan(plan, study.coordinator)}


def approval(study: Study, decision: bytes, who: str, *, key: str | None = None, **fields: Any) -> bytes:
    """An approval signed with any key, whatever it claims."""
    values = {
        "study_id": study.plan.study_id, "plan_sha256": study.plan.digest().hex(), "decision": "release", "at": AT,
        "role": "officer" if who == "officer" else "site", "site_id": None if who == "officer" else who, **fields,
    }  # fmt: skip
    name = "attestations/gate-decision.dsse.json"
    statement = Statement(
        predicate_type=APPROVAL_PREDICATE,
        subjects=(Subject(name=name, sha256=sha256(decision)),),
        predicate=values,
    )
    return sign_statement(statement, study.keys[key or who])


def approvals(study: Study, *made: bytes, decision: bytes) -> dict[str, Any]:
    return {"decision": decision, "approvals": list(made)}


def refused_decision(study: Study) -> GateDecision:
    return study.decide(**verdicts(study, "beta", signed_verdict(study, "beta", veto=True)))


def lying_decision(study: Study) -> dict[str, Any]:
    """A coordinator who signs "release, all passed" over a veto, and gets it approved unread."""
    honest = study.decide()
    lie = GateDecision(
        inputs=refused_decision(study).inputs, conditions=honest.conditions, spending=honest.spending
    )
    return {"decision": study.signed_decision(lie), "verdicts": lie.inputs.verdicts}


def late_decision(study: Study) -> bytes:
    return sign_decision(study.decide(at=AFTER_THE_LAST_DAY), study.coordinator, at=AFTER_THE_LAST_DAY)


def withdraw(study: Study, path: Path) -> Path:
    log = path.with_suffix(".jsonl")
    digest = sha256((path / "attestations/release.dsse.json").read_bytes())
    append_withdrawal(
        log,
        bundle_sha256=digest,
        study_id=study.plan.study_id,
        key=study.coordinator,
        at=AT,
        reason="mislabelled scans",
    )
    return log


def withdrawn(study: Study, path: Path) -> dict[str, Any]:
    return {"log": withdraw(study, path)}


def log_before_the_withdrawal(study: Study, path: Path) -> dict[str, Any]:
    old = path.with_suffix(".old.jsonl")
    shutil.copyfile(path.with_suffix(".jsonl"), old)
    return {"log": old, "log_at_least": log_head(read_log_file(withdraw(study, path)))}


def unlogged(path: Path) -> dict[str, Any]:
    empty = path.with_suffix(".empty.jsonl")
    empty.write_bytes(b"")
    return {"log": empty}


def swapped_weights(study: Study, path: Path) -> None:
    (path / "models/denoiser.safetensors").write_bytes((path / "models/autoencoder.safetensors").read_bytes())
    reseal(path, study)


def resealed_with(study: Study, path: Path, name: str, data: bytes) -> None:
    (path / name).write_bytes(data)
    reseal(path, study)


Attempt = tuple[str, Callable[[Study], str], str]
ATTEMPTS: list[Attempt] = [
    # the site that approves the plan
    ("plan whose gate tolerates a leak", lambda s: at_a_site(s, changed_plan(s, "audit", max_auc=0.95)), "max_auc"),
    ("plan that releases from a blind audit", lambda s: at_a_site(s, changed_plan(s, "audit", low_power="accept")), "allow_low_power"),
    ("plan that asks for no power", lambda s: at_a_site(s, changed_plan(s, "audit", min_power=0.0)), "min_power"),
    ("plan that tolerates copies", lambda s: at_a_site(s, changed_plan(s, "audit", max_copied_patients=100)), "max_copied_share"),
    ("plan that looks for no copies", lambda s: at_a_site(s, changed_plan(s, "audit", copy_samples=0)), "min_copy_samples"),
    ("plan under which nothing is near enough to be a copy", lambda s: at_a_site(s, changed_plan(s, "audit", copy_distance=1e-6)), "min_copy_distance"),
    ("plan with a hundred audits", lambda s: at_a_site(s, changed_plan(s, "privacy", max_audit_attempts=100)), "max_audit_attempts"),
    ("plan that one site's approval releases", lambda s: at_a_site(s, changed_plan(s, "release", site_approvals=1)), "min_site_approvals"),
    ("plan without the officer", lambda s: at_a_site(s, changed_plan(s, "release", officer_approval=False)), "require_officer_approval"),
    ("plan by another coordinator", lambda s: at_a_site(s, changed_plan(s, "roster", coordinator_key="7" * 64)), "coordinator_fingerprint"),
    ("plan that expired", lambda s: at_a_site(s, s.plan.model_copy(update={"expires": s.plan.expires.replace(year=2020)})), "expired"),  # type: ignore[union-attr]
    # the gate
    ("verdict missing", lambda s: at_the_gate(s, **verdicts(s, "beta", None)), "verdicts-present: none from beta"),
    ("verdict unsigned", lambda s: at_the_gate(s, **verdicts(s, "beta", unsigned(s.inputs.verdicts["beta"]))), "verdicts-present: verdict of beta"),
    ("verdict signed by another site", lambda s: at_the_gate(s, **verdicts(s, "beta", s.inputs.verdicts["alpha"])), "verdict of beta: no valid signature"),
    ("verdict of another candidate", lambda s: at_the_gate(s, **verdicts(s, "beta", signed_verdict(s, "beta", candidate_sha256="9" * 64))), "the verdict of beta is about candidate 9999"),
    ("verdict of an earlier audit replayed", lambda s: at_the_gate(s, **verdicts(s, "beta", signed_verdict(s, "beta", attempt=7))), "the verdict of beta is about attempt 7"),
    ("verdict of an earlier run replayed", lambda s: at_the_gate(s, **verdicts(s, "beta", signed_verdict(s, "beta", run_id="run-0"))), "audit-once"),
    ("verdict that its counts do not give", lambda s: at_the_gate(s, **verdicts(s, "beta", flattered(s, "beta"))), "does not follow from its counts"),
    ("veto passed over", lambda s: at_the_gate(s, **verdicts(s, "gamma", signed_verdict(s, "gamma", veto=True))), "no-veto: vetoed by gamma"),
    ("control out of its interval", lambda s: at_the_gate(s, **verdicts(s, "beta", signed_verdict(s, "beta", planted_leak=PlantedLeak(auc=0.5, n_planted=16, n_fresh=16)))), "audit-control-planted-leak: invalid"),
    ("audit that saw eight held-out patients", lambda s: at_the_gate(s, **of_eight(s)), "at least 0.5 is asked: too blind; the plan refuses that"),
    ("candidate changed after the audit", lambda s: at_the_gate(s, candidate_sha256="9" * 64), "verdicts-candidate"),
    ("autoencoder exchanged", lambda s: at_the_gate(s, autoencoder_sha256="9" * 64), "public-parts"),
    ("audit repeated until it passes", lambda s: at_the_gate(s, **second_audit(s, recorded=True)), "2 audits were completed; an audit is not repeated"),
    ("first audit struck from the record", lambda s: at_the_gate(s, **second_audit(s, recorded=False)), "charged attempt 100, which was not opened"),
    ("ledger edited", lambda s: at_the_gate(s, **ledger(s, edited(s.inputs.ledgers["alpha"]))), "ledgers-verify: ledger of alpha"),
    ("ledger begun anew without its charges", lambda s: at_the_gate(s, **ledger(s, fresh_ledger(s, records=attempt_records()[3:]))), "alpha did not charge attempt 1"),
    ("ledger that claims more noise", lambda s: at_the_gate(s, **ledger(s, fresh_ledger(s, event=lambda _, e: replace(e, noise_multiplier_world=2 * e.noise_multiplier_world)))), "charges-mechanism: alpha"),
    ("old copy of a ledger", lambda s: at_the_gate(s, **newer_head(s)), "ledgers-fresh"),
    ("round skipped", lambda s: at_the_gate(s, attempts=tuple(r for r in attempt_records() if r.attempt != 4)), "1 rounds missing"),
    ("policy weakened after training", lambda s: at_the_gate(s, **under_another_plan(s, max_auc=0.95)), "charged under plan"),
    ("blindness accepted after training", lambda s: at_the_gate(s, **under_another_plan(s, low_power="accept")), "approves another plan"),
    ("epsilon raised after training", lambda s: at_the_gate(s, **re_signed(s, changed_plan(s, "privacy", epsilon=50.0))), "belongs to another plan"),
    ("plan approval of another plan", lambda s: at_the_gate(s, plan_approvals={**s.inputs.plan_approvals, "beta": approve_plan(changed_plan(s, "privacy", rounds=3), key=s.keys["beta"], site_id="beta")}), "plan-approved"),  # type: ignore[dict-item]
    ("decision after the plan's last day", lambda s: at_the_gate(s, at=AFTER_THE_LAST_DAY), "the plan expired on 2099-12-31"),
    ("decision without a time", lambda s: at_the_gate(s, at=""), "states no time"),
    # the release
    ("refusal released", lambda s: at_the_release(s, **approvals(s, decision=s.signed_decision(refused_decision(s)))), "the gate refused: no-veto"),
    ("approval of another decision", lambda s: at_the_release(s, decision=s.signed_decision(), approvals=s.approvals(s.signed_decision(s.decide(plan_approvals=None)))), "it approves another gate decision"),
    ("approval replayed for a later decision", lambda s: at_the_release(s, decision=sign_decision(s.decide(at="2026-02-01T00:00:00Z"), s.coordinator, at="2026-02-01T00:00:00Z"), approvals=s.approvals(s.signed_decision())), "it approves another gate decision"),
    ("one site approving twice", lambda s: at_the_release(s, **approvals(s, *[approval(s, s.signed_decision(), "alpha")] * 2, approval(s, s.signed_decision(), "officer"), decision=s.signed_decision())), "1 sites (alpha)"),
    ("coordinator approving as the officer", lambda s: at_the_release(s, **approvals(s, *s.approvals(s.signed_decision())[:2], approval(s, s.signed_decision(), "officer", key="coordinator"), decision=s.signed_decision())), "signed by nobody of this study"),
    ("site approving as the officer", lambda s: at_the_release(s, **approvals(s, *s.approvals(s.signed_decision())[:2], approval(s, s.signed_decision(), "officer", key="gamma"), decision=s.signed_decision())), "signed in the name of somebody else"),
    ("officer passed over", lambda s: at_the_release(s, **approvals(s, *s.approvals(s.signed_decision())[:2], decision=s.signed_decision())), "no officer"),
    ("approval that expired with the plan", lambda s: at_the_release(s, **approvals(s, *s.approvals(s.signed_decision())[:2], approval(s, s.signed_decision(), "officer", at=AFTER_THE_LAST_DAY), decision=s.signed_decision())), "approval by officer: of 2100-01-01"),
    ("approval without a time", lambda s: at_the_release(s, **approvals(s, *s.approvals(s.signed_decision())[:2], approval(s, s.signed_decision(), "officer", at=None), decision=s.signed_decision())), "it states no time"),
    ("evidence exchanged after the decision", lambda s: at_the_release(s, **ledger(s, fresh_ledger(s))), "not the one that the gate decided on"),
    ("lie of the coordinator, approved unread", lambda s: at_the_release(s, **lying_decision(s)), "gate no-veto"),
    # whoever verifies the bundle
    ("withdrawn bundle", lambda s: at_verification(s, lambda p: withdrawn(s, p)), "withdrawn on 2026-01-31T12:00:00Z: mislabelled scans"),
    ("log from before the withdrawal", lambda s: at_verification(s, lambda p: log_before_the_withdrawal(s, p)), "its end is cut off"),
    ("bundle that no log knows", lambda s: at_verification(s, unlogged), "never released by this coordinator"),
    ("weights exchanged, sealed again", lambda s: at_verification(s, lambda p: swapped_weights(s, p)), "another candidate (changed after the audit?)"),
    ("file added, sealed again", lambda s: at_verification(s, lambda p: resealed_with(s, p, "attestations/verdicts/delta.dsse.json", b"{}")), "attestations/verdicts/delta.dsse.json was not before the gate"),
    ("sealed after the plan's last day", lambda s: at_verification(s, lambda p: reseal(p, s, at=AFTER_THE_LAST_DAY)), "release: of 2100-01-01"),
    ("bundle of somebody else's study", lambda s: at_verification(s, lambda p: {"trusted_coordinator": SigningKey.generate().verify_key.hex()}), "wrong coordinator"),
]  # fmt: skip


def beside(study: Study, kind: str, site: str, data: bytes | None) -> dict[str, Any]:
    kept = {**study.inputs.site_evidence[kind], site: data}
    given = {name: value for name, value in kept.items() if value is not None}
    return {"site_evidence": {**study.inputs.site_evidence, kind: given}}


def opening(study: Study, site: str, **changes: Any) -> dict[str, Any]:
    made = make_opening(study.keys, study.plan, site, study.inputs.candidate_sha256, **changes)
    return beside(study, "canary-openings", site, made)


def mechanism(study: Study, site: str, **changes: Any) -> dict[str, Any]:
    return beside(study, "mechanism-audits", site, make_mechanism(study.keys, study.plan, site, **changes))


def under_a_kinder_plan(study: Study) -> bytes:
    """A mechanism audit of a plan that claims less noise, passed to the letter."""
    return make_mechanism(study.keys, changed_plan(study, "privacy", noise_multiplier=1.0), "beta")


def every_coin_shown(study: Study) -> dict[str, Any]:
    """All sites' canaries lie open in the candidate; the plan promised a small epsilon."""
    shown = tuple(1.0 if coin else -1.0 for coin in COINS)
    made = {
        site: make_opening(study.keys, study.plan, site, study.inputs.candidate_sha256, scores=shown)
        for site in SITES
    }
    return {"site_evidence": {**study.inputs.site_evidence, "canary-openings": made}}


def hidden_leak(study: Study) -> dict[str, Any]:
    """Counts in which the pooled secondary attack alone sees the members; the verdicts say so."""
    counts = honest_counts(study.plan, secondary_leak=True)
    return {"verdicts": {site: signed_verdict(study, site, pooled_counts=counts) for site in SITES}}


def of_eight(study: Study) -> dict[str, Any]:
    """An honest audit of 16 members and 8 held-out patients: it would see next to nothing."""
    layout = CountsLayout.from_plan(study.plan)
    s, c = layout.score_bins, layout.control_bins
    cells = np.zeros(layout.length, dtype=int)
    for block, each in ((0, 4), (1, 4), (2, 4)):
        cells[block * s + 1] = cells[block * s + 3] = each * PRIMARY_WEIGHT
    cells[3 * s + 1], cells[3 * s + c + 1] = 16 * CONTROL_WEIGHT, 8 * CONTROL_WEIGHT
    counts = tuple(int(cell) for cell in cells)
    return {"verdicts": {site: signed_verdict(study, site, pooled_counts=counts) for site in SITES}}


def without_commitment(study: Study) -> dict[str, Any]:
    return ledger(study, fresh_ledger(study))


ASKING_ATTEMPTS: list[Attempt] = [
    ("mechanism audit missing", lambda s: at_the_gate(s, **beside(s, "mechanism-audits", "beta", None)), "mechanism-audits: no mechanism audit of beta"),
    ("mechanism audit unsigned", lambda s: at_the_gate(s, **beside(s, "mechanism-audits", "beta", unsigned(make_mechanism(s.keys, s.plan, "beta")))), "mechanism-audits: mechanism audit of beta"),
    ("mechanism audit of another site", lambda s: at_the_gate(s, **beside(s, "mechanism-audits", "beta", s.inputs.site_evidence["mechanism-audits"]["alpha"])), "mechanism audit of beta: no valid signature"),
    ("mechanism audit in another's name", lambda s: at_the_gate(s, **beside(s, "mechanism-audits", "beta", make_mechanism(s.keys, s.plan, "alpha", key="beta"))), "signed in the name of 'alpha'"),
    ("mechanism audit of a kinder plan", lambda s: at_the_gate(s, **beside(s, "mechanism-audits", "beta", under_a_kinder_plan(s))), "belongs to another plan"),
    ("mechanism audit with a handful of canaries", lambda s: at_the_gate(s, **mechanism(s, "beta", canaries=8)), "8 canaries, the plan asks for 100"),
    ("mechanism audit at a level that passes everything", lambda s: at_the_gate(s, **mechanism(s, "beta", level=0.0)), "spends less significance than an audit does"),
    ("mechanism audit that failed", lambda s: at_the_gate(s, **mechanism(s, "beta", broken=["share-variance"])), "this is not the plan's mechanism: share-variance"),
    ("canaries not opened", lambda s: at_the_gate(s, **beside(s, "canary-openings", "gamma", None)), "canaries-committed: gamma did not open its canaries"),
    ("coins chosen after training", lambda s: at_the_gate(s, **opening(s, "gamma", coins=tuple(not coin for coin in COINS))), "not the coins that the ledger committed to"),
    ("coins that no ledger committed to", lambda s: at_the_gate(s, **without_commitment(s)), "commits to no coins before the first charge"),
    ("fewer canaries opened than planned", lambda s: at_the_gate(s, **opening(s, "gamma", coins=COINS[:4], scores=(0.0,) * 4)), "4 of them, the plan has 6"),
    ("canaries of another candidate", lambda s: at_the_gate(s, **opening(s, "gamma", candidate_sha256="9" * 64)), "about another candidate"),
    ("canaries of an earlier audit", lambda s: at_the_gate(s, **opening(s, "gamma", attempt=7)), "it is about attempt 7"),
    ("leak that a secondary attack alone sees", lambda s: at_the_gate(s, **hidden_leak(s)), "audit-secondary-attacks: fail: sima"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("attempt", "named"), [a[1:] for a in ASKING_ATTEMPTS], ids=[a[0] for a in ASKING_ATTEMPTS]
)
def test_refused_by_name_where_the_plan_asks_for_more(
    asking: Study, attempt: Callable[[Study], str], named: str
) -> None:
    assert named in attempt(asking)


def test_the_honest_study_that_asks_for_more_passes_every_door(asking: Study, tmp_path: Path) -> None:
    decision = asking.decide()
    assert decision.released, decision.failed
    assert decision.condition("audit-canaries").reason.startswith("9 of 18 coins guessed")
    path = asking.release(tmp_path / "bundle").path
    report = verify_bundle(path, trusted_coordinator=asking.coordinator.verify_key.hex())
    assert report.passed, report.failed
    assert (path / "attestations/mechanism-audits/beta.dsse.json").exists()
    shown = {check.name: check.detail for check in report.checks}
    assert shown["gate mechanism-audits"] == "3 installations pass the mechanism audit"
    assert shown["gate audit-canaries"] == decision.condition("audit-canaries").reason


@pytest.mark.parametrize(
    ("kind", "make", "condition"),
    [
        ("mechanism-audits", lambda s: make_mechanism(s.keys, s.plan, "beta", broken=["clipping"]), "mechanism-audits"),
        ("canary-openings", lambda s: make_opening(s.keys, s.plan, "beta", s.inputs.candidate_sha256, coins=COINS[::-1]), "canaries-committed"),
    ],
)  # fmt: skip
def test_the_officer_finds_what_a_lying_gate_let_pass(
    asking: Study, kind: str, make: Callable[[Study], bytes], condition: str
) -> None:
    """The coordinator signs "release, all passed" over a broken installation, or over coins chosen later."""
    broken = {**asking.inputs.site_evidence[kind], "beta": make(asking)}
    inputs = replace(asking.inputs, site_evidence={**asking.inputs.site_evidence, kind: broken})
    honest = asking.decide()
    lie = GateDecision(inputs=inputs, conditions=honest.conditions, spending=honest.spending)
    words = at_the_release(asking, decision=asking.signed_decision(lie), site_evidence=inputs.site_evidence)
    assert f"gate {condition}" in words


def test_canaries_that_lie_open_refute_a_small_promise(tmp_path: Path) -> None:
    """18 coins, all of them guessed: possible with epsilon 8, not with epsilon 0.5 (mu 0.14)."""
    tight = make_study(tmp_path, audit={**ASKING, "canaries_per_site": len(COINS)}, epsilon=0.5)
    assert tight.decide().condition("audit-canaries").passed
    decision = tight.decide(**every_coin_shown(tight))
    condition = decision.condition("audit-canaries")
    assert not condition.passed and condition.reason.startswith("18 of 18 coins guessed")
    assert "more than the promise allows" in condition.reason


def test_the_list_is_long_enough_and_every_attempt_has_a_name_of_its_own() -> None:
    names = [name for name, _, _ in (*ATTEMPTS, *ASKING_ATTEMPTS)]
    assert len(names) == len(set(names)) >= 25


def test_the_honest_study_passes_every_door(study: Study, tmp_path: Path) -> None:
    """So what is refused below is refused for the cheat alone."""
    assert study.decide().released
    log = tmp_path / "log.jsonl"
    path = study.release(tmp_path / "bundle", log_path=log).path
    assert verify_bundle(path, log=log, trusted_coordinator=study.coordinator.verify_key.hex()).passed
    reseal(path, study)
    assert verify_bundle(path).passed


@pytest.mark.parametrize(("attempt", "named"), [a[1:] for a in ATTEMPTS], ids=[a[0] for a in ATTEMPTS])
def test_refused_by_name(study: Study, attempt: Callable[[Study], str], named: str) -> None:
    assert named in attempt(study)


def test_who_approves_looks_at_the_day_of_their_own_clock(study: Study) -> None:
    for decision in (study.signed_decision(), late_decision(study)):
        with pytest.raises(LacunaError, match="the plan expired on 2099-12-31"):
            approve_decision(
                decision, plan=study.plan, key=study.keys["officer"], role="officer", at=AFTER_THE_LAST_DAY
            )
    with pytest.raises(LacunaError, match="gate was evaluated at"):
        sign_decision(evaluate_gate(study.inputs), study.coordinator, at="2026-03-01T00:00:00Z")
