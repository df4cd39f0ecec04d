"""The gate's conditions, one function each: (passed, figure, bound, reason).

A function may raise: :func:`server.release.gate.evaluate_gate` counts that as a failure of its condition.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

from privacy.audit.verdict import CONDITIONS as AUDIT_CONDITIONS
from privacy.audit.verdict import SECONDARY
from privacy.compliance.approvals import check_plan_approval
from privacy.compliance.validity import signed_day
from privacy.dp.accounting import PrivacyEvent
from privacy.dp.execution_plan import ExecutionPlan, check_plan
from privacy.ledger_chain import read_export
from server.release.gate_evidence import GateEvidence
from server.release.site_evidence_conditions import (
    canaries_committed,
    canaries_guessed,
    mechanism_audits,
)
from shared.attestation import open_statement
from shared.errors import LacunaError
from shared.identity import VerifyKey
from shared.plan_package import PLAN_PREDICATE
from shared.study_plan import StudyPlan

Result = tuple[bool, str, str, str]
"""(passed, figure, bound, reason or remark)."""

TITLES = {
    "plan-signed": "The plan is signed by its coordinator",
    "plan-approved": "Every site approved this plan",
    "plan-sound": "The plan's noise keeps the promised epsilon, ranges cannot wrap",
    "plan-in-force": "The plan had not expired when the gate decided",
    "ledgers-present": "A ledger from every site",
    "ledgers-verify": "Every ledger is signed by its site and its chain holds",
    "ledgers-fresh": "No ledger is older than one seen before",
    "ledgers-of-plan": "Every charge of the study is under this plan",
    "charges-mechanism": "Every charge is that of the plan's mechanism",
    "budget": "Epsilon of training and audit, recomputed from the ledgers",
    "attempts-within": "No site charged more attempts than the plan allows",
    "attempts-charged": "Every completed attempt is charged at every site that took part",
    "attempts-known": "Every charge belongs to an attempt that was opened",
    "rounds-complete": "All rounds of the plan were completed, once each",
    "public-parts": "The autoencoder is the public one that the plan names",
    "audit-once": "One audit was completed, and the verdicts are about it",
    "verdicts-present": "A verdict signed by every site that took part in the audit",
    "verdicts-candidate": "Every verdict is about this candidate",
    "verdicts-agree": "All verdicts rest on the same pooled counts",
    "verdicts-recomputed": "Every verdict follows from its counts",
    "audit-membership-attack": "Membership attack: telling patients trained on from held-out ones",
    "audit-power": "Power: chance that the audit would see a strong leak",
    "audit-control-public-loss": "Control: plain loss of the public model tells nothing",
    "audit-control-members": "Control: members against members tell nothing",
    "audit-control-planted-leak": "Control: a planted leak is seen",
    "audit-copies": "Copies: patients whom a generated scan comes too close to",
    "audit-secondary-attacks": "Secondary membership attacks whose counts the plan pools",
    "mechanism-audits": "Mechanism audit: every installation clips and noises as the plan says",
    "canaries-committed": "In-run canaries: coins fixed before training, and opened",
    "audit-canaries": "In-run canaries: no more coins guessed than the promise allows",
    "no-veto": "No site vetoes",
}
"""Every condition, in the order in which it is listed."""

_ASKED_FOR: dict[str, Callable[[StudyPlan], bool]] = {
    "audit-secondary-attacks": lambda plan: bool(plan.audit.pooled_attacks),
    "mechanism-audits": lambda plan: plan.audit.mechanism_canaries > 0,
    "canaries-committed": lambda plan: plan.audit.canaries_per_site > 0,
    "audit-canaries": lambda plan: plan.audit.canaries_per_site > 0,
}


def conditions_of(plan: StudyPlan) -> dict[str, str]:
    """Names and titles of the conditions of this plan's gate, without those that it does not ask for."""
    return {name: title for name, title in TITLES.items() if name not in _ASKED_FOR or _ASKED_FOR[name](plan)}


