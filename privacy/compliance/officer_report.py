"""``lacuna compliance report``: one page about a release, read from the top down by a person.

The page is a function of the bundle, of what is given with it (ledgers, receipts, release log, the
coordinator's key) and of the time. It is written whatever the bundle holds: what cannot be verified is
shown as such, and the verdict at its top says so. Order after NIST SP 800-226, "Guidelines for Evaluating
Differential Privacy Guarantees" (2025): what is promised, to whom, against whom, and what is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.audit.blind_spots import BLIND_SPOTS
from privacy.compliance.approval_check import approval_file_name
from privacy.compliance.dsse import EvidenceError
from privacy.compliance.epsilon import gaussian_epsilon
from privacy.compliance.ledger_check import SeenHead
from privacy.compliance.page import render_page
from privacy.compliance.recheck import Check
from privacy.compliance.release_log import LogHead
from privacy.compliance.report import epsilon_words
from privacy.compliance.report_figures import (
    attack_curve,
    attack_is_drawn,
    audit_figures,
    best_attack,
    budget_figures,
    confidence,
    given_ledgers,
    left_out_of_audit,
)
from privacy.compliance.statements import ShownStatement, bundle_statements
from privacy.compliance.verify import DECISION, RELEASE, Examination, examine_bundle
from privacy.dp.accounting import gaussian_mu
from shared.identity import VerifyKey
from shared.study_plan import StudyPlan


@dataclass(frozen=True, kw_only=True)
class OfficerReport:
    """A rendered page, and whether everything that it rests on passed.

    Attributes:
        anchored: Whether the coordinator's key was compared with one from outside; without that, anybody can
            have made the whole bundle.
    """

    html: str
    passed: bool
    anchored: bool
    failed: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class _Missing:
    """A part of the page whose evidence does not verify."""

    why: str


class _Sources:
    """Numbers of the signed statements, by what they are about; a template asks for them by name."""

    def __init__(self, statements: Sequence[ShownStatement], plan: StudyPlan | None) -> None:
        self._by_file = {statement.file: statement for statement in statements}
        self._sites = [] if plan is None else [entry.site_id for entry in plan.roster.sites]

    def __call__(self, kind: str, site: str | None = None) -> list[ShownStatement]:
        """Statements of a kind: ``plan``, ``decision``, ``release``, ``ledgers``, ``verdicts``, ..."""
        single = {"plan": "attestations/plan.dsse.json", "decision": DECISION, "release": RELEASE}
        if kind in single:
            names = [single[kind]]
        elif kind == "approvals":
            names = [name for name in self._by_file if name.startswith("attestations/approvals/")]
        else:
            names = [f"attestations/{kind}/{s}.dsse.json" for s in ([site] if site else self._sites)]
        return [self._by_file[name] for name in names if name in self._by_file]

    def file(self, name: str) -> list[ShownStatement]:
        return [self._by_file[name]] if name in self._by_file else []


def officer_report(
    bundle: Path,
    *,
    at: str,
    trusted_coordinator: str | None = None,
    log: Path | None = None,
    log_at_least: LogHead | None = None,
    seen_heads: Mapping[str, Sequence[SeenHead]] | None = None,
    ledgers: Sequence[Path] = (),
) -> OfficerReport:
    """Verify a bundle and render the page. Never raises for what is in the bundle.

    Args:
        bundle, trusted_coordinator, log, log_at_least, seen_heads: As for ``verify_bundle``.
        at: Time of the report, for its head.
        ledgers: Exports that sites gave since; each has to continue the one in the bundle.
    """
    examined = examine_bundle(
        bundle,
        trusted_coordinator=trusted_coordinator,
        log=log,
        log_at_least=log_at_least,
        seen_heads=seen_heads,
    )
    plan, opened = examined.plan, examined.evidence
    in_bundle = {} if opened is None else opened.ledgers
    given = () if plan is None else given_ledgers(ledgers, plan=plan, in_bundle=in_bundle)
    checks = (*examined.report.checks, *(row.check for row in given))
    if ledgers and plan is None:
        checks += (
            Check(name="ledgers given", status="fail", detail="without a plan nobody's keys are known"),
        )
    failed = tuple(check for check in checks if check.status == "fail")
    statements = () if plan is None else bundle_statements(examined.files, plan)
    anchored = any(check.name == "coordinator key" and check.status == "pass" for check in checks)
    html = render_page(
        "officer.html",
        at=at,
        bundle_name=bundle.name,
        report=examined.report,
        checks=checks,
        failed=failed,
        anchored=anchored,
        unchecked=tuple(check for check in checks if check.status == "unchecked"),
        plan=plan,
        decision=None if examined.decision is None else examined.decision.predicate,
        sources=_Sources(statements, plan),
        statements=statements,
        given=given,
        budgets=_or_missing(lambda: budget_figures(_need(opened))),
        audit=_or_missing(lambda: audit_figures(_need(opened))),
        curve=_or_missing(lambda: attack_curve(_need(opened), spent=_worst(examined)[0])),
        left_out=_or_missing(lambda: left_out_of_audit(_need(opened))),
        drawn=_or_missing(lambda: attack_is_drawn(_need(opened))),
        guarantee=None if plan is None else _guarantee(plan, examined),
        conditions=_conditions(examined),
        approvals=_or_missing(lambda: _approvals(examined)),
        log_entries=examined.log_entries,
        is_missing=lambda value: isinstance(value, _Missing),
        confidence=confidence,
        words=epsilon_words,
        blind_spots=BLIND_SPOTS,
    )
    return OfficerReport(html=html, passed=bool(checks) and not failed, anchored=anchored, failed=failed)


def _need(opened: Any) -> Any:
    if opened is None:
        raise EvidenceError("the evidence could not be read")
    return opened


def _or_missing(build: Callable[[], Any]) -> Any:
    """A part of the page, or why there is none: foreign evidence breaks a part, never the page."""
    try:
        return build()
    except Exception as error:  # fail visibly: the checks above name the fault as well
        return _Missing(why=str(getattr(error, "message", error))[:500])


def _worst(examined: Examination) -> tuple[float, float]:
    """Largest epsilon of all sites: against the world, and if all others collude. Raises EvidenceError."""
    pairs = _need(examined.evidence).spent.values()
    return max(pair[0].reported for pair in pairs), max(pair[1].reported for pair in pairs)


def _guarantee(plan: StudyPlan, examined: Examination) -> dict[str, Any]:
    """Epsilons and what they mean for the best possible attack, in cases of a hundred."""
    promised, delta = plan.privacy.epsilon, plan.privacy.delta
    worst = _or_missing(lambda: _worst(examined))
    spent, colluding = (None, None) if isinstance(worst, _Missing) else worst
    return {
        "spent": spent,
        "colluding": colluding,
        "promised_cases": 100 * best_attack(promised, delta),
        "spent_cases": None if spent is None else 100 * best_attack(spent, delta),
        "colluding_cases": None if colluding is None else 100 * best_attack(colluding, delta),
        "two_sites_words": epsilon_words(None if spent is None else _at_two_sites(spent, delta)),
        "world_words": epsilon_words(spent),
        "colluding_words": epsilon_words(colluding),
        "promised_words": epsilon_words("infinite" if promised is None else promised),
    }


def _at_two_sites(epsilon: float, delta: float) -> float:
    """Epsilon of a patient who spent ``epsilon`` at each of two sites: Gaussian mechanisms' mus add up."""
    if not 0 < epsilon < math.inf:
        return epsilon
    return gaussian_epsilon(2 * gaussian_mu(epsilon, delta), delta)


