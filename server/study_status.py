"""What ``lacuna coordinator status`` shows: nothing about patients, the server has nothing of the kind."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from server.coordinator_home import CoordinatorHome
from server.study_store import StudyStore


def study_status(study_id: str) -> dict[str, Any]:
    """Rounds, attempts and the last events of a study. Raises CoordinatorError if there is none."""
    store = StudyStore(CoordinatorHome.default().study(study_id))
    plan = store.package().plan
    try:
        attempts = store.attempts()
        events = store.events()
    finally:
        store.close()
    return {
        "study_id": study_id,
        "rounds": plan.privacy.rounds,
        "completed_rounds": store.completed_rounds(),
        "max_attempts": plan.privacy.max_attempts,
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
