"""A whole study with real processes, some of which are killed with SIGKILL in the middle of rounds."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from deploy.demo import STUDY, Demo, DemoOptions
from deploy.local_consortium import Kind, LocalConsortium
from privacy.ledger_chain import CHARGE, read_export
from server.study_store import StudyStore

pytestmark = [pytest.mark.slow, pytest.mark.flower, pytest.mark.timeout(1500)]

ROUNDS = 5


class Killer:
    """Kills one process while the attempt of a given round is open."""

    def __init__(self, demo: Callable[[], Demo], kind: Kind, round_number: int) -> None:
        self._demo = demo
        self._kind = kind
        self._round = round_number
        self.killed_at: float | None = None

    def __call__(self, consortium: LocalConsortium) -> None:
        if self.killed_at is not None:
            return
        with_store = self._demo().store
        try:
            records = with_store.attempts("train")
        finally:
            with_store.close()
        if any(record.round == self._round and record.status == "open" for record in records):
            consortium.kill(self._kind)
            self.killed_at = time.monotonic()


@pytest.mark.parametrize("kind", ["supernode", "agent", "serverapp", "superlink"])
def test_a_killed_process_does_not_stop_the_study(tmp_path: Path, kind: Kind) -> None:
    """The study completes (tried again, or resumed), and no ledger charges less than was sent."""
    output = io.StringIO()
    demo = Demo(
        options=DemoOptions(out=tmp_path / "demo", rounds=ROUNDS, samples=8),
        console=Console(file=output, width=120),
    )
    killer = Killer(lambda: demo, kind, 3)
    demo.disturb = killer
    demo.run()
    assert killer.killed_at is not None, output.getvalue()
    store: StudyStore = demo.store
    assert store.completed_rounds() == ROUNDS, output.getvalue()
    completed = [record for record in store.attempts("train") if record.status == "completed"]
    assert [record.round for record in completed] == list(range(1, ROUNDS + 1)), "no round is run again"
    plan = store.package().plan
    for entry in plan.roster.sites:
        data = (store.evidence / "ledgers" / f"{entry.site_id}.dsse.json").read_bytes()
        charged = {
            item.body["attempt"]
            for item in read_export(data, entry.verify_key).entries
            if item.kind == CHARGE and item.body["study_id"] == STUDY
        }
        uploaded = {record.attempt for record in completed if entry.site_id in record.survivors}
        assert uploaded <= charged
    store.close()


def test_five_hospitals_finish_without_one_that_dies_for_good(tmp_path: Path) -> None:
    """n = 5, t = 4: the study completes; the gate wants the dead agent's ledger, and takes it as a file."""
    output = io.StringIO()
    demo = Demo(
        options=DemoOptions(out=tmp_path / "demo", rounds=4, sites=5, samples=8),
        console=Console(file=output, width=120),
        keep_alive=False,
    )
    killer = Killer(lambda: demo, "agent", 2)
    demo.disturb = killer
    code = demo.run()
    assert killer.killed_at is not None, output.getvalue()
    store = demo.store
    assert store.completed_rounds() == 4, output.getvalue()
    assert "hospital-a" not in store.attempts("audit")[-1].survivors
    assert len(store.attempts("audit")[-1].survivors) == 4
    assert code == 40
    ledger, decision = str(tmp_path / "hospital-a.ledger.dsse.json"), str(tmp_path / "decision.dsse.json")
    demo._lacuna("hospital-a", "site", "export-ledger", "--out", ledger)
    assert (
        demo._lacuna(
            "coordinator", "coordinator", "gate", "--study", STUDY, "--ledger", ledger, "--out", decision
        )
        == 0
    ), "with the ledger of the dead hospital as a file the study can be released"
    store.close()
