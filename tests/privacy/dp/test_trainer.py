"""The production path of one site's update: noise, clipping, grid, modes, and each mutant caught.

The mutants are made here, on purpose, and the same statistic that passes on the true path must fail on them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2
from torch import Tensor, nn

from privacy.dp import trainer as trainer_module
from privacy.dp.calibration import propose_privacy
from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.microbatch_gradients import DirectRows, MicrobatchGradients
from privacy.dp.noise import noise_share
from privacy.dp.patient_gradients import PatientGradients, Performance
from privacy.dp.patient_sampling import draw_for_patient, sample_patients
from privacy.dp.patients import PatientScans
from privacy.dp.trainer import PatientTrainer
from privacy.secret_random import SecretRandom
from shared.errors import InternalError, LacunaError, PeerError, SiteError, UsageError

_spec = importlib.util.spec_from_file_location("dp_networks", Path(__file__).with_name("networks.py"))
assert _spec is not None and _spec.loader is not None
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

WIDTH = 4096
SIDE = 16


class Direction(nn.Module):
    """A linear functional: the gradient of its loss is the scan itself, so a scan is a gradient canary."""

    def __init__(self) -> None:
        super().__init__()
        self.functional = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, z_BCDHW: Tensor) -> Tensor:
        return self.functional(z_BCDHW.flatten(1))[:, 0]


def direction_loss(denoiser: nn.Module, z: Tensor, c: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    value: Tensor = denoiser(z)
    return value


def canary(key: str, axes: list[int], norm: float) -> PatientScans:
    """A patient whose scans are ``norm`` times unit vectors: orthogonal gradients."""
    latents = torch.zeros(len(axes), WIDTH)
    for scan, axis in enumerate(axes):
        latents[scan, axis] = norm
    return PatientScans(
        patient_key=key,
        latents_SCDHW=latents.view(len(axes), 1, SIDE, SIDE, SIDE),
        conditions_S=torch.zeros(len(axes), dtype=torch.int64),
    )


BASE = propose_privacy(
    mode="distributed", epsilon=8.0, delta=1e-5, clip_norm=0.5, rounds=5, n_sites=3, threshold=3,
    max_colluding=1, dimension=WIDTH, declared_patients=60, draws_per_patient=4,
).execution  # fmt: skip
QUIET = replace(BASE, noise_multiplier=1e-2)
"""Noise of 1% of C: what remains is the signal. Never passes check_plan."""


def trainer(plan: ExecutionPlan = BASE, **options: Any) -> PatientTrainer:
    network = Direction()
    return PatientTrainer(
        network, networks.parameters(network), direction_loss, plan, SecretRandom(), **options
    )


def noise_is_right(update: Callable[[], np.ndarray], std_steps: float) -> bool:
    """Two-sided chi-square test of the variance, at 1e-7, on 20 updates of 4,096 coordinates."""
    draws = np.concatenate([update() for _ in range(20)]).astype(np.float64)
    statistic = float((draws**2).sum() / std_steps**2)
    low, high = chi2.ppf(0.5e-7, len(draws)), chi2.isf(0.5e-7, len(draws))
    return bool(low < statistic < high)


def test_noise_has_exactly_its_share_also_where_nobody_takes_part() -> None:
    """False-failure probability 1e-7. The share is sigma C / sqrt(t - c), here written out."""
    share = BASE.noise_multiplier * BASE.clip / math.sqrt(2) / BASE.grid_step
    assert noise_is_right(lambda: trainer().distributed_update([]), share)


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.97, 1.03, 2.0])
def test_wrong_noise_is_seen(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Mutants: no noise, half, off by 3% either way, twice."""

    def wrong(plan: ExecutionPlan, secret: SecretRandom) -> np.ndarray:
        return np.rint(factor * noise_share(plan, secret)).astype(np.int64)

    monkeypatch.setattr(trainer_module, "noise_share", wrong)
    assert not noise_is_right(lambda: trainer().distributed_update([]), BASE.noise_share_steps)


def signal(plan: ExecutionPlan, patients: list[PatientScans], **options: Any) -> np.ndarray:
    return trainer(plan, **options).distributed_update(patients) * plan.grid_step


