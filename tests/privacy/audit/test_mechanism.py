"""The mechanism audit passes the true path, and each broken path fails, by the name of what is broken.

Every mutant changes production code (trainer, clipping, noise, coins, sensitivity, masks) and nothing of
the audit; what fails is the audit's own verdict at its stated level. So each test of the true path fails by
chance with probability at most 1e-6; what the mutants' tests need happens, by each one's margin, with
probability above 1 - 1e-6.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mechanism_mutants import (
    Draw,
    clip_per_scan,
    divide_by_actual_batch,
    missing_at_one_site,
    same_seed_at_two_sites,
    same_seed_in_two_rounds,
    scaled,
    sum_draws,
    without_rounding,
)

from privacy.audit.mechanism import AuditSize, MechanismAudit, NetworkUnderAudit, audit_mechanism
from privacy.dp import execution_plan as execution_plan_module
from privacy.dp import trainer as trainer_module
from privacy.dp.calibration import propose_privacy
from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.patient_gradients import PatientGradients
from privacy.dp.patients import PatientScans
from privacy.dp.trainer import PatientTrainer
from privacy.secagg import server_rounds, site_masking
from privacy.secret_random import SecretRandom
from shared.errors import UsageError

_spec = importlib.util.spec_from_file_location(
    "dp_networks", Path(__file__).parents[1] / "dp" / "networks.py"
)
assert _spec is not None and _spec.loader is not None
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

SITES = ("north", "east", "south", "west")
SMALL = AuditSize(
    canaries=400, empty_steps=2, canary_steps=2, signal_steps=1, sampled_signal_steps=12, grid_pairs=2
)
SMALL_SAMPLED = replace(SMALL, canaries=160)


@cache
def plan(q: float = 1.0, epsilon: float = 8.0, dimension: int = 60_000) -> ExecutionPlan:
    """Four sites, one of which may drop: t = 3, t - c = 2."""
    return propose_privacy(
        mode="distributed", epsilon=epsilon, delta=1e-5, clip_norm=0.5, rounds=20, n_sites=4, threshold=3,
        max_colluding=1, dimension=dimension, declared_patients=60, sampling_rate=q,
    ).execution  # fmt: skip


def audit(execution: ExecutionPlan, size: AuditSize | None = None, **options: Any) -> MechanismAudit:
    if size is None:
        size = SMALL if execution.sampling_rate == 1 else SMALL_SAMPLED
    return audit_mechanism(execution, SITES, study_digest="ab" * 32, size=size, **options)


def failed(execution: ExecutionPlan, **options: Any) -> set[str]:
    return {check.name for check in audit(execution, **options).failed}


@pytest.mark.parametrize("q", [1.0, 0.5])
def test_the_true_path_passes(q: float) -> None:
    seen: list[tuple[str, int, int]] = []
    result = audit(plan(q), progress=lambda *facts: seen.append(facts))
    assert result.passed, result.failed
    assert 0.99e-6 < result.false_failure_probability <= 1e-6 * (1 + 1e-9)
    assert {part for part, _, _ in seen} == {"noise", "signal", "grid"}
    assert all(check.tests > 0 for check in result.checks)
    assert seen[-1][1] == seen[-1][2]


@pytest.mark.slow
@pytest.mark.parametrize(("q", "epsilon"), [(1.0, 8.0), (1.0, 1.0), (0.25, 3.0)])
def test_the_true_path_passes_at_full_size(q: float, epsilon: float) -> None:
    result = audit(plan(q, epsilon), AuditSize())
    assert result.passed, result.failed
    assert result.canaries == 1024


def small_network() -> NetworkUnderAudit:
    def build() -> tuple[Any, Any, Any]:
        network = networks.small_denoiser()
        return network, networks.parameters(network), networks.loss

    return NetworkUnderAudit(build=build, latent_shape=networks.SHAPE, n_conditions=3)


def network_plan() -> ExecutionPlan:
    return plan(dimension=sum(p.numel() for p in networks.small_denoiser().parameters()))


def test_the_plans_own_network_passes() -> None:
    result = audit(network_plan(), replace(SMALL, canaries=8), network=small_network())
    assert {c.name for c in result.checks if c.name.startswith("network-")} == {
        "network-clipping", "network-variance", "network-independence", "network-unmasking",
    }  # fmt: skip
    assert all(check.passed for check in result.checks if check.name.startswith("network-")), result.failed


# Mutants of noise.


def uniform_noise(plan: ExecutionPlan, secret: SecretRandom) -> np.ndarray:
    """The right variance and the wrong shape."""
    width = plan.noise_share_steps * math.sqrt(12)
    return np.rint(width * (secret.uniform(plan.dimension) - 0.5)).astype(np.int64)


@pytest.mark.parametrize(
    ("mutant", "names"),
    [
        (scaled(0.5), {"share-variance", "total-variance"}),
        (scaled(2.0), {"share-variance", "total-variance"}),
        (missing_at_one_site(), {"share-variance"}),
        (same_seed_at_two_sites(), {"independence", "total-variance"}),
        (same_seed_in_two_rounds(), {"independence"}),
        (uniform_noise, {"share-shape"}),
    ],
    ids=["halved", "doubled", "missing at one site", "two sites", "two rounds", "uniform"],
)
def test_broken_noise_fails(monkeypatch: pytest.MonkeyPatch, mutant: Draw, names: set[str]) -> None:
    monkeypatch.setattr(trainer_module, "noise_share", mutant)
    assert names <= failed(plan())


@pytest.mark.slow
def test_noise_off_by_three_percent_fails_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """130,000 draws: the variance is 15 standard deviations from its claim, the level is 6."""
    monkeypatch.setattr(trainer_module, "noise_share", scaled(0.97))
    assert "share-variance" in failed(plan(), size=AuditSize())


def test_noise_left_out_where_nobody_takes_part_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PatientTrainer.distributed_update

    def wrong(self: PatientTrainer, patients: Sequence[PatientScans]) -> np.ndarray:
        return original(self, patients) if patients else np.zeros(self._plan.dimension, dtype=np.int64)

    monkeypatch.setattr(PatientTrainer, "distributed_update", wrong)
    assert "share-variance" in failed(plan())


# Mutants of clipping and averaging.


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["added", "averaged"])
def test_clipping_per_scan_fails(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    clip_per_scan(monkeypatch, share)
    assert "clipping" in failed(plan())
    assert "network-clipping" in failed(
        network_plan(), size=replace(SMALL, canaries=8), network=small_network()
    )


def test_sum_of_draws_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss summed over a patient's draws: the gradient is K times too long before it is clipped."""
    sum_draws(monkeypatch)
    assert "averaging" in failed(plan())


