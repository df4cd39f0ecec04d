"""The gate's conditions, evaluated again by the officer: other code, same evidence.

Ledgers are read by :mod:`privacy.compliance.ledger_check`, epsilon is computed by
:mod:`privacy.compliance.epsilon`, envelopes are opened by :mod:`privacy.compliance.dsse`; no code of the
server is used. Common with the sites and the server are the plan's schema (:mod:`shared.study_plan`), the
plan's arithmetic (:mod:`privacy.dp.execution_plan`: which event an attempt must charge) and the verdict's
formula (:mod:`privacy.audit.verdict`: figures from pooled counts).

What the officer has to take from the coordinator's signed decision is its record of attempts: which were
completed, by whom. Each is held against what the sites charged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from privacy.audit.verdict import PlantedLeak, PooledVerdict, compute_verdict
from privacy.compliance.asked_conditions import ASKED_FOR
from privacy.compliance.dsse import EvidenceError, SignedStatement, open_signed, sha256_hex
from privacy.compliance.epsilon import SpentEpsilon, spent_epsilon
from privacy.compliance.ledger_check import ChargedEvent, ChargeEntry, CheckedLedger, SeenHead, open_ledger
from privacy.compliance.validity import check_in_force
from privacy.dp.accounting import PrivacyEvent
from privacy.dp.execution_plan import ExecutionPlan, check_plan
from shared.errors import LacunaError
from shared.study_plan import StudyPlan

Status = Literal["pass", "fail", "unchecked"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at. ``detail`` says what was found, or what is wrong."""

    name: str
    status: Status
    detail: str

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "status": self.status, "detail": self.detail}


