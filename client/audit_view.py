"""A site's own audit in words. Never leaves the hospital."""

from __future__ import annotations

from typing import Any

from client.audit_part import AuditPart
from client.auditor import LocalAudit
from privacy.audit.bounds import Interval
from shared.study_plan import StudyPlan


def audit_lines(record: dict[str, Any]) -> list[str]:
    """Lines for a person, from the site's ``audit.json``."""
    audit = LocalAudit.from_dict(record["figures"])
    lines = [
        "THIS SITE'S OWN FIGURES. They are functions of patients' data: do not send them anywhere.",
        f"candidate {record['candidate_sha256'][:16]}, audit attempt {record['attempt']}",
        f"patients: {audit.n_members} members, {audit.n_held_out} held out",
        f"membership attack, reference-calibrated loss: AUC {_words(audit.attack)}",
        *(
            f"secondary attack, {figures.attack}: AUC {_words(figures.auc)}"
            + ("" if figures.pooled else "; shown here alone")
            for figures in audit.secondary
        ),
        f"power of this site alone against the plan's reference attack: {audit.power:.2f}"
        + (" (too small to say much; the pooled audit decides)" if audit.power < 0.5 else ""),
        f"control, plain loss on the public model: AUC {_words(audit.public_control)}",
        f"control, members against members: AUC {_words(audit.member_control)}",
        f"control, planted leak: AUC {audit.planted_leak.auc:.2f} "
        f"({audit.planted_leak.n_planted} against {audit.planted_leak.n_fresh})",
        f"copies: {len(audit.copied)} of {audit.n_members} members have a generated sample nearer than "
        f"{audit.copy_distance:.3g}",
    ]
    if audit.epsilon_lower_bound is not None:
        lines.append(f"epsilon that the attack proves: at least {audit.epsilon_lower_bound:.2f}")
    if audit.mu_lower_bound is not None:
        lines.append(f"mu that it proves if the mechanism is Gaussian: at least {audit.mu_lower_bound:.2f}")
    return lines


def signed_lines(part: AuditPart | None, plan: StudyPlan, *, site_id: str) -> list[str]:
    """What this site signed about the pooled counts, and whether its own part can be in them."""
    if part is None or part.signed is None:
        return ["no verdict was signed here on pooled counts yet"]
    survivors, _ = part.signed
    lines = [f"verdict signed on the pooled counts of {', '.join(survivors)}"]
    missing = part.missing_cells(plan, site_id=site_id)
    if missing:
        lines.append(
            "WARNING: these counts lie too far below what this site put in, in "
            f"{', '.join(missing)}: they are not the sum. Ask the coordinator; "
            "lacuna site audit --veto refuses the release."
        )
    elif site_id in survivors:
        lines.append("they lie nowhere too far below this site's own part; that does not prove them")
    return lines


def _words(interval: Interval | None) -> str:
    if interval is None:
        return "not computed (too few patients)"
    bounds = f"{interval.low:.3f} to {interval.high:.3f}"
    return f"{interval.estimate:.3f} (interval {bounds}, error {interval.error:.2g} at each end)"
