"""Status, metrics and events of both sides, after a real study in memory; nothing in them depends on data."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_memory_consortium import Consortium

from client.site_metrics import site_metrics
from client.site_status import site_status, status_rows
from server.study_metrics import study_metrics
from server.study_status import seconds_a_round, study_status
from server.transport import Fate
from shared.structured_log import log_events_to
from shared.wire import Envelope

STUDY = "driver-test"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Consortium]:
    def build(name: str, **options: Any) -> Consortium:
        monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / name / "counters"))
        monkeypatch.setenv("LACUNA_HOME", str(tmp_path / name))
        consortium = Consortium(tmp_path / name, **options)
        for home in consortium.homes:
            target = home.study(STUDY) / "plan"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(consortium.store.plan_root)
        return consortium

    return build


def test_the_coordinators_status_after_a_drop(make: Callable[..., Consortium]) -> None:
    consortium = make("one", n=4, rounds=3)

    def drop_one(node: int, leg: str, envelope: Envelope) -> Fate:
        in_round_two = consortium.store.completed_rounds() == 1
        return Fate.DROP if node == 3 and leg == "reply" and in_round_two else Fate.DELIVER

    consortium.faults = drop_one
    consortium.driver().run()
    value = study_status(STUDY)
    assert (value["completed_rounds"], value["rounds"]) == (3, 3)
    assert value["charged_attempts"] >= 3
    assert 0 < value["epsilon"] <= value["planned_epsilon"]
    assert value["seconds_left"] == 0
    by_site = {site["site"]: site for site in value["sites"]}
    assert by_site["site-0"] == {
        "site": "site-0", "state": "verdict signed", "rounds": 4, "drops": 0, "last_drop": "",
    }  # fmt: skip
    assert by_site["site-3"]["drops"] >= 1
    assert by_site["site-3"]["rounds"] < 4
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d \w", by_site["site-3"]["last_drop"])
    assert "message was lost" in json.dumps(value["events"])
    text = study_metrics(STUDY).decode()
    assert 'lacuna_rounds_completed{study="driver-test"} 3.0' in text
    assert re.search(r'lacuna_site_drops\{site="site-3",study="driver-test"\} [1-9]', text)


def test_the_pace_is_the_median_between_rounds_of_one_run() -> None:
    def event(at: float, kind: str) -> tuple[int, float, str, dict[str, Any]]:
        return 0, at, kind, {}

    assert seconds_a_round([event(0, "run_started"), event(9, "round_completed")]) is None
    ends = [event(t, "round_completed") for t in (10, 20, 32)]
    pause = [event(5000, "run_started"), event(5100, "round_completed"), event(5111, "round_completed")]
    assert seconds_a_round([event(0, "run_started"), *ends, *pause]) == 11


def test_the_sites_status(make: Callable[..., Consortium]) -> None:
    consortium = make("one", n=3, rounds=2)
    consortium.driver().run()
    value = site_status(consortium.homes[1], STUDY)
    assert (value["charges"], value["rounds"], value["alive"]) == (3, 2, False)
    assert 0 < value["epsilon"] <= 8
    rows = dict(status_rows(value))
    assert "does not answer" in rows["agent"]
    assert rows["round"] == "2 of 2"


def test_metrics_are_the_same_bytes_for_other_data(
    make: Callable[..., Consortium], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hospitals of the same study and other patients: all that their machines' metrics could show."""
    texts = []
    for name, value in (("one", 1), ("two", 7)):
        consortium = make(name, n=3, rounds=2)
        bench = consortium.benches[0]
        length = consortium.plan.model.dimension
        vector = np.full(length, value, dtype=np.int64)
        monkeypatch.setattr(bench, "training_vector", lambda _, v=vector: v)
        consortium.driver().run()
        texts.append(site_metrics(consortium.homes[0]))
    assert texts[0] == texts[1]
    text = texts[0].decode()
    assert 'lacuna_site_charges{purpose="train",study="driver-test"} 2.0' in text
    assert "seconds" not in text, "no duration: how long a step takes depends on how many patients there are"


def test_events_are_lines_of_json_with_known_facts_alone(tmp_path: Path) -> None:
    events = logging.getLogger("lacuna.events.site")
    end = log_events_to(tmp_path / "agent.jsonl")
    try:
        events.info("training", extra={"facts": {"round": 3, "attempt": 4, "patient": "patient-7"}})
        events.info("refused", extra={"facts": {"reason": "budget_exhausted"}})
        events.info("refused", extra={"facts": {"reason": "/home/x/patient-7.nii.gz"}})
        events.info("patient-7 of /home/x", extra={"facts": {"round": "patient-7"}})
    finally:
        end()
    text = (tmp_path / "agent.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert "patient" not in text
    assert "/home" not in text
    assert [line["event"] for line in lines] == ["training", "refused", "refused", "event"]
    assert (lines[0]["round"], lines[0]["attempt"]) == (3, 4)
    assert [line.get("reason") for line in lines] == [None, "budget_exhausted", None, None]
    assert (tmp_path / "agent.jsonl").stat().st_mode & 0o777 == 0o600


def test_an_agents_refusals_are_events(make: Callable[..., Consortium]) -> None:
    consortium = make("one", n=3, rounds=1)
    folder = consortium.homes[0].study(STUDY)
    end = log_events_to(folder / "agent.jsonl")
    try:
        consortium.start_agent(0)(Envelope("nonsense", {}), None)
    finally:
        end()
    assert (
        'lacuna_site_refusals{reason="unknown_request",study="driver-test"} 1.0'
        in site_metrics(consortium.homes[0]).decode()
    )
