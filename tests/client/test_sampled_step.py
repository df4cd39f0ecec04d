"""A step in which nobody takes part is charged, noised and uploaded like any other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from agent_trio import Trio
from numpy.typing import NDArray

from privacy.audit.canaries import build_probe, probe_patient
from privacy.audit.mechanism_statistics import variance_p
from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.trainer import PatientTrainer
from privacy.ledger_chain import CHARGE
from privacy.secret_random import SecretRandom
from shared.study_plan import StudyPlan

NEVER = 2.0**-40


class SampledTrainer:
    """The production trainer with one patient, in place of known vectors."""

    def __init__(self, plan: StudyPlan) -> None:
        execution = ExecutionPlan.from_study_plan(plan)
        self.share = execution.noise_share_steps
        self._trainer = PatientTrainer(*build_probe(execution.dimension // 2), execution, SecretRandom())
        self._members = [probe_patient("only", [0, 0], 100.0 * np.eye(2))]

    def training_vector(self, weights: NDArray[np.float32]) -> NDArray[np.int64]:
        return self._trainer.distributed_update(self._members)


@pytest.fixture
def trio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trio]:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    trio = Trio(tmp_path, privacy__sampling_rate=NEVER)
    yield trio
    trio.close()


def test_an_empty_step_is_charged_and_noised(trio: Trio) -> None:
    """False-failure probability 1e-6."""
    for agent in trio.agents:
        agent._workbench = SampledTrainer(trio.plan)  # type: ignore[assignment]
    totals = [trio.complete()[1] for _ in range(3)]
    assert trio.charges() == [("train", 1), ("train", 2), ("train", 3)]
    events = [entry.event for entry in trio.ledgers[0].entries() if entry.kind == CHARGE]
    execution = ExecutionPlan.from_study_plan(trio.plan)
    assert events == [execution.training_event()] * 3
    assert events[0].sampling_rate == NEVER
    noise = math.sqrt(3) * execution.noise_share_steps
    assert variance_p(np.concatenate(totals), noise) > 1e-6