_AUDIT_BOUNDS = {
    "membership_attack": "AUC interval neither above {0:.4g} nor below 1 - {0:.4g}",
    "power": ">= {:.4g}",
    "control_public_loss": "interval contains {:.4g}",
    "control_members": "interval contains {:.4g}",
    "control_planted_leak": "p <= {:.4g}",
    "copies": "lower end <= {:.4g} patients",
    SECONDARY: "AUC intervals neither above {0:.4g} nor below 1 - {0:.4g}",
}


def _plan_signed(e: GateEvidence) -> Result:
    statement = open_statement(
        e.inputs.plan_envelope,
        key=VerifyKey.from_hex(e.plan.roster.coordinator_key),
        predicate_type=PLAN_PREDICATE,
        what="plan.dsse.json",
    )
    digests = {subject.sha256 for subject in statement.subjects}
    same = statement.predicate.get("plan_sha256") == e.plan_sha256 and digests == {
        hashlib.sha256(e.plan.canonical()).hexdigest()
    }
    return same, f"plan {e.plan_sha256[:16]}", "signed", "" if same else "the signature is for another plan"


def _plan_approved(e: GateEvidence) -> Result:
    bound = f"{len(e.sites)} sites"
    if e.inputs.plan_approvals is None:
        own = [s for s in e.all_ledgers() if e.charges(s)]
        missing = [s for s in e.sites if s not in own]
        remark = "approvals not collected; implied by charges under this plan in signed ledgers"
        return _each(missing, len(own), bound, f"no charge by {', '.join(missing)}", remark)
    faults = []
    for site_id in e.sites:
        try:
            check_plan_approval(e.inputs.plan_approvals[site_id], plan=e.plan, site_id=site_id)
        except KeyError:
            faults.append(f"{site_id} did not approve")
        except LacunaError as error:
            faults.append(error.message)
    return _each(faults, len(e.sites) - len(faults), bound)


def _plan_sound(e: GateEvidence) -> Result:
    execution = check_plan(e.plan)
    planned = execution.planned_epsilon().reported
    return True, f"epsilon {planned:.4g} at most", f"<= {_words_epsilon(e.plan.privacy.epsilon)}", ""


def _plan_in_force(e: GateEvidence) -> Result:
    if e.plan.expires is None:
        return True, e.inputs.at or "no time", "no last day", ""
    day = signed_day(e.inputs.at, what="gate decision")
    last = e.plan.expires.isoformat()
    late = e.plan.expired(day)
    return not late, day.isoformat(), f"<= {last}", f"the plan expired on {last}" if late else ""


def _ledgers_present(e: GateEvidence) -> Result:
    missing = [site_id for site_id in e.sites if site_id not in e.inputs.ledgers]
    strange = sorted(set(e.inputs.ledgers) - set(e.sites))
    faults = [f"none from {s}" for s in missing] + [
        f"one from {s}, who is not in the roster" for s in strange
    ]
    return _each(faults, len(e.sites) - len(missing), f"{len(e.sites)} sites")


def _ledgers_verify(e: GateEvidence) -> Result:
    faults = list(e.ledger_faults.values())
    faults += [f"none from {s}" for s in e.sites if s not in e.inputs.ledgers]
    return _each(faults, len(e.ledgers), f"{len(e.sites)} sites")


def _ledgers_fresh(e: GateEvidence) -> Result:
    faults, checked = [], 0
    for site_id, heads in e.inputs.seen_heads.items():
        checked += len(heads)
        try:
            entry = e.plan.site(site_id)
            read_export(
                e.inputs.ledgers[site_id], entry.verify_key, known_heads=heads, what=f"ledger of {site_id}"
            )
        except KeyError:
            faults.append(f"no ledger of {site_id}")
        except LacunaError as error:
            faults.append(error.message)
    e.all_ledgers()
    remark = "" if checked else "no receipts were given; completed attempts must still all be charged"
    return not faults, f"{checked} receipts", "all continued", "; ".join(faults) or remark


