"""A site's own audit as a page, for the hospital's own people. It must never leave the hospital.

Raw scores, distances and pictures of patients are in it, without noise: none of it is covered by the study's
privacy budget. The page says so at its top, on every printed sheet and in its title.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from client.auditor import LocalAudit, SecondaryFigures
from client.nearest_neighbours import Picture
from privacy.audit.bounds import FloatArray, Interval, gaussian_trade_off
from privacy.audit.verdict import attack_bound
from privacy.compliance.drawings import Point, curves, dots_on_axis, interval_on_axis
from privacy.compliance.page import render_page
from privacy.compliance.report_figures import best_attack
from privacy.dp.accounting import gaussian_mu
from shared.study_plan import StudyPlan

PRIVATE = "Stays in the hospital: never send, upload or publish this page."
NEAREST_IN_TABLE = 12
_SCALE = 4


def site_audit_page(
    record: dict[str, Any], plan: StudyPlan, *, site_id: str, at: str, signed: Sequence[str] = ()
) -> str:
    """Render the site's ``audit.json``.

    Args:
        record: Its content.
        plan: The approved plan.
        at: Time, for the head of the page.
        signed: What the site signed about the pooled counts (:func:`client.audit_view.signed_lines`).

    Raises:
        MalformedMessageError: not such a record.
    """
    audit = LocalAudit.from_dict(record["figures"])
    ceiling = best_attack(plan.privacy.epsilon, plan.privacy.delta)
    return render_page(
        "site_audit.html",
        package="client",
        private=PRIVATE,
        at=at,
        site_id=site_id,
        plan=plan,
        audit=audit,
        attempt=record["attempt"],
        candidate=str(record["candidate_sha256"]),
        ceiling=ceiling,
        signed=signed,
        roc=None
        if audit.attack is None
        else _roc(audit.member_scores, audit.held_out_scores, plan, "the primary attack"),
        secondary=[_secondary(figures, plan) for figures in audit.secondary],
        attack=_interval(
            audit.attack, (attack_bound(plan), "the gate's bound for all hospitals together", "limit")
        ),
        public_control=_interval(audit.public_control),
        member_control=_interval(audit.member_control),
        scores=_dots(
            audit.member_scores, audit.held_out_scores, (0.0, "no difference between the models", "chance")
        ),
        distances=_dots(
            audit.member_distances,
            audit.held_out_distances,
            (audit.copy_distance, f"nearer than {audit.copy_distance:.3g} counts as copied", "limit"),
        ),
        nearest=_nearest(audit),
        neighbours=[
            {
                "key": neighbour.patient_key,
                "distance": neighbour.distance,
                "sample": neighbour.sample,
                "copied": neighbour.patient_key in audit.copied,
                "patient": _png(neighbour.patient_picture),
                "generated": _png(neighbour.sample_picture),
            }
            for neighbour in audit.neighbours
        ],
    )


def roc_points(members: FloatArray, held_out: FloatArray) -> list[Point]:
    """(share of held-out patients, share of members) above each threshold, from (0, 0) to (1, 1)."""
    members, held_out = members[np.isfinite(members)], held_out[np.isfinite(held_out)]
    if not members.size or not held_out.size:
        return []
    thresholds = np.unique(np.concatenate([members, held_out]))[::-1]
    points = [(float((held_out >= t).mean()), float((members >= t).mean())) for t in thresholds]
    return [(0.0, 0.0), *points]


def _secondary(figures: SecondaryFigures, plan: StudyPlan) -> dict[str, Any]:
    """One secondary attack: its interval, its curve and its scores."""
    members, held_out = figures.member_scores, figures.held_out_scores
    return {
        "name": figures.attack,
        "auc": figures.auc,
        "pooled": figures.pooled,
        "interval": _interval(figures.auc),
        "roc": _roc(members, held_out, plan, figures.attack),
        "scores": _dots(members, held_out),
        "lost": int(sum((~np.isfinite(group)).sum() for group in (members, held_out))),
    }


def _roc(members: FloatArray, held_out: FloatArray, plan: StudyPlan, attack: str) -> Any:
    points = roc_points(members, held_out)
    if not points:
        return None
    rates = np.concatenate([[0.0], np.logspace(-4, -1, 40), np.linspace(0.11, 1, 60)])
    lines: list[tuple[str, list[Point]]] = [("chance", [(0.0, 0.0), (1.0, 1.0)])]
    shaded: list[Point] = []
    if plan.privacy.epsilon is not None:
        allowed = gaussian_trade_off(gaussian_mu(plan.privacy.epsilon, plan.privacy.delta), rates)
        ceiling = [(float(x), float(y)) for x, y in zip(rates, allowed, strict=True)]
        lines.append(("ceiling", ceiling))
        shaded = [*ceiling, (1.0, 0.0)]
    lines.append(("measured", points))
    return curves(
        lines=lines,
        shaded=shaded,
        x_title="false alarms: held-out patients taken for members",
        y_title="hits: members recognised",
        label=f"ROC curve at this site: {attack}",
    )


def _interval(interval: Interval | None, *marks: tuple[float, str, str]) -> Any:
    if interval is None:
        return None
    return interval_on_axis(
        estimate=interval.estimate,
        low=interval.low,
        high=interval.high,
        marks=[(0.5, "guessing", "chance"), *marks],
        label=f"AUC {interval.estimate:.3f}, {interval.low:.3f} to {interval.high:.3f}",
    )


def _dots(members: FloatArray, held_out: FloatArray, *marks: tuple[float, str, str]) -> Any:
    groups = [[float(value) for value in group if math.isfinite(value)] for group in (members, held_out)]
    if not any(groups):
        return None
    rows = [("trained on", "member", groups[0]), ("held out", "held-out", groups[1])]
    return dots_on_axis(rows=rows, marks=marks, label="one dot for each patient", with_zero=bool(marks))


def _nearest(audit: LocalAudit) -> list[dict[str, Any]]:
    order = np.argsort(audit.member_distances, kind="stable")[:NEAREST_IN_TABLE]
    return [
        {
            "key": audit.member_keys[i],
            "distance": float(audit.member_distances[i]),
            "copied": audit.member_keys[i] in audit.copied,
        }
        for i in order
        if i < len(audit.member_keys) and math.isfinite(audit.member_distances[i])
    ]


def _png(picture: Picture) -> str:
    """A picture as a data address, enlarged without smoothing."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    image = image.resize((image.width * _SCALE, image.height * _SCALE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
