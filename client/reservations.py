"""What approved plans may still charge, beside what was spent: a site's budget is a wall for whole plans.

A plan that a site approves may charge all its attempts. So before it is approved, and again before it is
served, the epsilon of everything in the ledger, of the attempts that other approved plans still have, and of
all of the plan's own attempts is held against the site's cap. Plans that expired and studies that the site
ended (``lacuna site end-study``) hold nothing back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

from client.site_home import SiteHome
from client.site_policy import SitePolicy
from privacy.dp.accounting import PrivacyEvent, epsilon
from privacy.dp.execution_plan import ExecutionPlan
from privacy.ledger import read_ledger
from privacy.ledger_chain import CHARGE, LedgerEntry, ended_studies
from shared.errors import BudgetExceededError, LacunaError, RefusedError
from shared.study_plan import StudyPlan


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """The attempts of one approved plan that the ledger does not hold yet. All of it is public."""

    study_id: str
    events: tuple[PrivacyEvent, ...]

    @classmethod
    def of(cls, plan: StudyPlan, entries: Iterable[LedgerEntry]) -> Reservation:
        """What is left of a plan after the charges among ``entries``.

        Raises:
            InvalidPlanError: the plan's noise gives no guarantee at all.
        """
        used = [
            entry.body["purpose"]
            for entry in entries
            if entry.kind == CHARGE and entry.body["study_id"] == plan.study_id
        ]
        execution = ExecutionPlan.from_study_plan(plan)
        training = max(0, execution.max_attempts - used.count("train"))
        audits = max(0, execution.max_audit_attempts - used.count("audit"))
        events = [execution.training_event()] * training + [execution.audit_event()] * audits
        return cls(study_id=plan.study_id, events=tuple(events))


def open_reservations(
    home: SiteHome, entries: Sequence[LedgerEntry], *, today: date | None = None
) -> list[Reservation]:
    """What the approved plans of a site may still charge, in the order of their ids.

    A plan that does not open is left out: no agent serves it either.
    """
    ended = ended_studies(entries)
    reservations = []
    for study_id in home.studies():
        if study_id in ended:
            continue
        try:
            plan = home.approved_plan(study_id).plan
            if not plan.expired(today or datetime.now(UTC).date()):
                reservations.append(Reservation.of(plan, entries))
        except LacunaError:
            continue
    return reservations


def check_room(
    plan: StudyPlan,
    *,
    policy: SitePolicy,
    entries: Sequence[LedgerEntry],
    others: Iterable[Reservation] = (),
) -> None:
    """Refuse a plan that could bring the site past its cap, before anything is computed for it.

    Args:
        entries: The site's ledger.
        others: What other approved plans may still charge; the plan's own is not among them.

    Raises:
        RefusedError: the study was ended at this site.
        BudgetExceededError: with both figures, what was spent and what is reserved.
    """
    if plan.study_id in ended_studies(entries):
        raise RefusedError(
            f"study {plan.study_id!r} was ended at this site, for good",
            remedy="ask the coordinator for a new study id",
        )
    if plan.privacy.mode == "unprotected":
        return
    others = [other for other in others if other.study_id != plan.study_id and other.events]
    spent = [entry.event for entry in entries if entry.kind == CHARGE]
    reserved = [event for other in others for event in other.events]
    own = Reservation.of(plan, entries)
    cap, delta = policy.max_total_epsilon, policy.max_delta
    whole = epsilon([*spent, *reserved, *own.events], delta).reported
    if whole <= cap:
        return
    before = epsilon(spent, delta).reported
    held = epsilon([*spent, *reserved], delta).reported
    names = ", ".join(other.study_id for other in others) or "no other study"
    raise BudgetExceededError(
        f"study {plan.study_id!r} could bring this site to epsilon {whole:.4g} at delta {delta:g}; its cap "
        f"is {cap:g} (max_total_epsilon). Spent: {before:.4g}; with what is reserved for {names}: {held:.4g}",
        remedy="ask for a plan with a smaller epsilon, end a study that is over (lacuna site end-study), or "
        "raise max_total_epsilon if this hospital agrees",
    )


def check_room_at(home: SiteHome, plan: StudyPlan) -> None:
    """:func:`check_room` with the site's files as they are; also while an agent is serving.

    Raises:
        LedgerError: the ledger cannot be read or does not verify.
    """
    entries = read_ledger(home.ledger_path, key=home.identity().verify_key)
    check_room(plan, policy=home.policy(), entries=entries, others=open_reservations(home, entries))