def all_rows(gradients: MicrobatchGradients) -> Tensor:
    """Every patient's gradient, [P, d]."""
    patients = len(gradients.squared_norms())
    return torch.stack([gradients.row(patient) for patient in range(patients)])


def two_scan_norm() -> float:
    """Norm of one two-scan patient's part, in units of C, along its two directions, 64 draws."""
    update = signal(replace(QUIET, draws_per_patient=64), [canary("a", [3, 9], 50.0)])
    return float(np.linalg.norm(update[[3, 9]]) / QUIET.clip)


def test_a_patient_with_two_scans_is_clipped_as_one() -> None:
    """Noise is 1% of C: 10 deviations either side, probability below 1e-20."""
    assert abs(two_scan_norm() - 1.0) < 0.1


@pytest.mark.parametrize("mutant", ["per draw", "no clipping", "per scan"])
def test_clipping_by_anything_but_the_patient_is_seen(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    """Per draw, then averaged: about C/sqrt(2). Per scan, added up: about C sqrt(2)."""
    original = PatientGradients._microbatch_gradients

    def wrong(self: PatientGradients, *arguments: Any) -> MicrobatchGradients:
        rows = all_rows(original(self, *arguments))
        if mutant != "no clipping":
            share = rows.abs() / rows.abs().sum(dim=1, keepdim=True).clamp_min(1e-30)
            rows = rows.sign() * self._clip * (share if mutant == "per draw" else 1.0)
        return MicrobatchGradients([DirectRows(slice(0, self.dimension), rows)])

    monkeypatch.setattr(PatientGradients, "_microbatch_gradients", wrong)
    monkeypatch.setattr(PatientGradients, "verify", lambda *_: None)
    monkeypatch.setattr(
        "privacy.dp.patient_gradients.clip_factors",
        lambda squared_norms_P, _: torch.ones_like(squared_norms_P),
    )
    assert abs(two_scan_norm() - 1.0) > 0.1


def small_gradient() -> float:
    """Part of an unclipped patient (gradient norm 0.4 C), in units of its gradient."""
    update = signal(QUIET, [canary("a", [5], 0.4 * QUIET.clip)])
    return float(-update[5] / (-0.4 * QUIET.clip))


def test_draws_are_averaged() -> None:
    """Noise is 2.5% of the gradient here: 8 deviations, probability below 1e-14."""
    assert abs(small_gradient() - 1.0) < 0.2


def test_sum_of_draws_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PatientGradients._microbatch_gradients

    def summed(self: PatientGradients, *arguments: Any) -> MicrobatchGradients:
        rows = 4 * all_rows(original(self, *arguments))
        return MicrobatchGradients([DirectRows(slice(0, self.dimension), rows)])

    monkeypatch.setattr(PatientGradients, "_microbatch_gradients", summed)
    monkeypatch.setattr(PatientGradients, "verify", lambda *_: None)
    assert abs(small_gradient() - 1.0) > 0.2


def test_a_sum_is_never_divided_by_the_batch() -> None:
    """Two, five or forty patients with the same gradient: two, five or forty times C."""
    for n in (2, 5, 40):
        update = signal(
            QUIET, [canary(str(i), [7], 9.0) for i in range(n)], performance=Performance(microbatch=3)
        )
        assert abs(update[7] / QUIET.clip - n) < 0.1


def test_neighbours_differ_by_at_most_the_sensitivity() -> None:
    """A grid so coarse (sqrt(d) steps are C twice) that rounding shows in the difference."""
    plan = replace(BASE, grid_step=2.0**-6)
    rng = np.random.default_rng(0)
    patients = [
        PatientScans(
            patient_key=str(i),
            latents_SCDHW=torch.from_numpy(rng.standard_normal((1, 1, SIDE, SIDE, SIDE))).float(),
            conditions_S=torch.zeros(1, dtype=torch.int64),
        )
        for i in range(6)
    ]
    network = Direction()
    gradients = PatientGradients(
        network, networks.parameters(network), direction_loss, clip=plan.clip, draws_per_patient=1
    )
    sums = [gradients.clipped_sum(patients[:n], SecretRandom()) for n in (5, 6)]
    steps = [np.rint(total / plan.grid_step) for total in sums]
    moved = float(np.linalg.norm(steps[1] - steps[0])) * plan.grid_step
    assert plan.clip * 1.05 < moved <= plan.sensitivity.l2


def test_same_seeds_at_two_sites_give_different_updates() -> None:
    """Equal with probability below 2^-1000."""
    updates = []
    for _ in range(2):
        torch.manual_seed(3)
        np.random.seed(3)
        updates.append(trainer().distributed_update([]))
    assert not np.array_equal(*updates)
    share = float(BASE.noise_share_steps)
    correlation = float((updates[0] * updates[1] / share**2).mean())
    assert abs(correlation) < 5.4 / math.sqrt(WIDTH)


def test_rounds_are_independent() -> None:
    """Correlation of two rounds of one trainer within 5.4 deviations (probability below 1e-7)."""
    one = trainer()
    first, second = (one.distributed_update([]) / BASE.noise_share_steps for _ in range(2))
    assert abs(float((first * second).mean())) < 5.4 / math.sqrt(WIDTH)


def test_clamp_bounds_what_is_masked() -> None:
    plan = replace(QUIET, clamp_steps=10)
    update = trainer(plan).distributed_update([canary(str(i), [7], 9.0) for i in range(5)])
    assert abs(update[7]) <= 10 + 8 * plan.noise_share_steps


def test_weights_are_read_afresh_and_left_alone() -> None:
    network = networks.small_denoiser()
    params = networks.parameters(network)
    plan = replace(BASE, dimension=sum(p.numel() for _, p in params), noise_multiplier=1e-3)
    one = PatientTrainer(network, params, networks.loss, plan, SecretRandom())
    patients = networks.cohort((1, 2, 5))
    before = [p.detach().clone() for _, p in params]
    first = one.distributed_update(patients)
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, params, strict=True))
    with torch.no_grad():
        for _, p in params:
            p.mul_(0.0)
    second = one.distributed_update(patients)
    assert np.linalg.norm(first - second) > 0.1 * plan.clip / plan.grid_step