def _ledgers_of_plan(e: GateEvidence) -> Result:
    faults = [
        f"{site_id}, entry {entry.sequence}: charged under plan {entry.body.get('plan_sha256', '')[:16]}"
        for site_id in e.all_ledgers()
        for entry in e.charges(site_id)
        if entry.body.get("plan_sha256") != e.plan_sha256
    ]
    total = sum(len(e.charges(site_id)) for site_id in e.sites)
    if not total:
        faults.append("no charge at all")
    return not faults, f"{total} charges", f"plan {e.plan_sha256[:16]}", "; ".join(faults[:5])


def _charges_mechanism(e: GateEvidence) -> Result:
    execution = ExecutionPlan.from_study_plan(e.plan)
    expected = {"train": execution.training_event(), "audit": execution.audit_event()}
    faults = [
        f"{site_id}, entry {entry.sequence}: another event than the plan's {entry.body['purpose']} attempt"
        for site_id in e.all_ledgers()
        for entry in e.charges(site_id)
        if not _same_event(entry.event, expected[entry.body["purpose"]])
    ]
    mode = e.plan.privacy.mode
    return not faults, f"mode {mode}", "as planned", "; ".join(faults[:5])


def _same_event(charged: PrivacyEvent, expected: PrivacyEvent) -> bool:
    """Equal up to rounding on another machine's mathematics library."""
    first, second = charged.to_dict(), expected.to_dict()
    return all(
        math.isclose(value, second[name], rel_tol=1e-9) if isinstance(value, float) else value == second[name]
        for name, value in first.items()
    )


def _budget(e: GateEvidence) -> Result:
    e.all_ledgers()
    promised = e.plan.privacy.epsilon
    reports = {site_id: e.epsilons[site_id][0] for site_id in e.sites}
    worst = max(reports, key=lambda site_id: reports[site_id].reported)
    value = reports[worst].reported
    over = [
        f"{s}: {_words_epsilon(r.reported)}"
        for s, r in reports.items()
        if promised is None or not r.reported <= promised
    ]
    reason = "" if not over else f"over the promise: {', '.join(over)}"
    if promised is None:
        reason = "mode unprotected promises nothing, so nothing can be released; " + reason
    elif not over:
        second = reports[worst].second
        reason = f"largest at {worst}; accountants: {reports[worst].pld:.4f}" + (
            f" and {second:.4f}" if second is not None else f", Renyi bound {reports[worst].rdp:.4f}"
        )
    limit = "finite" if promised is None else f"<= {_words_epsilon(promised)}"
    bound = f"{limit} at delta {e.plan.privacy.delta:g}"
    return not over, f"epsilon {_words_epsilon(value)}", bound, reason


def _attempts_within(e: GateEvidence) -> Result:
    limits = {"train": e.plan.privacy.max_attempts, "audit": e.plan.privacy.max_audit_attempts}
    faults, most = [], {"train": 0, "audit": 0}
    for site_id in e.all_ledgers():
        for purpose, limit in limits.items():
            count = len(e.charges(site_id, purpose))
            most[purpose] = max(most[purpose], count)
            if count > limit:
                faults.append(f"{site_id} charged {count} {purpose} attempts")
    figure = f"train {most['train']}, audit {most['audit']}"
    return not faults, figure, f"train <= {limits['train']}, audit <= {limits['audit']}", "; ".join(faults)


def _attempts_charged(e: GateEvidence) -> Result:
    ledgers = e.all_ledgers()
    charged = {
        site_id: {(x.body["attempt"], x.body["purpose"], x.body["round"]) for x in e.charges(site_id)}
        for site_id in ledgers
    }
    faults, total = [], 0
    for record in (*e.completed("train"), *e.completed("audit")):
        for site_id in record.survivors:
            total += 1
            if (record.attempt, record.purpose, record.round) not in charged.get(site_id, set()):
                faults.append(f"{site_id} did not charge attempt {record.attempt}")
    if not total:
        faults.append("no attempt was completed")
    return not faults, f"{total - len(faults)} of {total}", "all", "; ".join(faults[:5])


