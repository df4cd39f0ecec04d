"""Approvals: a site's signature over the plan, a site's or the officer's over one gate decision.

What is signed is the SHA-256 of the decision's bytes, so an approval can serve no other decision, candidate
or study. Whoever signs re-checks first that the decision is one of the plan's coordinator, for this plan,
that it says "release", and that each condition in it passed. This module runs without torch and without
the server's code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from privacy.compliance.dsse import EvidenceError, SignedStatement, open_signed, sha256_hex
from shared.attestation import Statement, Subject, sign_statement
from shared.errors import RefusedError, UsageError
from shared.identity import SigningKey
from shared.study_plan import StudyPlan

DECISION_PREDICATE = "gate-decision/v1"
APPROVAL_PREDICATE = "release-approval/v1"
PLAN_APPROVAL_PREDICATE = "plan-approval/v1"
PLAN_NAME = "attestations/plan.json"
DECISION_NAME = "attestations/gate-decision.dsse.json"

Role = Literal["site", "officer"]


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


def approve_plan(plan: StudyPlan, *, key: SigningKey, site_id: str) -> bytes:
    """A site's ``plan-approval/v1`` envelope: it checked this plan against its policy and agrees.

    Raises:
        UsageError: the key is not the one that the plan names for the site.
    """
    if key.verify_key.hex() != plan.site(site_id).identity_key:
        raise UsageError(f"the key given is not the one that the plan names for site {site_id!r}")
    statement = Statement(
        predicate_type=PLAN_APPROVAL_PREDICATE,
        subjects=(Subject(name=PLAN_NAME, sha256=sha256_hex(plan.canonical())),),
        predicate={"study_id": plan.study_id, "plan_sha256": plan.digest().hex(), "site_id": site_id},
    )
    return sign_statement(statement, key)


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


def approve_decision(
    decision: bytes, *, plan: StudyPlan, key: SigningKey, role: Role, site_id: str | None = None
) -> bytes:
    """Sign an approval of a gate decision, after checking it.

    Args:
        decision: Bytes of ``gate-decision.dsse.json``.
        plan: The plan as the signer knows it (the site's approved one, or the one the officer was given),
            not one that came along with the decision.
        key: The signer's identity.
        role: ``site`` (then ``site_id`` is needed) or ``officer``.
        site_id: The approving site.

    Returns:
        Bytes of a ``release-approval/v1`` envelope.

    Raises:
        EvidenceError: the decision does not verify, or is about another plan.
        RefusedError: it does not say "release", or lists a failed condition.
        UsageError: the key is not the one that the plan names for this role.
    """
    if (role == "site") != (site_id is not None):
        raise UsageError("a site's approval names the site, the officer's does not")
    expected = plan.roster.officer_key if site_id is None else plan.site(site_id).identity_key
    if key.verify_key.hex() != expected:
        who = "officer" if site_id is None else f"site {site_id!r}"
        raise UsageError(
            f"the key given is not the one that the plan names for the {who}",
            remedy="sign with the key that was enrolled for this study",
        )
    statement = open_decision(decision, plan=plan)
    failed = failed_conditions(statement.predicate)
    if statement.predicate.get("decision") != "release" or failed:
        raise RefusedError(
            "the gate refused this candidate, so there is nothing to approve"
            + (f"; failed: {', '.join(failed)}" if failed else ""),
            remedy="read the failed conditions in the decision; a refusal is not overruled by approvals",
        )
    signed = Statement(
        predicate_type=APPROVAL_PREDICATE,
        subjects=(Subject(name=DECISION_NAME, sha256=statement.sha256),),
        predicate={
            "study_id": plan.study_id,
            "plan_sha256": plan.digest().hex(),
            "decision": "release",
            "role": role,
            "site_id": site_id,
        },
    )
    return sign_statement(signed, key)


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
