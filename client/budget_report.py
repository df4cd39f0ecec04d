"""What this site has spent, from its own ledger: per study, and over all studies together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from client.site_home import SiteHome
from privacy.dp.accounting import EpsilonReport
from privacy.ledger import read_ledger
from privacy.ledger_chain import CHARGE, LedgerEntry, spent
from shared.errors import LacunaError


@dataclass(frozen=True, kw_only=True)
class StudyBudget:
    """Charges of one study at its plan's delta. Epsilons are per patient of this site."""

    study_id: str
    train_attempts: int
    audit_attempts: int
    max_attempts: int | None
    planned_epsilon: float | None
    world: EpsilonReport
    all_others_collude: EpsilonReport

    @property
    def left(self) -> float | None:
        """Epsilon that the plan still allows; None where the plan has none."""
        if self.planned_epsilon is None:
            return None
        return max(0.0, self.planned_epsilon - self.world.reported)


@dataclass(frozen=True, kw_only=True)
class SiteBudget:
    """All studies of a site; ``total`` composes them at the policy's delta."""

    site_id: str
    studies: tuple[StudyBudget, ...]
    total: EpsilonReport
    cap: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form; an infinite epsilon is the text ``infinite``."""
        return {
            "site_id": self.site_id,
            "total": {"epsilon": _json(self.total.reported), "delta": self.total.delta, "cap": self.cap},
            "studies": [
                {
                    "study_id": study.study_id,
                    "train_attempts": study.train_attempts,
                    "audit_attempts": study.audit_attempts,
                    "max_attempts": study.max_attempts,
                    "delta": study.world.delta,
                    "planned_epsilon": study.planned_epsilon,
                    "epsilon": _json(study.world.reported),
                    "epsilon_all_others_collude": _json(study.all_others_collude.reported),
                    "accountants": {
                        "pld": _json(study.world.pld),
                        "rdp": _json(study.world.rdp),
                        "closed_form": None
                        if study.world.closed_form is None
                        else _json(study.world.closed_form),
                        "saddle_point": None
                        if study.world.saddle_point is None
                        else _json(study.world.saddle_point),
                    },
                    "left": study.left,
                }
                for study in self.studies
            ],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for people."""
        columns = [
            "study", "training", "audits", "epsilon spent", "if all others collude", "plan allows", "left",
        ]  # fmt: skip
        rows = [
            [
                study.study_id,
                f"{study.train_attempts} of {study.max_attempts or '?'}",
                str(study.audit_attempts),
                _text(study.world.reported),
                _text(study.all_others_collude.reported),
                "infinite" if study.planned_epsilon is None else f"{study.planned_epsilon:.3f}",
                "-" if study.left is None else f"{study.left:.3f}",
            ]
            for study in self.studies
        ]
        rows.append(["all studies", "", "", _text(self.total.reported), "", f"{self.cap:.3f} (policy)", ""])
        return columns, rows


def site_budget(home: SiteHome) -> SiteBudget:
    """Read and verify the ledger, also while an agent is serving.

    Raises:
        LedgerError: it is missing or damaged.
    """
    policy = home.policy()
    entries = read_ledger(home.ledger_path, key=home.identity().verify_key)
    ids = sorted(
        {str(entry.body["study_id"]) for entry in entries if entry.kind == CHARGE} | set(home.studies())
    )
    return SiteBudget(
        site_id=home.site_id,
        studies=tuple(_study(home, study_id, entries, policy.max_delta) for study_id in ids),
        total=spent(entries, delta=policy.max_delta),
        cap=policy.max_total_epsilon,
    )


def _study(
    home: SiteHome, study_id: str, entries: tuple[LedgerEntry, ...], default_delta: float
) -> StudyBudget:
    try:
        privacy = home.approved_plan(study_id).plan.privacy
    except LacunaError:
        privacy = None
    delta = default_delta if privacy is None else privacy.delta
    charges = [e for e in entries if e.kind == CHARGE and e.body["study_id"] == study_id]
    return StudyBudget(
        study_id=study_id,
        train_attempts=sum(entry.body["purpose"] == "train" for entry in charges),
        audit_attempts=sum(entry.body["purpose"] == "audit" for entry in charges),
        max_attempts=None if privacy is None else privacy.max_attempts,
        planned_epsilon=None if privacy is None else privacy.epsilon,
        world=spent(entries, delta=delta, study_id=study_id),
        all_others_collude=spent(entries, delta=delta, view="all_others_collude", study_id=study_id),
    )


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else "infinite"


def _text(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "infinite"
