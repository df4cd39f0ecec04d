"""What this site has spent, reserved and left, from its own ledger: per study, and over all studies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Literal

from client.reservations import Reservation, open_reservations
from client.site_home import SiteHome
from privacy.dp.accounting import EpsilonReport, epsilon
from privacy.ledger import read_ledger
from privacy.ledger_chain import CHARGE, LedgerEntry, ended_studies, spent
from shared.errors import LacunaError

StudyState = Literal["open", "ended", "expired", "no plan"]
"""Only an ``open`` study may charge more; ``no plan``: its approved plan is not there, or does not open."""

BAR_CELLS = 40
MAX_HISTORY = 40
"""Longer histories are thinned evenly to so many points (each an exact figure)."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """A cap in three parts that add up to it: ``spent``, ``reserved`` for attempts that were approved and
    not charged yet, ``left``. Epsilons; all of it infinite or None where there is no cap.

    Epsilons do not add up over studies. ``reserved`` is what epsilon grows by when all that is approved is
    charged on top of what was spent.
    """

    spent: float
    reserved: float
    cap: float | None

    @property
    def left(self) -> float | None:
        """What nothing holds; None without a cap."""
        return None if self.cap is None else max(0.0, self.cap - self.spent - self.reserved)

    @classmethod
    def of(cls, spent: EpsilonReport, whole: EpsilonReport, cap: float | None) -> Shares:
        """From epsilon now, and when all that is approved will have been charged."""
        grown = 0.0 if math.isinf(spent.reported) else whole.reported - spent.reported
        return cls(spent=spent.reported, reserved=max(0.0, grown), cap=cap)

    def to_dict(self) -> dict[str, Any]:
        return {"epsilon": _json(self.spent), "reserved": _json(self.reserved), "left": self.left}

    def bar(self) -> str:
        """Spent, reserved and left as cells of one line; empty without a cap."""
        if self.cap is None:
            return ""
        taken = math.ceil(BAR_CELLS * min(self.spent / self.cap, 1.0))
        held = math.ceil(BAR_CELLS * min((self.spent + self.reserved) / self.cap, 1.0))
        return "█" * taken + "▒" * (held - taken) + "·" * (BAR_CELLS - held)


@dataclass(frozen=True, kw_only=True)
class HistoryPoint:
    """Epsilon after the charge with this number (from 1, in the order of charging), at a round."""

    charge: int
    round: int
    purpose: str
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class StudyBudget:
    """Charges of one study at its plan's delta. Epsilons are per patient of this site."""

    study_id: str
    state: StudyState
    train_attempts: int
    audit_attempts: int
    max_attempts: int | None
    max_audit_attempts: int | None
    planned_epsilon: float | None
    shares: Shares
    world: EpsilonReport
    all_others_collude: EpsilonReport
    history: tuple[HistoryPoint, ...]

    @property
    def left(self) -> float | None:
        """Epsilon of the plan that is neither spent nor reserved; None where the plan has none."""
        return self.shares.left

    def to_dict(self) -> dict[str, Any]:
        """JSON form; an infinite epsilon is the text ``infinite``."""
        report = self.world
        return {
            "study_id": self.study_id,
            "state": self.state,
            "train_attempts": self.train_attempts,
            "audit_attempts": self.audit_attempts,
            "max_attempts": self.max_attempts,
            "max_audit_attempts": self.max_audit_attempts,
            "delta": report.delta,
            "planned_epsilon": self.planned_epsilon,
            **self.shares.to_dict(),
            "epsilon_all_others_collude": _json(self.all_others_collude.reported),
            "accountants": {
                name: None if value is None else _json(value)
                for name, value in (
                    ("pld", report.pld),
                    ("rdp", report.rdp),
                    ("closed_form", report.closed_form),
                    ("saddle_point", report.saddle_point),
                )
            },
            "history": _history_json(self.history),
        }


