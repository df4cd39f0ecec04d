"""A real small study with a broken installation is refused by the gate, by the name of what is broken.

Three hospitals with simulated patients, real agents, networks, ledgers, secure aggregation, audit and gate;
the transport alone is in memory. The mutants are those of ``mechanism_mutants``; they change what the sites
run, in training and in the mechanism audit alike, and nothing of the gate. A site that meets its own broken
installation refuses to serve; here it serves nevertheless, so that the gate has to see it.

A true installation fails its audit with probability at most 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import mechanism_mutants as mutants
import numpy as np
import pytest
import torch
from in_memory_consortium import PACE, Consortium

from client.canaries import CanaryCoins, commit_to_canaries
from client.ingest.nifti import NiftiFolder
from client.ingest.phantoms import write_phantom_folder
from client.mechanism_audit import audit_for_plan
from client.patient_dataset import SiteStore
from client.scan_import import import_scans
from client.site_agent import MECHANISM_FILE, Workbench
from client.workbench import SiteWorkbench
from privacy.audit.canary_opening import COMMITMENT_KIND
from privacy.dp import execution_plan as execution_plan_module
from privacy.dp import trainer as trainer_module
from privacy.dp.trainer import PatientTrainer
from privacy.ledger_chain import CHARGE
from privacy.secret_random import SecretRandom
from server.gating import decide
from server.release.gate import GateDecision
from server.round_driver import RoundDriver
from shared.errors import RefusedError
from shared.volumes.phantom import simulate_cohort

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Break = Callable[[pytest.MonkeyPatch], None]


class SmallStudy(Consortium):
    """Real patients' work at every site; ``broken`` changes what the sites run."""

    CLAUSES: ClassVar[dict[str, Any]] = {
        "audit.mechanism_canaries": 160,
        "audit.canaries_per_site": 6,
        "audit.low_power": "accept",
        "audit.copy_samples": 2,
        "model.sampling_steps": 2,
    }
    broken: Break | None = None

    def make_workbench(self, i: int, directory: Path) -> Workbench:
        home, plan = self.homes[i], self.plan
        cohort = simulate_cohort(n_patients=6, conditions_fractions={"common": 0.5, "rare": 0.5}, seed=i)
        write_phantom_folder(cohort, directory / "scans")
        store = SiteStore.create(home.store_path(plan.study_id))
        import_scans(NiftiFolder(path=directory / "scans"), store, plan.data)
        self.refusals = getattr(self, "refusals", [])
        with self._broken():
            try:
                audit_for_plan(
                    self.package, site_id=home.site_id, key=home.identity(), path=directory / MECHANISM_FILE
                )
            except RefusedError as refused:
                self.refusals.append(refused.message)
        commit_to_canaries(CanaryCoins.of_store(store, plan, site_id=home.site_id), self.ledgers[i])
        bench = SiteWorkbench(home=home, package=self.package, secret=SecretRandom())
        train = bench.training_vector

        def training_vector(weights: np.ndarray) -> np.ndarray:
            with self._broken():
                return train(weights)

        bench.training_vector = training_vector  # type: ignore[method-assign]
        return bench

    def driver(self, run_id: str = "1") -> RoundDriver:
        patient = replace(PACE, exchange_s=1500.0, quorum_s=1500.0)
        return RoundDriver(self.transport, self.store, run_id=run_id, pace=patient)

    @contextmanager
    def _broken(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if self.broken is not None:
                type(self).broken(patch)  # type: ignore[misc]
            yield


def study(root: Path, broken: Break | None = None, **changes: Any) -> tuple[SmallStudy, GateDecision]:
    """Run it to the gate's decision."""
    torch.set_num_threads(1)
    kind = type(
        "Study",
        (SmallStudy,),
        {
            "broken": None if broken is None else staticmethod(broken),
            "SAMPLING_RATE": changes.pop("sampling_rate", 1.0),
            "CLAUSES": {**SmallStudy.CLAUSES, **changes},
        },
    )
    run = kind(root, n=3, rounds=2)
    outcome = run.driver().run()
    assert outcome.verdicts == ("site-0", "site-1", "site-2")
    return run, decide(run.store, run.coordinator)


@pytest.fixture(autouse=True)
def _counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))


def test_the_honest_study_is_released_and_its_canaries_were_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[set[str]] = []
    original = PatientTrainer.distributed_update

    def watched(self: PatientTrainer, patients: Any) -> Any:
        trained.append({patient.patient_key for patient in patients})
        return original(self, patients)

    monkeypatch.setattr(PatientTrainer, "distributed_update", watched)
    run, decision = study(tmp_path)
    assert decision.released, [(c.name, c.reason) for c in decision.failed]
    assert run.refusals == []
    for name in ("mechanism-audits", "canaries-committed", "audit-canaries"):
        assert decision.condition(name).passed
    assert "of 18 coins guessed" in decision.condition("audit-canaries").reason
    for i in range(3):
        store = SiteStore.open(run.homes[i].store_path(run.plan.study_id))
        coins = CanaryCoins.of_store(store, run.plan, site_id=f"site-{i}").coins
        wanted = {f"canary-{k}" for k, coin in enumerate(coins) if coin}
        members = {scan.patient_key for scan in store.members(run.plan.audit.holdout_share)}
        assert sum(keys == members | wanted for keys in trained) == 2  # in both rounds, with members
        kinds = [entry.kind for entry in run.ledgers[i].entries()]
        assert kinds.index(COMMITMENT_KIND) < kinds.index(CHARGE)


def noise(draw: Callable[[], mutants.Draw]) -> Break:
    return lambda patch: patch.setattr(trainer_module, "noise_share", draw())


def no_grid(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(execution_plan_module, "clipped_sum_sensitivity", mutants.without_rounding)


MUTANTS: dict[str, tuple[Break, set[str], dict[str, Any]]] = {
    "noise halved": (noise(lambda: mutants.scaled(0.5)), {"share-variance", "total-variance"}, {}),
    "noise missing at one site": (noise(mutants.missing_at_one_site), {"share-variance"}, {}),
    "same seed at two sites": (noise(mutants.same_seed_at_two_sites), {"independence"}, {}),
    "same seed in two rounds": (noise(mutants.same_seed_in_two_rounds), {"independence"}, {}),
    "clipping per scan": (mutants.clip_per_scan, {"clipping"}, {}),
    "sum of draws": (mutants.sum_draws, {"averaging"}, {}),
    "division by the actual batch": (
        lambda patch: mutants.divide_by_actual_batch(patch, None),
        {"clipping", "averaging", "nothing-else"},
        {"sampling_rate": 0.5},
    ),
    "sensitivity of the grid left out": (no_grid, {"charged-sensitivity", "charged-event"}, {}),
}


@pytest.mark.parametrize(("broken", "names", "changes"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_installation_is_refused_by_name(
    tmp_path: Path, broken: Break, names: set[str], changes: dict[str, Any]
) -> None:
    run, decision = study(tmp_path, broken, **changes)
    assert not decision.released
    condition = decision.condition("mechanism-audits")
    assert not condition.passed
    assert any(name in condition.reason for name in names), condition.reason
    assert all(f"mechanism audit of site-{i}" in condition.reason for i in range(3))
    # Each site saw it first, and would not have served.
    assert len(run.refusals) == 3 and all("not the mechanism" in refusal for refusal in run.refusals)