def _conditions(examined: Examination) -> list[dict[str, Any]]:
    """Every condition of the gate: as the coordinator's decision has it, and as recomputed here."""
    stated = [] if examined.decision is None else examined.decision.predicate.get("conditions", [])
    by_name = (
        {str(c.get("name")): c for c in stated if isinstance(c, dict)} if isinstance(stated, list) else {}
    )
    found = {check.name: check for check in examined.report.checks if check.name.startswith("gate ")}
    rows = []
    for name in dict.fromkeys(
        [*by_name, *(n.removeprefix("gate ") for n in found if n not in _NOT_CONDITIONS)]
    ):
        own, here = by_name.get(name, {}), found.get(f"gate {name}")
        rows.append(
            {
                "name": name,
                "title": str(own.get("title", name)),
                "figure": str(own.get("figure", "")),
                "bound": str(own.get("bound", "")),
                "stated": "pass" if own.get("passed") is True else "fail" if own else "not listed",
                "reason": str(own.get("reason", "")),
                "status": "not recomputed" if here is None else here.status,
                "detail": "" if here is None else here.detail,
                "source": _SOURCE_OF.get(name.split("-")[0], ("decision",)),
                "group": _GROUP_OF.get(name.split("-")[0], "Other conditions"),
            }
        )
    return rows


_NOT_CONDITIONS = ("gate decision", "gate evidence")
_SOURCE_OF = {
    "plan": ("plan", "plan-approvals"),
    "ledgers": ("ledgers",),
    "charges": ("ledgers",),
    "budget": ("ledgers",),
    "attempts": ("ledgers", "decision"),
    "rounds": ("decision",),
    "public": ("plan", "release"),
    "audit": ("verdicts",),
    "verdicts": ("verdicts",),
    "no": ("verdicts",),
    "mechanism": ("verdicts",),
}
_GROUP_OF = {
    "plan": "The plan",
    **dict.fromkeys(("ledgers", "charges", "budget", "attempts"), "Ledgers and budget"),
    **dict.fromkeys(("rounds", "public"), "Training"),
    **dict.fromkeys(("verdicts", "audit", "no", "mechanism"), "Audit and verdicts"),
}


def _approvals(examined: Examination) -> dict[str, Any]:
    count, plan = examined.approvals, examined.plan
    if count is None or plan is None:
        raise EvidenceError("approvals could not be read")
    files: dict[str, str] = {}
    for name, data in examined.files.items():
        if name.startswith("attestations/approvals/"):
            try:
                files.setdefault(approval_file_name(data, plan=plan), name)
            except EvidenceError:
                continue
    rows = [
        {
            "who": "compliance officer",
            "fingerprint": VerifyKey.from_hex(plan.roster.officer_key).fingerprint,
            "given": count.officer,
            "file": files.get("officer.dsse.json", ""),
        }
    ]
    rows += [
        {
            "who": entry.site_id,
            "fingerprint": entry.verify_key.fingerprint,
            "given": entry.site_id in count.sites,
            "file": files.get(f"site-{entry.site_id}.dsse.json", ""),
        }
        for entry in plan.roster.sites
    ]
    return {"rows": rows, "count": count}
