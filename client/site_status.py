"""What ``lacuna site status`` shows, from the site's own files; it stays in the hospital."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.site_home import SiteHome
from client.site_network import SiteNetwork
from shared.errors import LacunaError, SiteError, UsageError

WARN_DAYS = 30


def named_study(home: SiteHome, study: str | None) -> str:
    """The study that was named, or the only one there is. Raises SiteError, UsageError."""
    approved = home.studies()
    if study is not None:
        if study not in approved:
            raise SiteError(
                f"this site has not approved a plan of study {study!r} "
                f"(approved: {', '.join(approved) or 'none'})",
                remedy="lacuna site approve PLAN",
            )
        return study
    if len(approved) != 1:
        raise UsageError(
            "name the study: " + (f"this site has {', '.join(approved)}" if approved else "none is approved")
        )
    return approved[0]


def site_status(home: SiteHome, study_id: str, *, socket: Path | None = None) -> dict[str, Any]:
    """State of the agent and its study. Raises SiteError if the agent has not run yet."""
    from privacy.ledger import read_ledger
    from privacy.ledger_chain import CHARGE, spent

    folder = home.study(study_id)
    path = folder / "status.json"
    if not path.exists():
        raise SiteError("the agent has not run yet", remedy="lacuna site serve")
    value: dict[str, Any] = json.loads(path.read_bytes())
    plan = home.approved_plan(study_id).plan
    entries = read_ledger(home.ledger_path, key=home.identity().verify_key)
    charges = [e for e in entries if e.kind == CHARGE and e.body["study_id"] == study_id]
    value["alive"] = _alive(socket or folder / "agent.sock")
    value["round"] = max((e.body["round"] for e in charges if e.body["purpose"] == "train"), default=0)
    value["rounds"] = plan.privacy.rounds
    value["charges"] = len(charges)
    value["epsilon"] = None
    value["planned_epsilon"] = plan.privacy.epsilon
    if plan.privacy.mode != "unprotected":
        value["epsilon"] = spent(charges, delta=plan.privacy.delta).reported if charges else 0.0
    value["certificate_ends"], value["certificate_days"] = _certificate(home)
    return value


def status_rows(value: dict[str, Any]) -> list[list[str]]:
    """For people: one line each, warnings in words."""
    at = datetime.fromtimestamp(value["at"], UTC)
    rows = [
        ["agent", "alive" if value["alive"] else "does not answer (lacuna site doctor)"],
        ["state", f"{value['state']} since {at:%Y-%m-%d %H:%M:%S} UTC"],
        ["round", f"{value['round']} of {value['rounds']}"],
        ["charges", str(value["charges"])],
    ]
    if value["epsilon"] is not None:
        rows.append(["epsilon", f"{value['epsilon']:.2f} of {value['planned_epsilon']:g}"])
    if value.get("reason"):
        rows.append(["last refusal", str(value["reason"])])
    days = value["certificate_days"]
    if days is not None:
        words = f"ends on {value['certificate_ends']}, in {days} days"
        rows.append(["certificate", f"{words}; lacuna site request --renew" if days < WARN_DAYS else words])
    return rows


def _alive(socket: Path) -> bool:
    from client.health import agent_is_healthy

    try:
        agent_is_healthy(socket)
    except SiteError:
        return False
    return True


def _certificate(home: SiteHome) -> tuple[str | None, int | None]:
    try:
        ends = SiteNetwork(home).certificate().not_after
    except LacunaError:
        return None, None
    return f"{ends:%Y-%m-%d}", (ends - datetime.now(UTC)).days
