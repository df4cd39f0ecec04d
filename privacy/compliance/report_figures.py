"""The figures of a release report, from an examined bundle: recomputed by the officer's own code.

Nothing here is taken from the coordinator's words where the signed ledgers and verdicts give the figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from privacy.audit.bounds import gaussian_auc_ceiling, gaussian_trade_off
from privacy.audit.counts import CountsLayout, pooled_noise_std
from privacy.audit.verdict import Condition, level_of_test
from privacy.compliance.budget import read_evidence_file, stated_key
from privacy.compliance.drawings import Point, curves, gauge, interval_on_axis
from privacy.compliance.dsse import EvidenceError
from privacy.compliance.epsilon import spent_epsilon
from privacy.compliance.ledger_check import CheckedLedger, open_ledger
from privacy.compliance.recheck import Check, OpenedEvidence
from privacy.compliance.report import epsilon_words
from privacy.dp.accounting import gaussian_mu
from shared.errors import LacunaError
from shared.study_plan import StudyPlan


@dataclass(frozen=True, kw_only=True)
class SiteBudgetFigure:
    """One site's row: charges of the study, epsilon both ways, and its gauge."""

    site_id: str
    train_attempts: int
    audit_attempts: int
    world: float
    colluding: float
    accountants: str
    drawing: Markup

    @property
    def world_words(self) -> str:
        return epsilon_words(self.world)

    @property
    def colluding_words(self) -> str:
        return epsilon_words(self.colluding)


@dataclass(frozen=True, kw_only=True)
class GivenLedger:
    """A ledger handed to the report besides the bundle, held against the one in the bundle."""

    file: str
    site_id: str
    entries: int
    later: int
    studies: str
    total_world: str
    check: Check


@dataclass(frozen=True, kw_only=True)
class AuditFigure:
    """One condition of the audit, in words a person without statistics can read, and its drawing."""

    name: str
    title: str
    question: str
    status: str
    text: str
    plain: str
    drawing: Markup | None


def budget_figures(opened: OpenedEvidence) -> tuple[SiteBudgetFigure, ...]:
    """Raises EvidenceError where a ledger does not verify or the accountants disagree."""
    plan = opened.plan
    rows = []
    for site, (world, colluding) in opened.spent.items():
        charges = opened.charges(site)
        label = (
            f"{site}: epsilon {epsilon_words(world.reported)} spent of "
            f"{epsilon_words(plan.privacy.epsilon)}; all others colluding {epsilon_words(colluding.reported)}"
        )
        rows.append(
            SiteBudgetFigure(
                site_id=site,
                train_attempts=sum(charge.purpose == "train" for charge in charges),
                audit_attempts=sum(charge.purpose == "audit" for charge in charges),
                world=world.reported,
                colluding=colluding.reported,
                accountants=f"{world.first:.2f} and {world.second:.2f} ({world.second_is})",
                drawing=gauge(
                    spent=world.reported,
                    promised=plan.privacy.epsilon,
                    colluding=colluding.reported,
                    label=label,
                ),
            )
        )
    return tuple(rows)


def best_attack(epsilon: float | None, delta: float) -> float:
    """Largest AUC of any attack that (epsilon, delta) of a Gaussian mechanism allows; 1 without a bound."""
    if epsilon is None or not math.isfinite(epsilon):
        return 1.0
    return 0.5 if epsilon <= 0 else gaussian_auc_ceiling(epsilon, delta)


def given_ledgers(
    paths: Sequence[Path], *, plan: StudyPlan, in_bundle: Mapping[str, CheckedLedger]
) -> tuple[GivenLedger, ...]:
    """Check ledger exports given besides the bundle: whole, of a site of the study, and not older.

    Never raises: what is wrong with one becomes its failed check.
    """
    names = {entry.identity_key: entry.site_id for entry in plan.roster.sites}
    rows = []
    for path in paths:
        name = f"ledger given: {path.name}"
        try:
            rows.append(_given(path, name, names, plan, in_bundle))
        except LacunaError as error:
            rows.append(
                GivenLedger(
                    file=path.name, site_id="unknown", entries=0, later=0, studies="", total_world="unknown",
                    check=Check(name=name, status="fail", detail=error.message),
                )
            )  # fmt: skip
    return tuple(rows)


