"""A study in Prometheus' text format, from what the coordinator has: nothing of it depends on a patient."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from server.coordinator_home import CoordinatorHome
from server.study_status import study_status


def study_metrics(study_id: str) -> bytes:
    """The text of one scrape. Raises CoordinatorError if there is no such study."""
    value, registry = study_status(study_id), CollectorRegistry()
    labels = {"study": study_id}

    def gauge(name: str, help_text: str, number: float, **more: str) -> None:
        known = gauges.get(name)
        if known is None:
            known = Gauge(f"lacuna_{name}", help_text, [*labels, *more], registry=registry)
            gauges[name] = known
        known.labels(**labels, **more).set(number)

    gauges: dict[str, Any] = {}
    gauge("rounds", "Rounds of the plan", value["rounds"])
    gauge("rounds_completed", "Rounds completed", value["completed_rounds"])
    gauge("attempts_charged", "Training attempts that sites may have charged", value["charged_attempts"])
    gauge("attempts_max", "Training attempts of the plan", value["max_attempts"])
    if value["epsilon"] is not None:
        gauge("epsilon", "Epsilon charged so far, by the plan's accountant", value["epsilon"])
    if value["seconds_a_round"] is not None:
        gauge("round_seconds", "Median time of the last rounds", value["seconds_a_round"])
    for site in value["sites"]:
        name = site["site"]
        gauge("site_rounds", "Rounds that a site was part of", site["rounds"], site=name)
        gauge("site_drops", "Drops of a site", site["drops"], site=name)
        taking_part = site["state"] in ("taking part", "verdict signed")
        gauge("site_up", "1 while a site takes part", float(taking_part), site=name)
    now = datetime.now(UTC)
    for line in CoordinatorHome.default().authority.index():
        if line.good(now):
            gauge(
                "site_certificate_ends_seconds",
                "Unix time at which a site's last certificate ends",
                line.not_after,
                site=line.site_id,
            )
    return bytes(generate_latest(registry))
