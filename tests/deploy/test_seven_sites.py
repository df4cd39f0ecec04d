"""Seven hospitals over real Flower processes; two die in the middle of a round, and come back."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from in_memory_consortium import Consortium

from client.serving import open_ledger
from deploy.local_consortium import LocalConsortium, SiteProcess
from privacy.ledger_chain import CHARGE
from server.study_store import AttemptRecord, StudyStore
from shared.checkpoint import load_tensors

AGENT = Path(__file__).parent / "known_agent.py"
ROUNDS = 8
BEFORE, AFTER = 2, 5
"""Positions of the site that dies before its upload, and of the one that dies after."""

RELAYED_S = 8.0
"""From the agent's word that it uploaded to the reply at the SuperLink: the SuperNode's pace and more."""


class Fault:
    """In the second round: one site is killed while it trains, another when its upload has left.

    A hospital goes down as a whole, its agent and its SuperNode, and comes back after the round is over.
    """

    def __init__(self, flower: LocalConsortium, study: Path, gate: Path, homes: list[Path]) -> None:
        self._flower, self._study, self._gate, self._homes = flower, study, gate, homes
        self._uploaded_at: float | None = None
        self.killed = False
        self.round = 0

    def __call__(self) -> None:
        if self.killed:
            if any(r.round == self.round for r in completed(self._study)):
                self._flower.revive()
            return
        if not completed(self._study):
            return
        self._gate.touch()
        held = self._gate.with_suffix(".holding").exists()
        status = json.loads((self._homes[AFTER] / "status.json").read_text())
        self.round = len(completed(self._study)) + 1
        if not held or status["state"] != "uploaded" or status["round"] != self.round:
            return
        self._uploaded_at = self._uploaded_at or time.monotonic()
        if time.monotonic() - self._uploaded_at < RELAYED_S:
            return
        for index in (BEFORE, AFTER):
            self._flower.kill("agent", index)
            self._flower.kill("supernode", index)
        self._gate.unlink()
        self.killed = True


def completed(study: Path) -> list[AttemptRecord]:
    store = StudyStore(study)
    try:
        return [record for record in store.attempts("train") if record.status == "completed"]
    finally:
        store.close()


def unmasked_total(store: StudyStore, round_number: int) -> np.ndarray:
    """The round's sum in grid steps, from Adam's first moment before and after it (beta 0.9)."""
    after = load_tensors(store.checkpoint_path(round_number))[0]["adam.exp_avg"].astype(np.float64)
    before = np.zeros_like(after)
    if round_number > 1:
        before = load_tensors(store.checkpoint_path(round_number - 1))[0]["adam.exp_avg"].astype(np.float64)
    plan = store.package().plan
    average = (after - 0.9 * before) / 0.1
    return average * plan.privacy.declared_patients / plan.secure_aggregation.grid_step


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.timeout(1500)
def test_one_killed_before_and_one_after_its_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    consortium = Consortium(tmp_path, n=7, rounds=ROUNDS)
    assert consortium.plan.secure_aggregation.threshold == 5
    study = consortium.store.root
    consortium.store.close()
    for ledger in consortium.ledgers.values():
        ledger.close()
    gate = tmp_path / "gate"
    sites = [
        SiteProcess(
            site_id=home.site_id,
            command=[
                sys.executable, str(AGENT), str(home.root), str(study / "plan"), "{socket}", str(position),
            ],
            env={"KNOWN_AGENT_HOLD": str(gate)} if position == BEFORE else {},
        )
        for position, home in enumerate(consortium.homes)
    ]  # fmt: skip
    names = [home.site_id for home in consortium.homes]
    with LocalConsortium(tmp_path / "flower", sites) as flower:
        directories = [home.study(consortium.plan.study_id) for home in consortium.homes]
        fault = Fault(flower, study, gate, directories)
        outcome = flower.wait(
            flower.submit({"study-home": str(study)}), timeout_s=1200, poll_s=0.5, on_poll=fault
        )
        assert outcome.completed, (outcome, flower.serverapp_log(outcome.run_id))
    assert fault.killed

    store = StudyStore(study)
    records = {record.round: record for record in store.attempts("train") if record.status == "completed"}
    assert sorted(records) == list(range(1, ROUNDS + 1))
    for number, record in records.items():
        expected = sum(1 << names.index(site) for site in record.survivors)
        total = unmasked_total(store, number)
        assert np.abs(total - expected).max() < 0.01, (number, record.survivors, total[:3])

    broken = records[fault.round]
    assert set(broken.participants) == set(names)
    assert set(broken.survivors) == set(names) - {names[BEFORE]}, "who died after its upload is in the sum"
    assert set(records[ROUNDS].survivors) == set(names), "both rejoin"
    attempts = {record.attempt: record for record in store.attempts("train")}
    for home in consortium.homes:
        with open_ledger(home) as ledger:
            charged = {e.body["attempt"] for e in ledger.entries() if e.kind == CHARGE}
        in_sums = {number for number, r in attempts.items() if home.site_id in (r.survivors or ())}
        assert in_sums <= charged
        assert broken.attempt in charged, "charged before it trained, also where nothing arrived"
    events = [body for _, _, kind, body in store.events() if kind == "sites_dropped"]
    assert any(names[BEFORE] in body["lost"] for body in events)
    store.close()