@pytest.mark.parametrize("q", [0.1, 0.5])
def test_poisson_coins(q: float) -> None:
    """Batch sizes are binomial: 2,000 batches of 50; mean and variance within 5.4 deviations (below 1e-6)."""
    secret = SecretRandom()
    sizes = np.array([len(sample_patients(secret, sampling_rate=q, n_patients=50)) for _ in range(2000)])
    mean, var = binom.stats(50, q)
    assert abs(sizes.mean() - mean) < 5.4 * math.sqrt(var / 2000)
    assert abs(sizes.var() / var - 1) < 5.4 * math.sqrt(2.2 / 2000)
    assert len(set(sizes)) > 5


def test_everybody_at_full_participation_and_nobody_among_none() -> None:
    secret = SecretRandom()
    assert sample_patients(secret, sampling_rate=1.0, n_patients=7).tolist() == list(range(7))
    assert len(sample_patients(secret, sampling_rate=0.5, n_patients=0)) == 0
    with pytest.raises(UsageError):
        sample_patients(secret, sampling_rate=0.0, n_patients=3)
    with pytest.raises(UsageError):
        sample_patients(np.random.default_rng(0), sampling_rate=0.5, n_patients=3)  # type: ignore[arg-type]


def test_scans_are_drawn_uniformly() -> None:
    """5 scans, 5,000 draws: chi-square with 4 degrees of freedom below its 1e-7 quantile."""
    drawn = draw_for_patient(SecretRandom(), n_scans=5, latent_shape=(1,), draws=5000)
    counts = np.bincount(drawn.scan_K, minlength=5)
    assert ((counts - 1000) ** 2 / 1000).sum() < chi2.isf(1e-7, 4)
    assert drawn.noise_KCDHW.shape == (5000, 1) and 0 <= drawn.t_K.min() <= drawn.t_K.max() < 1


def test_timesteps_go_through_the_given_distribution() -> None:
    drawn = draw_for_patient(
        SecretRandom(), n_scans=1, latent_shape=(1,), draws=100, draw_timesteps=lambda u: 0.25 + 0.5 * u
    )
    assert drawn.t_K.min() >= 0.25 and drawn.t_K.max() < 0.75
    with pytest.raises(UsageError):
        draw_for_patient(
            SecretRandom(), n_scans=1, latent_shape=(1,), draws=3, draw_timesteps=lambda u: u + 1
        )