@dataclass(frozen=True, kw_only=True)
class RecordedAttempt:
    """An attempt as the coordinator's signed decision records it."""

    attempt: int
    run_id: str
    round: int
    purpose: str
    status: str
    participants: tuple[str, ...]
    survivors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Evidence as bytes, by site id, and the decision that was made on it."""

    plan: StudyPlan
    plan_envelope: bytes
    plan_approvals: Mapping[str, bytes]
    ledgers: Mapping[str, bytes]
    verdicts: Mapping[str, bytes]
    decision: Mapping[str, Any]
    candidate_sha256: str
    autoencoder_sha256: str
    seen_heads: Mapping[str, Sequence[SeenHead]] = field(default_factory=dict)
    site_evidence: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)


class OpenedEvidence:
    """The evidence, verified once. A ledger or verdict that does not verify is kept as its fault."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.plan = evidence.plan
        self.sites = tuple(entry.site_id for entry in evidence.plan.roster.sites)
        self.plan_sha256 = evidence.plan.digest().hex()
        self.ledgers: dict[str, CheckedLedger] = {}
        self.verdicts: dict[str, SignedStatement] = {}
        self.faults: dict[str, str] = {}
        for entry in evidence.plan.roster.sites:
            site = entry.site_id
            self._open(f"ledger {site}", self._open_ledger, site, entry.identity_key)
            self._open(f"verdict {site}", self._open_verdict, site, entry.identity_key)
        for kind, files in (("ledger", evidence.ledgers), ("verdict", evidence.verdicts)):
            for site in sorted(set(files) - set(self.sites)):
                self.faults[f"{kind} {site}"] = f"{kind} of {site}: not a site of this study"

    def _open(self, name: str, opener: Callable[[str, str], None], site: str, key: str) -> None:
        try:
            opener(site, key)
        except LacunaError as error:
            self.faults[name] = error.message

    def _open_ledger(self, site: str, key: str) -> None:
        data = self.evidence.ledgers.get(site)
        if data is None:
            raise EvidenceError(f"ledger of {site}: missing")
        self.ledgers[site] = open_ledger(
            data, key=key, what=f"ledger of {site}", seen=self.evidence.seen_heads.get(site, ())
        )

    def _open_verdict(self, site: str, key: str) -> None:
        data = self.evidence.verdicts.get(site)
        if data is None:
            return
        what = f"verdict of {site}"
        statement = open_signed(data, key=key, predicate_type="verdict/v1", what=what)
        predicate = statement.predicate
        if predicate.get("site_id") != site:
            raise EvidenceError(f"{what}: signed in the name of {predicate.get('site_id')!r}")
        if (
            predicate.get("plan_sha256") != self.plan_sha256
            or predicate.get("study_id") != self.plan.study_id
        ):
            raise EvidenceError(f"{what}: it is about another plan")
        if statement.subjects != {
            "candidate": predicate.get("candidate_sha256"),
            "plan": predicate.get("plan_sha256"),
        }:
            raise EvidenceError(f"{what}: subjects and predicate name different artefacts")
        self.verdicts[site] = statement

    @cached_property
    def attempts(self) -> tuple[RecordedAttempt, ...]:
        """The coordinator's record. Raises EvidenceError if it is malformed."""
        entries = self.evidence.decision.get("attempts")
        if not isinstance(entries, list):
            raise EvidenceError("gate decision: it records no attempts")
        try:
            return tuple(
                RecordedAttempt(
                    attempt=int(entry["attempt"]),
                    run_id=str(entry["run_id"]),
                    round=int(entry["round"]),
                    purpose=str(entry["purpose"]),
                    status=str(entry["status"]),
                    participants=tuple(str(site) for site in entry["participants"]),
                    survivors=tuple(str(site) for site in entry["survivors"]),
                )
                for entry in entries
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EvidenceError("gate decision: malformed record of attempts") from error

    def completed(self, purpose: str) -> list[RecordedAttempt]:
        return [a for a in self.attempts if a.purpose == purpose and a.status == "completed"]

    def charges(self, site: str) -> tuple[ChargeEntry, ...]:
        """Charges of this study. Raises EvidenceError where the ledger did not verify."""
        if site not in self.ledgers:
            raise EvidenceError(self.faults.get(f"ledger {site}", f"ledger of {site}: missing"))
        return self.ledgers[site].of_study(self.plan.study_id)

    @cached_property
    def spent(self) -> dict[str, tuple[SpentEpsilon, SpentEpsilon]]:
        """By site: against the world, and if all others collude."""
        delta = self.plan.privacy.delta
        found = {}
        for site in self.sites:
            events = [charge.event for charge in self.charges(site)]
            found[site] = (
                spent_epsilon(events, delta=delta, observer="world"),
                spent_epsilon(events, delta=delta, observer="colluding"),
            )
        return found

    @cached_property
    def recomputed(self) -> dict[str, PooledVerdict]:
        """By site: the verdict that the signed counts give. Raises EvidenceError."""
        if not self.verdicts:
            raise EvidenceError("there is no valid verdict")
        found = {}
        for site, statement in self.verdicts.items():
            predicate = statement.predicate
            counts, survivors = predicate.get("pooled_counts"), predicate.get("survivors")
            if not isinstance(counts, list) or any(type(n) is not int for n in counts):
                raise EvidenceError(f"verdict of {site}: pooled counts are not integers")
            if not isinstance(survivors, list) or any(type(name) is not str for name in survivors):
                raise EvidenceError(f"verdict of {site}: survivors are not site ids")
            planted = PlantedLeak.from_dict(predicate.get("planted_leak"))
            found[site] = compute_verdict(self.plan, counts, survivors, planted_leak=planted)
        return found


def recheck_conditions(opened: OpenedEvidence) -> list[Check]:
    """Evaluate every condition of the gate anew. Never raises: what cannot be evaluated has failed."""
    checks = []
    for name, evaluate in required_conditions(opened.plan).items():
        try:
            detail = evaluate(opened)
            checks.append(Check(name=f"gate {name}", status="pass", detail=detail))
        except LacunaError as error:
            checks.append(Check(name=f"gate {name}", status="fail", detail=error.message))
        except Exception as error:  # fail closed on evidence that breaks a check
            words = f"cannot be evaluated: {type(error).__name__}: {error}"[:300]
            checks.append(Check(name=f"gate {name}", status="fail", detail=words))
    return checks


def _require(faults: Sequence[str], good: str) -> str:
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise EvidenceError("; ".join(faults[:5]) + more)
    return good


def _plan_signed(o: OpenedEvidence) -> str:
    statement = open_signed(
        o.evidence.plan_envelope,
        key=o.plan.roster.coordinator_key,
        predicate_type="plan/v1",
        what="plan.dsse.json",
    )
    expected = {"study_id": o.plan.study_id, "plan_sha256": o.plan_sha256}
    if statement.predicate != expected or list(statement.subjects.values()) != [
        sha256_hex(o.plan.canonical())
    ]:
        raise EvidenceError("plan.dsse.json: it signs another plan than plan.json (plan altered)")
    return f"plan {o.plan_sha256[:16]} signed by the coordinator"


def _plan_approved(o: OpenedEvidence) -> str:
    given = o.evidence.plan_approvals
    if not given:
        faults = [f"{s} has no charge under this plan" for s in o.sites if not o.charges(s)]
        return _require(faults, "no separate approvals; implied by the sites' signed charges under this plan")
    for entry in o.plan.roster.sites:
        site = entry.site_id
        if site not in given:
            raise EvidenceError(f"plan approval of {site}: missing")
        statement = open_signed(
            given[site],
            key=entry.identity_key,
            predicate_type="plan-approval/v1",
            what=f"plan approval of {site}",
        )
        if list(statement.subjects.values()) != [sha256_hex(o.plan.canonical())] or statement.predicate != {
            "study_id": o.plan.study_id,
            "plan_sha256": o.plan_sha256,
            "site_id": site,
        }:
            raise EvidenceError(f"plan approval of {site}: it approves another plan")
    return f"{len(o.sites)} sites approved"


def _plan_sound(o: OpenedEvidence) -> str:
    planned = check_plan(o.plan).planned_epsilon().reported
    return f"at most epsilon {planned:.4g} when every allowed attempt is charged"


def _plan_in_force(o: OpenedEvidence) -> str:
    check_in_force(o.plan, o.evidence.decision.get("evaluated_at"), what="gate decision")
    return "no last day" if o.plan.expires is None else f"until {o.plan.expires.isoformat()}"


def _ledgers_present(o: OpenedEvidence) -> str:
    faults = [f"ledger of {s}: missing" for s in o.sites if s not in o.evidence.ledgers]
    faults += [f"ledger of {s}: not a site of this study" for s in set(o.evidence.ledgers) - set(o.sites)]
    return _require(faults, f"{len(o.sites)} ledgers")


def _ledgers_verify(o: OpenedEvidence) -> str:
    faults = [fault for name, fault in o.faults.items() if name.startswith("ledger ")]
    return _require(faults, f"{len(o.ledgers)} ledgers: signatures hold, chains recomputed")


def _ledgers_fresh(o: OpenedEvidence) -> str:
    faults = [fault for name, fault in o.faults.items() if name.startswith("ledger ")]
    receipts = sum(len(heads) for heads in o.evidence.seen_heads.values())
    return _require(
        faults,
        f"{receipts} receipts continued" if receipts else "no receipts given; see attempts-charged instead",
    )


def _ledgers_of_plan(o: OpenedEvidence) -> str:
    faults, total = [], 0
    for site in o.sites:
        for charge in o.charges(site):
            total += 1
            if charge.plan_sha256 != o.plan_sha256:
                faults.append(f"ledger of {site}: entry {charge.sequence} is charged under another plan")
    if not total:
        faults.append("no ledger has a charge of this study")
    return _require(faults, f"{total} charges, all under this plan")


def _charges_mechanism(o: OpenedEvidence) -> str:
    execution = ExecutionPlan.from_study_plan(o.plan)
    expected = {"train": execution.training_event(), "audit": execution.audit_event()}
    faults = [
        f"ledger of {site}: entry {charge.sequence} charges another event than the plan's {charge.purpose}"
        for site in o.sites
        for charge in o.charges(site)
        if not _same_event(charge.event, expected[charge.purpose]) or not _within_plan(charge, o.plan)
    ]
    return _require(faults, f"every charge is the plan's mechanism, mode {o.plan.privacy.mode}")


_EVENT_NUMBERS = ("sampling_rate", "noise_multiplier_world", "noise_multiplier_colluding", "max_divergence")


def _same_event(charged: ChargedEvent, expected: PrivacyEvent) -> bool:
    return (charged.kind, charged.steps) == (expected.kind, expected.steps) and all(
        math.isclose(getattr(charged, name), getattr(expected, name), rel_tol=1e-9)
        for name in (
            "sampling_rate",
            "noise_multiplier_world",
            "noise_multiplier_colluding",
            "max_divergence",
        )
    )


def _within_plan(charge: ChargeEntry, plan: StudyPlan) -> bool:
    """No charge claims more noise or fewer steps than the plan's own words say (no formula needed)."""
    event, privacy = charge.event, plan.privacy
    if privacy.mode == "unprotected":
        return event.kind == "unprotected/v1"
    train = charge.purpose == "train"
    noise = privacy.noise_multiplier if train else privacy.audit_noise_multiplier
    return (
        event.noise_multiplier_world <= noise * (1 + 1e-9)
        and event.noise_multiplier_colluding <= event.noise_multiplier_world * (1 + 1e-9)
        and event.steps == (privacy.local_steps if train else 1)
        and event.sampling_rate == (privacy.sampling_rate if train else 1.0)
    )


def _budget(o: OpenedEvidence) -> str:
    promised = o.plan.privacy.epsilon
    if promised is None:
        raise EvidenceError("the plan promises no epsilon (mode unprotected)")
    figures = {site: pair[0] for site, pair in o.spent.items()}
    faults = [
        f"{site} spent epsilon {figure.reported:.4g}, promised {promised:g}"
        for site, figure in figures.items()
        if not figure.reported <= promised
    ]
    worst = max(figures.values(), key=lambda figure: figure.reported)
    return _require(
        faults,
        f"epsilon {worst.reported:.4f} at most (accountants {worst.first:.4f} and {worst.second:.4f}, "
        f"{worst.second_is}) <= {promised:g} at delta {o.plan.privacy.delta:g}",
    )


def _attempts_within(o: OpenedEvidence) -> str:
    limits = {"train": o.plan.privacy.max_attempts, "audit": o.plan.privacy.max_audit_attempts}
    faults = []
    for site in o.sites:
        for purpose, limit in limits.items():
            count = sum(charge.purpose == purpose for charge in o.charges(site))
            if count > limit:
                faults.append(f"{site} charged {count} {purpose} attempts, the plan allows {limit}")
    return _require(faults, f"at most {limits['train']} for training, {limits['audit']} for the audit")


def _attempts_charged(o: OpenedEvidence) -> str:
    faults, total = [], 0
    by_site = {site: {(c.attempt, c.purpose, c.round) for c in o.charges(site)} for site in o.sites}
    for record in (*o.completed("train"), *o.completed("audit")):
        for site in record.survivors:
            total += 1
            if (record.attempt, record.purpose, record.round) not in by_site.get(site, set()):
                faults.append(f"{site} did not charge completed attempt {record.attempt}")
    if not total:
        faults.append("no attempt was completed")
    return _require(faults, f"{total} completed uploads, all charged")


def _attempts_known(o: OpenedEvidence) -> str:
    opened = {
        (a.attempt, a.purpose): set(a.participants)
        for a in o.attempts
        if a.status not in ("prepared", "void")
    }
    faults = [
        f"{site} charged attempt {charge.attempt}, which the coordinator does not record"
        for site in o.sites
        for charge in o.charges(site)
        if site not in opened.get((charge.attempt, charge.purpose), set())
    ]
    return _require(faults, "every charge belongs to a recorded attempt")


def _rounds_complete(o: OpenedEvidence) -> str:
    rounds = o.plan.privacy.rounds
    done = sorted(record.round for record in o.completed("train"))
    if done != list(range(1, rounds + 1)):
        raise EvidenceError(f"{len(set(done))} of {rounds} rounds completed, or one of them twice")
    few = [r for r in o.completed("train") if len(r.survivors) < o.plan.secure_aggregation.threshold]
    return _require(
        [f"attempt {r.attempt} was completed below the threshold" for r in few], f"{rounds} rounds"
    )


def _public_parts(o: OpenedEvidence) -> str:
    if o.evidence.autoencoder_sha256 != o.plan.model.autoencoder_sha256:
        raise EvidenceError("models/autoencoder.safetensors is not the one that the plan names")
    return "autoencoder as in the plan"


def _audit_once(o: OpenedEvidence) -> str:
    done = o.completed("audit")
    faults = [] if len(done) == 1 else [f"{len(done)} completed audits, exactly one is allowed"]
    faults += [
        f"verdict of {site}: about attempt {v.predicate.get('attempt')}, not the recorded audit"
        for site, v in o.verdicts.items()
        if not done
        or (v.predicate.get("attempt"), v.predicate.get("run_id")) != (done[-1].attempt, done[-1].run_id)
    ]
    return _require(faults, "one audit, and the verdicts are about it")


def _verdicts_present(o: OpenedEvidence) -> str:
    done = o.completed("audit")
    needed = done[-1].survivors if done else o.sites
    faults = [f"verdict of {site}: missing" for site in needed if site not in o.evidence.verdicts]
    faults += [fault for name, fault in o.faults.items() if name.startswith("verdict ")]
    if len(o.verdicts) < o.plan.secure_aggregation.threshold:
        faults.append(f"{len(o.verdicts)} valid verdicts are fewer than the threshold")
    return _require(faults, f"{len(o.verdicts)} verdicts, signed by their sites")


def _verdicts_candidate(o: OpenedEvidence) -> str:
    if not o.verdicts:
        raise EvidenceError("there is no valid verdict")
    faults = [
        f"verdict of {site}: about another candidate than models/denoiser.safetensors"
        for site, v in o.verdicts.items()
        if v.predicate.get("candidate_sha256") != o.evidence.candidate_sha256
    ]
    return _require(faults, f"all about candidate {o.evidence.candidate_sha256[:16]}")


def _verdicts_agree(o: OpenedEvidence) -> str:
    if not o.verdicts:
        raise EvidenceError("there is no valid verdict")
    kinds = {repr([v.predicate.get(k) for k in _COMMON_FIELDS]) for v in o.verdicts.values()}
    done = o.completed("audit")
    faults = [] if len(kinds) == 1 else ["verdicts rest on different pooled counts"]
    faults += [
        f"verdict of {site}: names other contributors than the coordinator's record"
        for site, v in o.verdicts.items()
        if not done or sorted(v.predicate.get("survivors", [])) != sorted(done[-1].survivors)
    ]
    return _require(faults, "the same pooled counts in all")


_COMMON_FIELDS = ("pooled_counts", "survivors", "attempt", "run_id")


def _verdicts_recomputed(o: OpenedEvidence) -> str:
    faults = [
        f"verdict of {site}: it does not follow from its counts"
        for site, verdict in o.recomputed.items()
        if o.verdicts[site].predicate.get("verdict") != verdict.to_dict()
    ]
    return _require(faults, f"{len(o.recomputed)} verdicts recomputed from counts")


def _audit_condition(name: str) -> Callable[[OpenedEvidence], str]:
    def evaluate(o: OpenedEvidence) -> str:
        found = {site: verdict.condition(name) for site, verdict in o.recomputed.items()}
        faults = [f"{site}: {c.status}: {c.text}" for site, c in found.items() if c.status != "pass"]
        return _require(faults, next(iter(found.values())).text)

    return evaluate


def _no_veto(o: OpenedEvidence) -> str:
    if not o.verdicts:
        raise EvidenceError("there is no valid verdict")
    faults = [f"{site} vetoes" for site, v in o.verdicts.items() if v.predicate.get("veto") is not False]
    return _require(faults, "no site vetoes")


REQUIRED_CONDITIONS: dict[str, Callable[[OpenedEvidence], str]] = {
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
    "audit-membership-attack": _audit_condition("membership_attack"),
    "audit-power": _audit_condition("power"),
    "audit-control-public-loss": _audit_condition("control_public_loss"),
    "audit-control-members": _audit_condition("control_members"),
    "audit-control-planted-leak": _audit_condition("control_planted_leak"),
    "audit-copies": _audit_condition("copies"),
    "no-veto": _no_veto,
}
"""What every gate decision must list, each as passed; a decision that leaves one out is refused."""

_ASKED_FOR: dict[str, tuple[Callable[[StudyPlan], bool], Callable[[OpenedEvidence], str]]] = {
    "audit-secondary-attacks": (
        lambda plan: bool(plan.audit.pooled_attacks),
        _audit_condition("secondary_attacks"),
    ),
    **ASKED_FOR,
}


def required_conditions(plan: StudyPlan) -> dict[str, Callable[[OpenedEvidence], str]]:
    """What a gate decision under this plan must list: the above, and what the plan asks for besides."""
    asked = {name: check for name, (wanted, check) in _ASKED_FOR.items() if wanted(plan)}
    return {**REQUIRED_CONDITIONS, **asked}