@dataclass(frozen=True, kw_only=True)
class SiteBudget:
    """All studies of a site; ``total`` composes them at the policy's delta."""

    site_id: str
    studies: tuple[StudyBudget, ...]
    total: EpsilonReport
    shares: Shares
    cap: float
    history: tuple[HistoryPoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; an infinite epsilon is the text ``infinite``."""
        return {
            "site_id": self.site_id,
            "total": {
                **self.shares.to_dict(),
                "delta": self.total.delta,
                "cap": self.cap,
                "history": _history_json(self.history),
            },
            "studies": [study.to_dict() for study in self.studies],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for people."""
        columns = ["study", "training", "audits", "cap", "spent", "reserved", "left", "if all others collude"]
        rows = [
            [
                f"{study.study_id} ({study.state})",
                f"{study.train_attempts} of {study.max_attempts or '?'}",
                f"{study.audit_attempts} of {study.max_audit_attempts or '?'}",
                *_cells(study.shares),
                _text(study.all_others_collude.reported),
            ]
            for study in self.studies
        ]
        return columns, [*rows, ["all studies", "", "", *_cells(self.shares), ""]]

    def bars(self) -> list[str]:
        """A line for each study that has a cap, one for the site, and what the signs mean."""
        named = [(study.study_id, study.shares) for study in self.studies] + [("all studies", self.shares)]
        width = max(len(name) for name, _ in named)
        lines = [f"{name:{width}}  {shares.bar()}" for name, shares in named if shares.cap is not None]
        return [*lines, f"{'':{width}}  █ spent  ▒ reserved  · left"]


def site_budget(home: SiteHome, *, today: date | None = None, with_history: bool = True) -> SiteBudget:
    """Read and verify the ledger, also while an agent is serving.

    Args:
        today: Day to hold plans' last days against; by default the present, UTC.
        with_history: False leaves ``history`` empty, which saves most of the time.

    Raises:
        LedgerError: it is missing or damaged.
    """
    policy = home.policy()
    day = today or datetime.now(UTC).date()
    entries = read_ledger(home.ledger_path, key=home.identity().verify_key)
    charges = [entry for entry in entries if entry.kind == CHARGE]
    reservations = {c.study_id: c for c in open_reservations(home, entries, today=day)}
    ids = sorted({str(entry.body["study_id"]) for entry in charges} | set(home.studies()))
    total = spent(entries, delta=policy.max_delta)
    reserved = [event for reservation in reservations.values() for event in reservation.events]
    whole = epsilon([*(entry.event for entry in charges), *reserved], policy.max_delta)
    return SiteBudget(
        site_id=home.site_id,
        studies=tuple(
            _study(home, study_id, entries, reservations.get(study_id), policy.max_delta, day, with_history)
            for study_id in ids
        ),
        total=total,
        shares=Shares.of(total, whole, policy.max_total_epsilon),
        cap=policy.max_total_epsilon,
        history=_history(charges, policy.max_delta) if with_history else (),
    )


def _study(
    home: SiteHome,
    study_id: str,
    entries: Sequence[LedgerEntry],
    reservation: Reservation | None,
    default_delta: float,
    day: date,
    with_history: bool,
) -> StudyBudget:
    try:
        plan = home.approved_plan(study_id).plan
    except LacunaError:
        plan = None
    privacy = None if plan is None else plan.privacy
    state: StudyState = "open"
    if study_id in ended_studies(entries):
        state = "ended"
    elif plan is None:
        state = "no plan"
    elif plan.expired(day):
        state = "expired"
    delta = default_delta if privacy is None else privacy.delta
    charges = [e for e in entries if e.kind == CHARGE and e.body["study_id"] == study_id]
    world = spent(entries, delta=delta, study_id=study_id)
    events = [*(entry.event for entry in charges), *(reservation.events if reservation is not None else ())]
    planned = None if privacy is None else privacy.epsilon
    return StudyBudget(
        study_id=study_id,
        state=state,
        train_attempts=sum(entry.body["purpose"] == "train" for entry in charges),
        audit_attempts=sum(entry.body["purpose"] == "audit" for entry in charges),
        max_attempts=None if privacy is None else privacy.max_attempts,
        max_audit_attempts=None if privacy is None else privacy.max_audit_attempts,
        planned_epsilon=planned,
        shares=Shares.of(world, epsilon(events, delta), planned),
        world=world,
        all_others_collude=spent(entries, delta=delta, view="all_others_collude", study_id=study_id),
        history=_history(charges, delta) if with_history else (),
    )


def _history(charges: Sequence[LedgerEntry], delta: float) -> tuple[HistoryPoint, ...]:
    """Epsilon after each charge; the last point is always there."""
    count = len(charges)
    step = max(1, math.ceil(count / MAX_HISTORY))
    places = sorted({*range(step - 1, count, step), *([count - 1] if count else [])})
    return tuple(
        HistoryPoint(
            charge=place + 1,
            round=int(charges[place].body["round"]),
            purpose=str(charges[place].body["purpose"]),
            epsilon=epsilon([entry.event for entry in charges[: place + 1]], delta).reported,
        )
        for place in places
    )


def _history_json(history: Sequence[HistoryPoint]) -> list[dict[str, Any]]:
    return [
        {
            "charge": point.charge,
            "round": point.round,
            "purpose": point.purpose,
            "epsilon": _json(point.epsilon),
        }
        for point in history
    ]


def _cells(shares: Shares) -> list[str]:
    cap = "none" if shares.cap is None else f"{shares.cap:.3f}"
    left = "-" if shares.left is None else f"{shares.left:.3f}"
    return [cap, _text(shares.spent), _text(shares.reserved), left]


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else "infinite"


def _text(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "infinite"
