"""A site in Prometheus' text format.

Only what follows from the plan, from messages and from certificates: rounds, charges, refusals by reason. No
duration of a step and no size of anything: both depend on how many patients there are. A test holds two
sites with different data to the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from client.site_home import SiteHome
from client.site_network import SiteNetwork
from privacy.ledger import read_ledger
from privacy.ledger_chain import CHARGE, spent
from shared.errors import LacunaError


def site_metrics(home: SiteHome) -> bytes:
    """The text of one scrape; also while an agent serves. Raises SiteError, LedgerError: no such site."""
    registry = CollectorRegistry()
    entries = read_ledger(home.ledger_path, key=home.identity().verify_key)
    charges = Counter((e.body["study_id"], e.body["purpose"]) for e in entries if e.kind == CHARGE)

    def gauge(name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"lacuna_site_{name}", words, labels, registry=registry)

    charged = gauge("charges", "Attempts charged to the ledger", "study", "purpose")
    spending = gauge("epsilon", "Epsilon charged, at the plan's delta", "study")
    planned = gauge("epsilon_planned", "Epsilon of the plan", "study")
    refusals = gauge("refusals", "Requests refused, by reason", "study", "reason")
    at_round = gauge("round", "Last round that was charged", "study")
    for (study, purpose), count in sorted(charges.items()):
        charged.labels(study, purpose).set(count)
    for study in home.studies():
        plan = home.approved_plan(study).plan
        if plan.privacy.epsilon is not None:
            planned.labels(study).set(plan.privacy.epsilon)
            own = spent(entries, delta=plan.privacy.delta, study_id=study)
            spending.labels(study).set(own.reported if own.n_events else 0.0)
        for reason, count in sorted(_refusals(home.study(study) / "agent.jsonl").items()):
            refusals.labels(study, reason).set(count)
        rounds = [e.body["round"] for e in entries if e.kind == CHARGE and e.body["study_id"] == study]
        at_round.labels(study).set(min(max(rounds, default=0), plan.privacy.rounds))
    try:
        ends = SiteNetwork(home).certificate().not_after.timestamp()
    except LacunaError:
        ends = None
    if ends is not None:
        gauge("certificate_ends_seconds", "Unix time at which the certificate ends").set(ends)
    return bytes(generate_latest(registry))


def _refusals(log: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            value = json.loads(line)
            if value.get("event") == "refused":
                found[str(value.get("reason"))] += 1
    return found