@pytest.mark.parametrize("rescaled", ["by the declared number", "by the site's expected batch"])
def test_division_by_the_actual_batch_fails(monkeypatch: pytest.MonkeyPatch, rescaled: str) -> None:
    """At q = 0.5. The second is right on average, so only the coins of each step show it."""
    constant = plan(0.5).sum_divisor / 4 if rescaled == "by the declared number" else None
    divide_by_actual_batch(monkeypatch, constant)
    assert failed(plan(0.5)) & {"clipping", "averaging", "nothing-else"}


def test_a_patient_who_is_not_finite_and_counts_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PatientGradients.clipped_sum

    def wrong(self: PatientGradients, patients: Sequence[PatientScans], *rest: Any, **options: Any) -> Any:
        mended = [
            replace(patient, latents_SCDHW=torch.nan_to_num(patient.latents_SCDHW, nan=1.0, posinf=1.0))
            for patient in patients
        ]
        return original(self, mended, *rest, **options)

    monkeypatch.setattr(PatientGradients, "clipped_sum", wrong)
    assert "nothing-else" in failed(plan())


# Mutants of sampling, accounting and masking.


def test_batches_of_a_fixed_size_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(secret: SecretRandom, *, sampling_rate: float, n_patients: int) -> np.ndarray:
        order = np.argsort(secret.uniform(n_patients))
        return np.sort(order[: round(sampling_rate * n_patients)])

    monkeypatch.setattr(trainer_module, "sample_patients", wrong)
    assert "batch-spread" in failed(plan(0.5))


