"""Conditions about what sites signed beside their verdicts, where the plan asks for it.

Each is (passed, figure, bound, reason), as in :mod:`server.release.gate_conditions`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from privacy.audit.canary_opening import (
    COMMITMENT_KIND,
    CanaryMismatchError,
    CanaryOpening,
    canary_verdict,
)
from privacy.audit.mechanism_statement import MechanismMismatchError
from privacy.audit.site_evidence import open_mechanism, open_opening
from privacy.ledger_chain import CHARGE
from server.release.gate_evidence import GateEvidence
from shared.errors import LacunaError

Result = tuple[bool, str, str, str]


def mechanism_audits(e: GateEvidence) -> Result:
    """Every site that took part shows that its installation is the plan's mechanism."""
    wanted, good, faults = e.plan.audit.mechanism_canaries, 0, _strangers(e, "mechanism-audits")
    for site_id in e.auditors():
        try:
            _check_mechanism(e, site_id)
            good += 1
        except LacunaError as error:
            faults.append(error.message)
    return not faults, f"{good} sites", f"all, {wanted} canaries or more", "; ".join(faults)


def _check_mechanism(e: GateEvidence, site_id: str) -> None:
    given = e.beside_verdicts("mechanism-audits")
    if site_id not in given:
        raise MechanismMismatchError(f"no mechanism audit of {site_id}")
    what, key = f"mechanism audit of {site_id}", e.plan.site(site_id).verify_key
    statement = open_mechanism(given[site_id], key=key, what=what)
    if statement.site_id != site_id:
        raise MechanismMismatchError(f"{what}: signed in the name of {statement.site_id!r}")
    statement.check(e.plan)
    wanted = e.plan.audit.mechanism_canaries
    if statement.canaries < wanted:
        raise MechanismMismatchError(f"{what}: {statement.canaries} canaries, the plan asks for {wanted}")
    broken = [check.name for check in statement.checks if not check.passed]
    if broken:
        raise MechanismMismatchError(f"{what}: this is not the plan's mechanism: {', '.join(broken)}")


def canaries_committed(e: GateEvidence) -> Result:
    """Every site that took part opens the coins that its ledger committed to before the first charge."""
    openings, faults = _openings(e)
    faults += _strangers(e, "canary-openings")
    count = sum(len(opening.coins) for opening in openings.values())
    return not faults, f"{count} canaries at {len(openings)} sites", "all sites", "; ".join(faults)


def canaries_guessed(e: GateEvidence) -> Result:
    """One-run test: no more coins can be guessed than the plan's promise allows."""
    openings, faults = _openings(e)
    verdict = canary_verdict(e.plan, openings)
    passed = not verdict.refuted and not faults
    figure = f"epsilon >= {verdict.epsilon_low:.4g}"
    bound = f"promise of {e.plan.privacy.epsilon} not refuted"
    return passed, figure, bound, "; ".join([verdict.text, *faults])


def _openings(e: GateEvidence) -> tuple[dict[str, CanaryOpening], list[str]]:
    openings, faults = {}, []
    for site_id in e.auditors():
        try:
            openings[site_id] = _check_opening(e, site_id)
        except LacunaError as error:
            faults.append(error.message)
    return openings, faults


def _check_opening(e: GateEvidence, site_id: str) -> CanaryOpening:
    given = e.beside_verdicts("canary-openings")
    if site_id not in given:
        raise CanaryMismatchError(f"{site_id} did not open its canaries")
    what, key = f"canary opening of {site_id}", e.plan.site(site_id).verify_key
    opening = open_opening(given[site_id], key=key, what=what)
    if opening.site_id != site_id:
        raise CanaryMismatchError(f"{what}: signed in the name of {opening.site_id!r}")
    if opening.candidate_sha256 != e.inputs.candidate_sha256:
        raise CanaryMismatchError(f"{what}: it is about another candidate")
    done = e.completed("audit")
    if not done or opening.attempt != done[-1].attempt:
        raise CanaryMismatchError(f"{what}: it is about attempt {opening.attempt}")
    opening.check(e.plan, committed=_committed(e, site_id))
    return opening


def _committed(e: GateEvidence, site_id: str) -> str | None:
    """The first commitment in the site's ledger, if it stands before the study's first charge."""
    if site_id not in e.ledgers:
        raise CanaryMismatchError(f"no valid ledger of {site_id}")
    about_study = partial(_is_about, e.plan.study_id)
    for entry in e.ledgers[site_id].entries:
        if entry.kind == CHARGE and entry.body["study_id"] == e.plan.study_id:
            return None
        if entry.kind == COMMITMENT_KIND and about_study(entry.body):
            commitment = entry.body["details"].get("commitment")
            return commitment if isinstance(commitment, str) else None
    return None


def _is_about(study_id: str, body: dict[str, Any]) -> bool:
    details = body.get("details")
    return isinstance(details, dict) and details.get("study_id") == study_id


def _strangers(e: GateEvidence, kind: str) -> list[str]:
    strange = sorted(set(e.beside_verdicts(kind)) - set(e.sites))
    return [f"one from {site_id}, who is not in the roster" for site_id in strange]