def local_trainer(mode: str, network: nn.Module, **changes: Any) -> tuple[PatientTrainer, ExecutionPlan]:
    params = networks.parameters(network)
    plan = propose_privacy(
        mode=mode,  # type: ignore[arg-type]
        epsilon=None if mode == "unprotected" else 8.0, delta=1e-5, clip_norm=0.5, rounds=5, n_sites=3,
        threshold=3, max_colluding=1, dimension=sum(p.numel() for _, p in params), declared_patients=60,
        local_steps=12, local_learning_rate=1e-2,
    ).execution  # fmt: skip
    plan = replace(plan, **changes)
    return PatientTrainer(network, params, networks.loss, plan, SecretRandom()), plan


def mean_loss(network: nn.Module, patients: list[PatientScans]) -> float:
    generator = torch.Generator().manual_seed(5)
    z = torch.cat([patient.latents_SCDHW for patient in patients]).repeat(8, 1, 1, 1, 1)
    c = torch.cat([patient.conditions_S for patient in patients]).repeat(8)
    t, noise = torch.rand(len(z), generator=generator), torch.randn(z.shape, generator=generator)
    with torch.no_grad():
        return float(networks.loss(network, z, c, t, noise).mean())


def test_unprotected_learns_and_restores() -> None:
    network = networks.small_denoiser()
    patients = networks.cohort((1, 2, 5), scale=0.1)
    one, plan = local_trainer("unprotected", network)
    before = [p.detach().clone() for p in network.parameters()]
    start = mean_loss(network, patients)
    change = one.unprotected_update(patients, steps=12) * plan.grid_step
    assert all(torch.equal(a, p) for a, p in zip(before, network.parameters(), strict=True))
    at = 0
    with torch.no_grad():
        for p in network.parameters():
            p += torch.from_numpy(change[at : at + p.numel()]).view(p.shape).float()
            at += p.numel()
    assert mean_loss(network, patients) < 0.95 * start
    assert not one.unprotected_update([], steps=3).any()


def test_local_steps_are_noised_and_counted() -> None:
    network = networks.small_denoiser()
    one, plan = local_trainer("local", network)
    before = [p.detach().clone() for p in network.parameters()]
    first, second = one.local_update([], steps=12), one.local_update([], steps=12)
    assert first.any() and not np.array_equal(first, second)
    assert all(torch.equal(a, p) for a, p in zip(before, network.parameters(), strict=True))
    assert np.abs(first).max() <= plan.clamp_steps
    with pytest.raises(InternalError, match="charged"):
        one.local_update([], steps=13)
    share = plan.noise_multiplier * plan.clip / plan.gradient_grid_step
    noise_steps = np.concatenate([one._noised_sum([]) for _ in range(20)]).astype(float)
    statistic = (noise_steps**2).sum() / share**2
    assert chi2.ppf(0.5e-7, len(noise_steps)) < statistic < chi2.isf(0.5e-7, len(noise_steps))


def test_bad_calls_are_refused_before_anything_is_computed() -> None:
    one = trainer()
    with pytest.raises(InternalError):
        one.local_update([], steps=1)
    with pytest.raises(SiteError, match="twice"):
        one.distributed_update([canary("a", [1], 1.0), canary("a", [2], 1.0)])
    network = Direction()
    with torch.no_grad():
        network.functional.weight[0, 5] = float("nan")
    sick = PatientTrainer(network, networks.parameters(network), direction_loss, BASE, SecretRandom())
    with pytest.raises(PeerError, match="not finite"):
        sick.distributed_update([])
    with pytest.raises(UsageError, match="the plan says"):
        trainer(replace(BASE, dimension=WIDTH + 1))
    with pytest.raises(UsageError):
        PatientTrainer(
            Direction(), networks.parameters(network), direction_loss, BASE, np.random.default_rng(0)
        )  # type: ignore[arg-type]
    with pytest.raises(LacunaError):
        PatientScans(
            patient_key="a",
            latents_SCDHW=torch.zeros(0, 1, 2, 2, 2),
            conditions_S=torch.zeros(0, dtype=torch.int64),
        )


def test_secrets_do_not_print() -> None:
    assert "patient" not in repr(canary("patient-7", [1], 1.0))