def test_coins_thrown_once_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    thrown: dict[int, np.ndarray] = {}

    def wrong(secret: SecretRandom, *, sampling_rate: float, n_patients: int) -> np.ndarray:
        coins = thrown.setdefault(n_patients, secret.uniform(n_patients) < sampling_rate)
        return np.flatnonzero(coins)

    monkeypatch.setattr(trainer_module, "sample_patients", wrong)
    assert "fresh-coins" in failed(plan(0.5))


def test_another_rate_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer_module.sample_patients
    monkeypatch.setattr(
        trainer_module,
        "sample_patients",
        lambda secret, **options: original(secret, **options | {"sampling_rate": 0.7}),
    )
    assert "participation" in failed(plan(0.5))


@pytest.mark.parametrize("grid", ["coarse", "fine"])
def test_sensitivity_without_the_grid_fails(monkeypatch: pytest.MonkeyPatch, grid: str) -> None:
    """The event would charge less than neighbours differ by. Coarse: gamma sqrt(d) is a quarter of C."""
    execution = plan()
    if grid == "coarse":
        execution = replace(execution, grid_step=2.0**-11, clamp_steps=2**20)
        assert audit(execution).passed
    monkeypatch.setattr(execution_plan_module, "clipped_sum_sensitivity", without_rounding)
    assert {"charged-sensitivity", "charged-event"} <= failed(execution)


def test_an_event_with_more_noise_than_there_is_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event counts the survivors' surplus: n shares in place of t - c."""
    original = ExecutionPlan.training_event

    def wrong(self: ExecutionPlan) -> Any:
        event = original(self)
        return replace(event, noise_multiplier_world=event.noise_multiplier_world * math.sqrt(4 / 2))

    monkeypatch.setattr(ExecutionPlan, "training_event", wrong)
    assert "charged-event" in failed(plan())


def test_masks_left_out_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = site_masking.masked_residues
    monkeypatch.setattr(
        site_masking, "masked_residues", lambda vector, bits, *_: masked(vector, bits, [], [])
    )
    monkeypatch.setattr(server_rounds, "apply_streams", lambda *_: None)
    assert "masking" in failed(plan())


def test_a_total_that_is_not_the_sum_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = server_rounds.ServerAttempt.total
    monkeypatch.setattr(server_rounds.ServerAttempt, "total", lambda self: original(self) // 2 * 2)
    assert "unmasking" in failed(plan())


THOUSAND = AuditSize()
NAMED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "noise halved": partial(
        test_broken_noise_fails, mutant=scaled(0.5), names={"share-variance", "total-variance"}
    ),
    "noise missing at one site": partial(
        test_broken_noise_fails, mutant=missing_at_one_site(), names={"share-variance"}
    ),
    "same seed at two sites": partial(
        test_broken_noise_fails, mutant=same_seed_at_two_sites(), names={"independence", "total-variance"}
    ),
    "same seed in two rounds": partial(
        test_broken_noise_fails, mutant=same_seed_in_two_rounds(), names={"independence"}
    ),
    "clipping per scan, added": partial(test_clipping_per_scan_fails, share=1.0),
    "clipping per scan, averaged": partial(test_clipping_per_scan_fails, share=0.5),
    "sum of draws in place of the mean": test_sum_of_draws_fails,
    "actual batch by the declared number": partial(
        test_division_by_the_actual_batch_fails, rescaled="by the declared number"
    ),
    "actual batch by the expected one": partial(
        test_division_by_the_actual_batch_fails, rescaled="by the site's expected batch"
    ),
    "sensitivity of a coarse grid left out": partial(test_sensitivity_without_the_grid_fails, grid="coarse"),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mutant", NAMED.values(), ids=NAMED)
def test_each_named_mutant_fails_with_a_thousand_canaries(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """The tests above once more, at the size that an installation audits itself with."""
    assert THOUSAND.canaries == 1024
    monkeypatch.setitem(globals(), "SMALL", THOUSAND)
    monkeypatch.setitem(globals(), "SMALL_SAMPLED", THOUSAND)
    mutant(monkeypatch)


def test_other_modes_and_grids_are_refused() -> None:
    with pytest.raises(UsageError, match="mode distributed"):
        audit(replace(plan(), mode="local"))
    with pytest.raises(UsageError, match="told apart"):
        audit(replace(plan(), grid_step=0.25))
