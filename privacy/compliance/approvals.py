"""Approvals: a site's signature over the plan, a site's or the officer's over one gate decision.

What is signed is the SHA-256 of the decision's bytes, so an approval can serve no other decision, candidate
or study. Whoever signs re-checks first that the decision is one of the plan's coordinator, for this plan,
that it says "release", and that each condition in it passed. This module runs without torch and without
the server's code.
"""

from __future__ import annotations

from typing import Literal

from privacy.compliance.approval_check import (
    APPROVAL_PREDICATE,
    DECISION_NAME,
    DECISION_PREDICATE,
    PLAN_APPROVAL_PREDICATE,
    PLAN_NAME,
    ApprovalCount,
    approval_file_name,
    check_approvals,
    check_plan_approval,
    failed_conditions,
    open_decision,
)
from privacy.compliance.dsse import sha256_hex
from privacy.compliance.validity import check_in_force, now_utc
from shared.attestation import Statement, Subject, sign_statement
from shared.errors import RefusedError, UsageError
from shared.identity import SigningKey
from shared.study_plan import StudyPlan

__all__ = [
    "APPROVAL_PREDICATE",
    "ApprovalCount",
    "DECISION_NAME",
    "DECISION_PREDICATE",
    "Role",
    "approval_file_name",
    "approve_decision",
    "approve_plan",
    "check_approvals",
    "check_plan_approval",
    "failed_conditions",
    "open_decision",
]

Role = Literal["site", "officer"]


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


def approve_decision(
    decision: bytes,
    *,
    plan: StudyPlan,
    key: SigningKey,
    role: Role,
    site_id: str | None = None,
    at: str | None = None,
) -> bytes:
    """Sign an approval of a gate decision, after checking it.

    Args:
        decision: Bytes of ``gate-decision.dsse.json``.
        plan: The plan as the signer knows it (the site's approved one, or the one the officer was given),
            not one that came along with the decision.
        key: The signer's identity.
        role: ``site`` (then ``site_id`` is needed) or ``officer``.
        site_id: The approving site.
        at: Time of the approval, ``2026-01-31T12:00:00Z``; by default the present, by the signer's clock.

    Returns:
        Bytes of a ``release-approval/v1`` envelope.

    Raises:
        EvidenceError: the decision does not verify, or is about another plan, or the plan has expired.
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
    at = now_utc() if at is None else at
    check_in_force(plan, at, what="approval")
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
            "at": at,
        },
    )
    return sign_statement(signed, key)
