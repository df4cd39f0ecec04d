"""Until when a plan is in force: nothing is trained, decided, approved or released under an expired plan.

Times are what signers state. A coordinator can put an earlier day into its own decision; the sites' and the
officer's approvals carry days of their own clocks, so an expired plan needs all of them to lie.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

from privacy.compliance.dsse import EvidenceError
from shared.study_plan import StudyPlan

TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def now_utc() -> str:
    """The present time as ``2026-01-31T12:00:00Z``."""
    return datetime.now(UTC).strftime(TIME_FORMAT)


def signed_day(at: Any, *, what: str) -> date:
    """The day of a statement's time. Raises EvidenceError if it is not of the form that Lacuna writes."""
    try:
        return datetime.strptime(at, TIME_FORMAT).replace(tzinfo=UTC).date()
    except (TypeError, ValueError) as error:
        raise EvidenceError(f"{what}: it states no time of the form 2026-01-31T12:00:00Z") from error


def check_in_force(plan: StudyPlan, at: Any, *, what: str) -> None:
    """Raise EvidenceError if a statement of time ``at`` comes after the plan's last day, or has no time."""
    if plan.expires is not None and signed_day(at, what=what) > plan.expires:
        raise EvidenceError(f"{what}: of {at}, but the plan expired on {plan.expires.isoformat()}")
