"""The agent's third accountant: Opacus' PRV (Gopi, Lee, Wutschitz, NeurIPS 2021).

It shares no code with ``dp-accounting`` nor with :mod:`privacy.dp.saddle_point`, and works for sampling rates
below 1. It needs torch, so ledger, gate and officer do without; the agent holds it against the others before
it serves a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from opacus.accountants import PRVAccountant

from privacy.dp.accounting import AccountantsDisagreeError, EpsilonReport, PrivacyEvent, View, epsilon
from privacy.dp.execution_plan import ExecutionPlan

VIEWS: tuple[View, ...] = ("world", "all_others_collude")

PRV_TOLERANCE = 1e-2
PRV_ERROR = 0.01
"""PRV's own bound on its error (absolute), and the relative difference allowed beyond it."""


def prv_epsilon(events: Iterable[PrivacyEvent], delta: float, *, view: View = "world") -> float:
    """Epsilon by Opacus' PRV accountant; infinite where an event is unprotected, 0 without events."""
    accountant = PRVAccountant()
    divergence = 0.0
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        if event.kind == "unprotected/v1":
            return math.inf
        group = (event.noise_multiplier(view), event.sampling_rate)
        counts[group] = counts.get(group, 0) + event.steps
        divergence += event.max_divergence
    if not counts:
        return 0.0
    accountant.history = [(sigma, q, steps) for (sigma, q), steps in sorted(counts.items())]
    found = accountant.get_epsilon(delta * math.exp(-divergence), eps_error=PRV_ERROR)
    return float(found) + 2.0 * divergence


def agreed_epsilon(
    events: Iterable[PrivacyEvent], delta: float, *, view: View = "world"
) -> tuple[float, EpsilonReport]:
    """The larger of PRV and :func:`privacy.dp.accounting.epsilon`, with the latter's report.

    Raises:
        AccountantsDisagreeError: they differ by more than PRV_ERROR plus 1%.
    """
    events = list(events)
    report = epsilon(events, delta, view=view)
    second = prv_epsilon(events, delta, view=view)
    if math.isfinite(report.reported) or math.isfinite(second):
        larger = max(report.reported, second)
        if not abs(report.reported - second) <= PRV_ERROR + PRV_TOLERANCE * larger:
            raise AccountantsDisagreeError(
                f"epsilon by privacy loss distribution is {report.reported:.6g}, by PRV {second:.6g}"
            )
    return max(report.reported, second), report


def check_planned_epsilon(execution: ExecutionPlan) -> None:
    """Hold PRV against the other accountants on every attempt that a plan may charge, for both observers.

    Does nothing where every patient takes part in every step: the closed form is exact there. What counts is
    the larger of privacy loss distributions and contour integral, as everywhere; PRV's figure is an upper end
    that lies PRV_ERROR above.

    Raises:
        AccountantsDisagreeError: they differ by more than PRV_ERROR plus 1%; the plan is not served.
    """
    if execution.mode == "unprotected" or execution.sampling_rate == 1:
        return
    events = [execution.training_event()] * execution.max_attempts
    events += [execution.audit_event()] * execution.max_audit_attempts
    for view in VIEWS:
        agreed_epsilon(events, execution.delta, view=view)