def _attempts_known(e: GateEvidence) -> Result:
    opened = {
        (record.attempt, record.purpose): record
        for record in e.inputs.attempts
        if record.status not in ("prepared", "void")
    }
    faults, total = [], 0
    for site_id in e.all_ledgers():
        for entry in e.charges(site_id):
            total += 1
            record = opened.get((entry.body["attempt"], entry.body["purpose"]))
            if record is None or site_id not in record.participants:
                faults.append(
                    f"{site_id} charged attempt {entry.body['attempt']}, which was not opened for it"
                )
    return not faults, f"{total - len(faults)} of {total}", "all", "; ".join(faults[:5])


def _rounds_complete(e: GateEvidence) -> Result:
    rounds = e.plan.privacy.rounds
    done = [record.round for record in e.completed("train")]
    faults = []
    missing = sorted(set(range(1, rounds + 1)) - set(done))
    if missing:
        faults.append(f"{len(missing)} rounds missing, the first is {missing[0]}")
    if len(set(done)) != len(done) or not set(done) <= set(range(1, rounds + 1)):
        faults.append("a round was completed twice, or is not in the plan")
    few = [r.attempt for r in e.completed("train") if len(r.survivors) < e.plan.secure_aggregation.threshold]
    if few:
        faults.append(f"attempt {few[0]} was completed by fewer sites than the threshold")
    return not faults, f"{len(set(done))} rounds", f"{rounds} rounds", "; ".join(faults)


def _public_parts(e: GateEvidence) -> Result:
    named = e.plan.model.autoencoder_sha256
    same = e.inputs.autoencoder_sha256 == named
    reason = "" if same else "another autoencoder than the plan's"
    return same, e.inputs.autoencoder_sha256[:16], named[:16], reason


def _audit_once(e: GateEvidence) -> Result:
    done = e.completed("audit")
    faults = [] if len(done) == 1 else [f"{len(done)} audits were completed; an audit is not repeated"]
    if not e.verdicts:
        faults.append("there is no valid verdict")
    for site_id, verdict in e.verdicts.items():
        if done and (verdict.attempt, verdict.run_id) != (done[-1].attempt, done[-1].run_id):
            faults.append(f"the verdict of {site_id} is about attempt {verdict.attempt}")
    return not faults, f"{len(done)} completed", "1", "; ".join(faults)


def _verdicts_present(e: GateEvidence) -> Result:
    done = e.completed("audit")
    needed = list(done[-1].survivors) if done else e.sites
    faults = [f"none from {s}" for s in needed if s not in e.inputs.verdicts]
    faults += list(e.verdict_faults.values())
    faults += [f"one from {s}, who is not in the roster" for s in set(e.inputs.verdicts) - set(e.sites)]
    threshold = e.plan.secure_aggregation.threshold
    if len(e.verdicts) < threshold:
        faults.append(f"{len(e.verdicts)} valid verdicts are fewer than the threshold {threshold}")
    return not faults, f"{len(e.verdicts)} valid", f"{len(needed)} sites", "; ".join(faults)


def _verdicts_candidate(e: GateEvidence) -> Result:
    faults = [
        f"the verdict of {site_id} is about candidate {verdict.candidate_sha256[:16]}"
        for site_id, verdict in e.verdicts.items()
        if verdict.candidate_sha256 != e.inputs.candidate_sha256
    ]
    if not e.verdicts:
        faults.append("there is no valid verdict")
    return not faults, f"candidate {e.inputs.candidate_sha256[:16]}", "the same", "; ".join(faults)