def _given(
    path: Path,
    name: str,
    names: Mapping[str, str],
    plan: StudyPlan,
    in_bundle: Mapping[str, CheckedLedger],
) -> GivenLedger:
    data = read_evidence_file(path)
    key = stated_key(data, what=path.name)
    if key not in names:
        raise EvidenceError(f"{path.name}: signed by a key that is no site of this study")
    site = names[key]
    ledger = open_ledger(data, key=key, what=path.name)
    before = in_bundle.get(site)
    if before is None:
        raise EvidenceError(f"{path.name}: the bundle has no valid ledger of {site} to compare it with")
    if ledger.ledger_id != before.ledger_id:
        raise EvidenceError(f"{path.name}: another ledger of {site} than the one in the bundle")
    if ledger.entry_hashes[: before.length] != before.entry_hashes:
        raise EvidenceError(f"{path.name}: it does not continue the ledger of {site} in the bundle")
    events = [charge.event for charge in ledger.charges]
    total = spent_epsilon(events, delta=plan.privacy.delta, observer="world")
    later = ledger.length - before.length
    return GivenLedger(
        file=path.name,
        site_id=site,
        entries=ledger.length,
        later=later,
        studies=", ".join(ledger.studies()),
        total_world=epsilon_words(total.reported),
        check=Check(
            name=name,
            status="pass",
            detail=f"continues the ledger of {site} in the bundle by {later} entries"
            if later
            else f"the ledger of {site} as it is in the bundle",
        ),
    )


_QUESTIONS = {
    "membership_attack": (
        "Membership attack",
        "Shown the generator, can one tell patients it was trained on from patients kept out of training? "
        "0.5 is guessing, 0 and 1 are certainty.",
    ),
    "secondary_attacks": (
        "Secondary attacks",
        "Of the other attacks that the plan pools, does any tell patients apart? The most telling one is "
        "shown. 0.5 is guessing, 0 and 1 are certainty.",
    ),
    "power": (
        "Power",
        "Would this audit have noticed a strong leak, with the patients there were? 1 is surely, 0 is never.",
    ),
    "control_public_loss": (
        "Control: public model",
        "A model that never saw the patients must not tell them apart. The interval has to contain 0.5.",
    ),
    "control_members": (
        "Control: members against members",
        "Two random halves of the patients trained on must look alike. The interval has to contain 0.5.",
    ),
    "control_planted_leak": (
        "Control: planted leak",
        "A leak made on purpose must be seen by the same attack; otherwise the attack is blind.",
    ),
    "copies": (
        "Copies",
        "How many patients have a generated scan that comes closer than the distance fixed in the plan?",
    ),
}


def audit_figures(opened: OpenedEvidence) -> tuple[AuditFigure, ...]:
    """Every condition of the audit, recomputed from the pooled, noised counts. Raises EvidenceError."""
    verdict = next(iter(opened.recomputed.values()))
    return tuple(_audit_figure(opened.plan, condition) for condition in verdict.conditions)


def _audit_figure(plan: StudyPlan, condition: Condition) -> AuditFigure:
    title, question = _QUESTIONS.get(condition.name, (condition.name.replace("_", " ").capitalize(), ""))
    return AuditFigure(
        name=condition.name,
        title=title,
        question=question,
        status=condition.status,
        text=condition.text,
        plain=_in_plain_words(plan, condition),
        drawing=_drawing(plan, condition),
    )


def _in_plain_words(plan: StudyPlan, condition: Condition) -> str:
    """What the figure says to a person without statistics; empty where it needs no more words."""
    figure, low, high = condition.figure, condition.low, condition.high
    if figure is None:
        return ""
    if condition.name == "power":
        cases = f"{100 * figure:.0f} of 100" if figure < 0.995 else "more than 99 of 100"
        return f"A strong leak would have been noticed in {cases} such audits."
    if condition.name == "control_planted_leak":
        return "The planted leak was seen." if condition.status == "pass" else "The planted leak was missed."
    if low is None or high is None:
        return ""
    if condition.name in ("control_public_loss", "control_members"):
        return (
            "As it should be: guessing, 0.5, lies inside the bar."
            if condition.status == "pass"
            else "Guessing, 0.5, lies outside the bar: the audit itself is broken, and says nothing."
        )
    if condition.name == "membership_attack":
        guessing = "Guessing, 50, is among them" if low <= 0.5 <= high else "Guessing, 50, is not among them"
        return (
            "Of a member and a held-out patient, the attack named the member in about "
            f"{100 * figure:.0f} of 100 pairs; {100 * low:.0f} to {100 * high:.0f} fit the counts. "
            f"{guessing}."
        )
    if condition.name == "copies":
        most = plan.audit.max_copied_patients
        return (
            f"Each hospital compared {plan.audit.copy_samples} generated scans with every patient trained "
            f"on. By chance alone, without any copy, up to {most} of about "
            f"{plan.privacy.declared_patients} patients may come that close: that is the limit. The noise "
            f"hides single patients: from these counts, up to about {max(high, 0):.0f} patients with a copy "
            "cannot be ruled out. A number below zero is the noise as well."
        )
    return ""


