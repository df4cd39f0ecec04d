"""What ``lacuna coordinator status`` shows: nothing about patients, the server has nothing of the kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import median
from typing import Any

from privacy.dp.accounting import epsilon
from privacy.dp.execution_plan import ExecutionPlan
from server.authority import CertificateAuthority
from server.coordinator_home import CoordinatorHome
from server.study_store import AttemptRecord, StudyStore
from shared.study_plan import StudyPlan

RECENT_ROUNDS = 10
Event = tuple[int, float, str, dict[str, Any]]


def study_status(study_id: str) -> dict[str, Any]:
    """Rounds, attempts, sites and the last events of a study. Raises CoordinatorError if there is none."""
    store = StudyStore(CoordinatorHome.default().study(study_id))
    plan = store.package().plan
    try:
        attempts = store.attempts()
        events = store.events()
        trained, audited = store.charged_attempts("train"), store.charged_attempts("audit")
    finally:
        store.close()
    done = store.completed_rounds()
    pace_s = seconds_a_round(events)
    return {
        "study_id": study_id,
        "rounds": plan.privacy.rounds,
        "completed_rounds": done,
        "max_attempts": plan.privacy.max_attempts,
        "charged_attempts": trained,
        "seconds_a_round": pace_s,
        "seconds_left": None if pace_s is None else pace_s * (plan.privacy.rounds - done),
        "epsilon": _epsilon(plan, trained, audited),
        "planned_epsilon": plan.privacy.epsilon,
        "delta": plan.privacy.delta,
        "sites": site_states(plan, attempts, events, _revoked(store)),
        "attempts": [
            {**asdict(record), "participants": list(record.participants), "survivors": list(record.survivors)}
            for record in attempts
        ],
        "candidate": store.candidate_path.exists(),
        "decision": store.decision_path.exists(),
        "released": store.bundle_path.exists(),
        "events": [
            {"at": datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S"), "kind": kind, "body": body}
            for _, at, kind, body in events[-50:]
        ],
    }


def seconds_a_round(events: Sequence[Event]) -> float | None:
    """Median time from one completed round to the next, over the last ten of one run; None before two."""
    times: list[float] = []
    last: float | None = None
    for _, at, kind, _ in events:
        if kind == "run_started":
            last = None
        elif kind == "round_completed":
            if last is not None:
                times.append(at - last)
            last = at
    return median(times[-RECENT_ROUNDS:]) if times else None


def site_states(
    plan: StudyPlan, attempts: Sequence[AttemptRecord], events: Sequence[Event], revoked: frozenset[str]
) -> list[dict[str, Any]]:
    """For each site: its state at the coordinator, the rounds it was part of, its drops and why the last."""
    states: dict[str, dict[str, Any]] = {
        entry.site_id: {
            "site": entry.site_id,
            "state": "not seen yet",
            "rounds": 0,
            "drops": 0,
            "last_drop": "",
        }
        for entry in plan.roster.sites
    }
    for record in attempts:
        for site in record.survivors if record.status == "completed" else ():
            states[site]["rounds"] += 1
    for _, at, kind, body in events:
        if kind in ("attempt_opened", "round_completed", "audit_completed"):
            for site in body.get("participants") or body.get("survivors") or ():
                states[site]["state"] = "taking part"
        for site, reason in (body.get("lost") or {}).items():
            if site in states:
                when = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
                states[site]["drops"] += 1
                states[site].update(state="dropped", last_drop=f"{when} {str(reason)[:80]}")
        for site in body.get("missing") or () if kind == "waiting_for_sites" else ():
            states[site]["state"] = "waited for"
        if kind == "verdict_received":
            states[body["site"]]["state"] = "verdict signed"
    for entry in plan.roster.sites:
        if entry.identity_key in revoked:
            states[entry.site_id]["state"] = "revoked"
    return list(states.values())


def _revoked(store: StudyStore) -> frozenset[str]:
    return CertificateAuthority(store.root.parent).revoked_identities()


def _epsilon(plan: StudyPlan, trained: int, audited: int) -> float | None:
    """Charged so far, for a patient at a site that was asked in every attempt; None without protection."""
    if plan.privacy.mode == "unprotected":
        return None
    execution = ExecutionPlan.from_study_plan(plan)
    events = [execution.training_event()] * trained + [execution.audit_event()] * audited
    return epsilon(events, plan.privacy.delta).reported if events else 0.0
