"""The in-memory transport and real Flower processes give the same study."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from in_memory_consortium import Consortium

from deploy.local_consortium import LocalConsortium, SiteProcess
from server.study_store import StudyStore
from shared.checkpoint import load_tensors

AGENT = Path(__file__).parent / "known_agent.py"
ROUNDS = 2


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.timeout(600)
def test_the_same_checkpoints_survivors_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same agents, plan and arithmetic; only what carries the messages differs."""
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    consortium = Consortium(tmp_path, n=3, rounds=ROUNDS)
    study = consortium.store.root
    flower_study = tmp_path / "over-flower" / study.name
    shutil.copytree(study / "plan", flower_study / "plan")
    flower_study.chmod(0o700)
    consortium.driver().run()
    for ledger in consortium.ledgers.values():
        ledger.close()

    sites = [
        SiteProcess(
            site_id=home.site_id,
            command=[
                sys.executable, str(AGENT), str(home.root), str(study / "plan"), "{socket}", str(position),
            ],
        )
        for position, home in enumerate(consortium.homes)
    ]  # fmt: skip
    with LocalConsortium(tmp_path / "flower", sites) as flower:
        outcome = flower.run({"study-home": str(flower_study)}, timeout_s=400)
        assert outcome.completed, (outcome, flower.serverapp_log(outcome.run_id))
    there = StudyStore(flower_study)
    for number in range(1, ROUNDS + 1):
        ours, _ = load_tensors(consortium.store.checkpoint_path(number))
        theirs, _ = load_tensors(there.checkpoint_path(number))
        assert set(ours) == set(theirs)
        for name in ours:
            assert np.array_equal(ours[name], theirs[name]), name
    assert there.candidate_path.read_bytes() == consortium.store.candidate_path.read_bytes()
    assert [r.survivors for r in there.attempts() if r.status == "completed"] == [
        r.survivors for r in consortium.store.attempts() if r.status == "completed"
    ]
    there.close()