def _drawing(plan: StudyPlan, condition: Condition) -> Markup | None:
    figure, low, high = condition.figure, condition.low, condition.high
    if condition.name == "power" and figure is not None:
        marks = [(condition.bound, f"the plan asks for {condition.bound:g}", "limit")]
        return interval_on_axis(estimate=figure, low=figure, high=figure, marks=marks, label=condition.text)
    if figure is None or low is None or high is None:
        return None
    if condition.name == "copies":
        end = max(high, condition.bound) * 1.15 + 1
        words = f"refused if the whole interval lies right of {condition.bound:g}"
        return interval_on_axis(
            estimate=figure, low=low, high=high, axis=(min(low * 1.15, 0.0), end), label=condition.text,
            marks=[(condition.bound, words, "limit")],
        )  # fmt: skip
    marks = [(0.5, "guessing", "chance")]
    if condition.name in ("membership_attack", "secondary_attacks"):
        promised = best_attack(plan.privacy.epsilon, plan.privacy.delta)
        words = f"refused if the whole interval lies right of {condition.bound:g}"
        marks.append((condition.bound, words, "limit"))
        marks.append((1.0 - condition.bound, f"or left of {1.0 - condition.bound:g}", "limit"))
        marks.append((promised, f"if the promise holds, no attack gets beyond {promised:.3f}", "ceiling"))
    return interval_on_axis(estimate=figure, low=low, high=high, marks=marks, label=condition.text)


def confidence(plan: StudyPlan, name: str) -> str:
    """The confidence of a drawn interval in per cent, as the verdict computes it.

    Controls split their level between the ends; of all others each end has the whole of it.
    """
    level = level_of_test(plan, name)
    miss = level if name in ("control_public_loss", "control_members") else 2 * level
    return f"{100 * (1 - miss):.3g}"


def left_out_of_audit(opened: OpenedEvidence) -> tuple[str, ...]:
    """Sites of the plan whose patients are in no figure of the audit. Raises EvidenceError."""
    site = next(iter(opened.recomputed))
    audited = set(opened.verdicts[site].predicate["survivors"])
    return tuple(name for name in opened.sites if name not in audited)


def attack_is_drawn(opened: OpenedEvidence) -> bool:
    """Whether the counts carry the attack's own curve: with less power than the plan asks it is noise."""
    power = next(iter(opened.recomputed.values())).condition("power").figure
    return power is not None and power > 0 and power >= opened.plan.audit.min_power


def attack_curve(opened: OpenedEvidence, *, spent: float) -> Markup:
    """The pooled attack's curve under the ceiling that the mechanism's own trade-off curve implies.

    The attack's own line is left out where the counts do not carry it (:func:`attack_is_drawn`).

    Args:
        spent: Largest epsilon of all sites against the world.

    Raises:
        EvidenceError: no verdict gives counts.
    """
    plan = opened.plan
    site = next(iter(opened.recomputed))
    predicate = opened.verdicts[site].predicate
    pooled = CountsLayout.from_plan(plan).read(
        predicate["pooled_counts"], noise_std=pooled_noise_std(plan, len(predicate["survivors"]))
    )
    rates = np.concatenate([[0.0], np.logspace(-4, -1, 40), np.linspace(0.11, 1, 60)])
    promised = _ceiling(plan.privacy.epsilon, plan.privacy.delta, rates)
    ceiling = _ceiling(spent, plan.privacy.delta, rates)
    lines: list[tuple[str, Sequence[Point]]] = [("chance", [(0.0, 0.0), (1.0, 1.0)])]
    if plan.privacy.epsilon is not None:
        lines.append(("limit", promised))
    lines.append(("ceiling", ceiling))
    if attack_is_drawn(opened):
        lines.append(("measured", _measured(pooled.attack.members_B, pooled.attack.held_out_B)))
    return curves(
        lines=lines,
        shaded=[*ceiling, (1.0, 0.0)],
        words=[(0.62, 0.08, "note", "possible by proof")],
        x_title="false alarms: held-out patients taken for members",
        y_title="hits: members recognised",
        label="curve of the pooled attack under the ceiling of the mechanism",
    )


def _ceiling(epsilon: float | None, delta: float, rates: Any) -> list[Point]:
    if epsilon is None or not math.isfinite(epsilon):
        return [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    mu = gaussian_mu(epsilon, delta) if epsilon > 0 else 0.0
    return [(float(x), float(y)) for x, y in zip(rates, gaussian_trade_off(mu, rates), strict=True)]


def _measured(members_B: Any, held_out_B: Any) -> list[Point]:
    hits = np.concatenate([[0.0], np.cumsum(members_B[::-1]) / members_B.sum()])
    alarms = np.concatenate([[0.0], np.cumsum(held_out_B[::-1]) / held_out_B.sum()])
    return [(float(x), float(y)) for x, y in zip(alarms, hits, strict=True)]
