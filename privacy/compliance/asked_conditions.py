"""Conditions that a gate has only where the plan asks for them, evaluated again by the officer.

As in :mod:`privacy.compliance.recheck` envelopes and ledgers are opened by code of the officer's own. Common
with sites and server are what a mechanism audit and an opening of canaries say (:mod:`privacy.audit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from privacy.audit.canary_opening import COMMITMENT_KIND, CanaryOpening, canary_verdict
from privacy.audit.mechanism_statement import MechanismStatement
from privacy.compliance.dsse import EvidenceError, open_signed
from shared.errors import LacunaError
from shared.study_plan import StudyPlan

if TYPE_CHECKING:
    from privacy.compliance.recheck import OpenedEvidence


def mechanism_audits(o: OpenedEvidence) -> str:
    """Raises EvidenceError naming each site whose installation was not shown to be the plan's mechanism."""
    return _each(o, "mechanism-audits", _mechanism_audit, "installations pass the mechanism audit")


def canaries_committed(o: OpenedEvidence) -> str:
    """Raises EvidenceError naming each site that did not open the coins that it had committed to."""
    return _each(o, "canary-openings", _opening, "sites opened the coins that their ledgers committed to")


def canaries_guessed(o: OpenedEvidence) -> str:
    """Raises EvidenceError where more coins were guessed than the plan's promise allows."""
    openings = {site: _opening(o, site, _given(o, "canary-openings", site)) for site in _auditors(o)}
    verdict = canary_verdict(o.plan, openings)
    if verdict.refuted:
        raise EvidenceError(verdict.text)
    return verdict.text


ASKED_FOR: Mapping[str, tuple[Callable[[StudyPlan], bool], Callable[[OpenedEvidence], str]]] = {
    "mechanism-audits": (lambda plan: plan.audit.mechanism_canaries > 0, mechanism_audits),
    "canaries-committed": (lambda plan: plan.audit.canaries_per_site > 0, canaries_committed),
    "audit-canaries": (lambda plan: plan.audit.canaries_per_site > 0, canaries_guessed),
}
"""Name of a condition: (whether a plan asks for it, its check)."""


def _each(o: OpenedEvidence, kind: str, check: Callable[[OpenedEvidence, str, bytes], Any], good: str) -> str:
    faults = []
    for site in _auditors(o):
        try:
            check(o, site, _given(o, kind, site))
        except LacunaError as error:
            faults.append(error.message)
    strange = sorted(set(o.evidence.site_evidence.get(kind, {})) - set(o.sites))
    faults += [f"{kind}: {site} is not a site of this study" for site in strange]
    if faults:
        raise EvidenceError("; ".join(faults))
    return f"{len(_auditors(o))} {good}"


def _auditors(o: OpenedEvidence) -> Sequence[str]:
    done = o.completed("audit")
    return done[-1].survivors if done else o.sites


def _given(o: OpenedEvidence, kind: str, site: str) -> bytes:
    data = o.evidence.site_evidence.get(kind, {}).get(site)
    if data is None:
        raise EvidenceError(f"{kind}: none of {site}")
    return data


def _predicate(o: OpenedEvidence, site: str, data: bytes, kind: str, subjects: Mapping[str, str]) -> Any:
    what = f"{kind} of {site}"
    key = o.plan.site(site).identity_key
    statement = open_signed(data, key=key, predicate_type=kind, what=what)
    if statement.subjects != subjects:
        raise EvidenceError(f"{what}: it is about other artefacts than this release")
    if statement.predicate.get("site_id") != site:
        raise EvidenceError(f"{what}: signed in the name of {str(statement.predicate.get('site_id'))[:40]!r}")
    return statement.predicate


def _mechanism_audit(o: OpenedEvidence, site: str, data: bytes) -> None:
    predicate = _predicate(o, site, data, "mechanism-audit/v1", {"plan": o.plan_sha256})
    statement = MechanismStatement.from_dict(predicate)
    statement.check(o.plan)
    wanted = o.plan.audit.mechanism_canaries
    if statement.canaries < wanted:
        raise EvidenceError(f"{site}: {statement.canaries} canaries, the plan asks for {wanted}")
    broken = [check.name for check in statement.checks if not check.passed]
    if broken:
        raise EvidenceError(f"{site}: its installation is not the plan's mechanism: {', '.join(broken)}")


def _opening(o: OpenedEvidence, site: str, data: bytes) -> CanaryOpening:
    about = {"candidate": o.evidence.candidate_sha256, "plan": o.plan_sha256}
    predicate = _predicate(o, site, data, "canary-opening/v1", about)
    opening = CanaryOpening.from_dict(predicate)
    done = o.completed("audit")
    if not done or opening.attempt != done[-1].attempt:
        raise EvidenceError(f"{site}: its canaries are about attempt {opening.attempt}")
    if opening.candidate_sha256 != o.evidence.candidate_sha256:
        raise EvidenceError(f"{site}: its canaries are about another candidate")
    opening.check(o.plan, committed=_committed(o, site))
    return opening


def _committed(o: OpenedEvidence, site: str) -> str | None:
    first_charge = min((charge.sequence for charge in o.charges(site)), default=None)
    for note in o.ledgers[site].notes:
        if first_charge is not None and note.sequence > first_charge:
            return None
        if note.kind == COMMITMENT_KIND and note.details.get("study_id") == o.plan.study_id:
            commitment = note.details.get("commitment")
            return commitment if isinstance(commitment, str) else None
    return None
