"""Checking approvals: of the plan by sites, of one gate decision by sites and officer.

The officer's own code; signing is in :mod:`privacy.compliance.approvals`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from privacy.compliance.dsse import EvidenceError, SignedStatement, open_signed, sha256_hex
from privacy.compliance.validity import check_in_force
from shared.study_plan import StudyPlan

DECISION_PREDICATE = "gate-decision/v1"
APPROVAL_PREDICATE = "release-approval/v1"
PLAN_APPROVAL_PREDICATE = "plan-approval/v1"
DECISION_NAME = "attestations/gate-decision.dsse.json"
PLAN_NAME = "attestations/plan.json"


@dataclass(frozen=True, kw_only=True)
class ApprovalCount:
    """Who validly approved one decision.

    Attributes:
        sites: Site ids, in the roster's order, each at most once.
        officer: Whether the officer approved.
        rejected: One line for each file that is not a valid approval of this decision.
        needed_sites, needs_officer: What the plan asks for.
    """

    sites: tuple[str, ...]
    officer: bool
    rejected: tuple[str, ...]
    needed_sites: int
    needs_officer: bool

    @property
    def sufficient(self) -> bool:
        return len(self.sites) >= self.needed_sites and (self.officer or not self.needs_officer)

    @property
    def figure(self) -> str:
        officer = "officer approved" if self.officer else "no officer"
        return f"{len(self.sites)} sites ({', '.join(self.sites) or 'none'}), {officer}"

    @property
    def bound(self) -> str:
        return f">= {self.needed_sites} sites" + (" and the officer" if self.needs_officer else "")


def check_plan_approval(approval: bytes, *, plan: StudyPlan, site_id: str) -> None:
    """Verify that this site approved exactly this plan. Raises EvidenceError."""
    what = f"plan approval of site {site_id}"
    statement = open_signed(
        approval,
        key=plan.site(site_id).identity_key,
        predicate_type=PLAN_APPROVAL_PREDICATE,
        what=what,
    )
    expected = {"study_id": plan.study_id, "plan_sha256": plan.digest().hex(), "site_id": site_id}
    if statement.subjects != {PLAN_NAME: sha256_hex(plan.canonical())} or statement.predicate != expected:
        raise EvidenceError(f"{what}: it approves another plan")


def open_decision(decision: bytes, *, plan: StudyPlan) -> SignedStatement:
    """Verify a gate decision: the plan's coordinator signed it, and it is about this plan.

    Raises:
        EvidenceError: names what is wrong.
    """
    statement = open_signed(
        decision, key=plan.roster.coordinator_key, predicate_type=DECISION_PREDICATE, what="gate decision"
    )
    if statement.predicate.get("plan_sha256") != plan.digest().hex():
        raise EvidenceError("gate decision: it is about another plan")
    if statement.predicate.get("study_id") != plan.study_id:
        raise EvidenceError("gate decision: it is about another study")
    return statement


def failed_conditions(predicate: dict[str, Any]) -> list[str]:
    """Names of the conditions that a decision's predicate lists as not passed.

    Raises:
        EvidenceError: the list is empty or malformed.
    """
    conditions = predicate.get("conditions")
    if not isinstance(conditions, list) or not conditions:
        raise EvidenceError("gate decision: it lists no conditions")
    failed = []
    for entry in conditions:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise EvidenceError("gate decision: malformed condition")
        if entry.get("passed") is not True:
            failed.append(str(entry["name"]))
    return failed


def approval_file_name(approval: bytes, *, plan: StudyPlan) -> str:
    """``SITE.dsse.json`` or ``officer.dsse.json`` for a bundle: by who signed it. Raises EvidenceError."""
    site_id = _approver(approval, plan=plan).predicate.get("site_id")
    return f"site-{site_id}.dsse.json" if isinstance(site_id, str) else "officer.dsse.json"


def check_approvals(decision: bytes, approvals: Iterable[bytes], *, plan: StudyPlan) -> ApprovalCount:
    """Count the valid approvals of exactly this decision. Bad ones are listed, never raised."""
    target = sha256_hex(decision)
    sites: set[str] = set()
    officer = False
    rejected: list[str] = []
    for number, approval in enumerate(approvals, start=1):
        try:
            statement = _approver(approval, plan=plan)
            site_id = statement.predicate.get("site_id")
            who = "officer" if site_id is None else f"site {site_id}"
            if statement.subjects != {DECISION_NAME: target}:
                raise EvidenceError(f"approval by {who}: it approves another gate decision")
            if statement.predicate.get("decision") != "release":
                raise EvidenceError(f"approval by {who}: it does not say release")
            if statement.predicate.get("plan_sha256") != plan.digest().hex():
                raise EvidenceError(f"approval by {who}: it is about another plan")
            check_in_force(plan, statement.predicate.get("at"), what=f"approval by {who}")
            if site_id is None:
                officer = True
            else:
                sites.add(str(site_id))
        except EvidenceError as error:
            rejected.append(f"approval {number}: {error.message}")
    return ApprovalCount(
        sites=tuple(entry.site_id for entry in plan.roster.sites if entry.site_id in sites),
        officer=officer,
        rejected=tuple(rejected),
        needed_sites=plan.release.site_approvals,
        needs_officer=plan.release.officer_approval,
    )


def _approver(approval: bytes, *, plan: StudyPlan) -> SignedStatement:
    """Verify an approval under whichever roster key its statement claims; role and key must agree."""
    candidates: list[tuple[str | None, str]] = [(None, plan.roster.officer_key)]
    candidates += [(entry.site_id, entry.identity_key) for entry in plan.roster.sites]
    problem = "it is signed by nobody of this study"
    for site_id, key in candidates:
        try:
            statement = open_signed(approval, key=key, predicate_type=APPROVAL_PREDICATE, what="approval")
        except EvidenceError as error:
            if "wrong signer" not in error.message:
                problem = error.message
            continue
        role = "officer" if site_id is None else "site"
        if statement.predicate.get("role") != role or statement.predicate.get("site_id") != site_id:
            raise EvidenceError(f"the key of {site_id or 'the officer'} signed in the name of somebody else")
        return statement
    raise EvidenceError(problem)