def _verdicts_agree(e: GateEvidence) -> Result:
    kinds = {(v.pooled_counts, v.survivors, v.attempt, v.run_id) for v in e.verdicts.values()}
    faults = [] if len(kinds) == 1 else [f"{len(kinds)} different sets of pooled counts"]
    done = e.completed("audit")
    for site_id, verdict in e.verdicts.items():
        if not done or set(verdict.survivors) != set(done[-1].survivors):
            faults.append(f"the verdict of {site_id} names other contributors than the coordinator's record")
    return not faults, f"{len(kinds)} sets of counts", "1", "; ".join(faults)


def _verdicts_recomputed(e: GateEvidence) -> Result:
    if not e.verdicts:
        return False, "0", "all", "there is no valid verdict"
    faults = []
    for verdict in e.verdicts.values():
        try:
            verdict.check(e.plan)
        except LacunaError as error:
            faults.append(error.message)
    return not faults, f"{len(e.verdicts) - len(faults)} of {len(e.verdicts)}", "all", "; ".join(faults)


def _no_veto(e: GateEvidence) -> Result:
    if not e.verdicts:
        return False, "not known", "0", "there is no valid verdict"
    vetoes = [site_id for site_id, verdict in e.verdicts.items() if verdict.veto]
    reason = f"vetoed by {', '.join(vetoes)}; a site need not say why" if vetoes else ""
    return not vetoes, str(len(vetoes)), "0", reason


def _audit_check(name: str) -> Callable[[GateEvidence], Result]:
    """The check of one condition of the audit, the worst of all sites' verdicts counting."""

    def check(evidence: GateEvidence) -> Result:
        found = {site_id: verdict.condition(name) for site_id, verdict in evidence.recomputed.items()}
        failing = [site_id for site_id, condition in found.items() if condition.status != "pass"]
        shown = found[failing[0] if failing else next(iter(found))]
        figure = "none" if shown.figure is None else f"{shown.figure:.4g}"
        if name == "control_planted_leak" and shown.figure == 0:
            figure = "p < 0.00001"
        if shown.low is not None and shown.high is not None:
            figure += f" ({shown.low:.4g} to {shown.high:.4g})"
        reason = shown.text if not failing else f"{shown.status}: {shown.text}"
        return not failing, figure, _AUDIT_BOUNDS[name].format(shown.bound), reason

    return check


def _each(faults: list[str], good: int, bound: str, reason: str | None = None, remark: str = "") -> Result:
    """A condition that every site must meet."""
    shown = "; ".join(faults) if reason is None else reason
    return not faults, f"{good} sites", bound, shown if faults else remark


def _words_epsilon(value: float | None) -> str:
    return "infinite" if value is None or math.isinf(value) else f"{value:.4g}"


CHECKS: dict[str, Callable[[GateEvidence], Result]] = {
    "plan-signed": _plan_signed,
    "plan-approved": _plan_approved,
    "plan-sound": _plan_sound,
    "plan-in-force": _plan_in_force,
    "ledgers-present": _ledgers_present,
    "ledgers-verify": _ledgers_verify,
    "ledgers-fresh": _ledgers_fresh,
    "ledgers-of-plan": _ledgers_of_plan,
    "charges-mechanism": _charges_mechanism,
    "budget": _budget,
    "attempts-within": _attempts_within,
    "attempts-charged": _attempts_charged,
    "attempts-known": _attempts_known,
    "rounds-complete": _rounds_complete,
    "public-parts": _public_parts,
    "audit-once": _audit_once,
    "verdicts-present": _verdicts_present,
    "verdicts-candidate": _verdicts_candidate,
    "verdicts-agree": _verdicts_agree,
    "verdicts-recomputed": _verdicts_recomputed,
    "mechanism-audits": mechanism_audits,
    "canaries-committed": canaries_committed,
    "audit-canaries": canaries_guessed,
    "no-veto": _no_veto,
    **{f"audit-{name.replace('_', '-')}": _audit_check(name) for name in (*AUDIT_CONDITIONS, SECONDARY)},
}
