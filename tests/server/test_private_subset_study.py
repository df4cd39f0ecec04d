"""The simulated study clips per patient, divides by the public constant, and finds a shift that is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule

from server.private_subset_study import (
    SimulatedPatient,
    StudySetting,
    clipped_gradient_sum,
    property_shift,
    train_privately,
)
from shared.model.denoiser import Denoiser, build_denoiser, flatten, parameter_subset
from shared.model.presets import preset_named

# Two groups of four channels: with one channel a group, GroupNorm takes any condition's shift out again.
MICRO = replace(preset_named("micro"), denoiser_channels=(8, 8), head_channels=8, norm_groups=2)
SHAPE = MICRO.latent_shape(MICRO.grid_shape)
SETTING = StudySetting(
    subset="conditioning", clip_norm=0.001, learning_rate=1e-2, noise_multiplier=0.0, rounds=3, ema_decay=0.0
)


def _denoiser() -> Denoiser:
    built = build_denoiser(MICRO, n_conditions=2, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return built


def _patients(n: int) -> list[SimulatedPatient]:
    generator = torch.Generator().manual_seed(3)
    return [
        SimulatedPatient(z_SCDHW=torch.randn((1 + i % 3, *SHAPE), generator=generator) + 1, condition=i % 2)
        for i in range(n)
    ]


def test_each_patient_counts_at_most_clip_norm_however_many_scans_and_draws() -> None:
    denoiser = _denoiser()
    params = parameter_subset(denoiser, "conditioning")
    hooked = GradSampleModule(denoiser, loss_reduction="sum")
    one = clipped_gradient_sum(hooked, params, _patients(3)[2:], SETTING, np.random.default_rng(0))
    assert one[1].shape == (1,) and one[1][0] > SETTING.clip_norm
    assert np.linalg.norm(one[0]) == pytest.approx(SETTING.clip_norm, rel=1e-4)
    total, norms = clipped_gradient_sum(
        hooked, params, _patients(5), SETTING, np.random.default_rng(0), patients_per_batch=2
    )
    assert norms.shape == (5,) and np.linalg.norm(total) <= 5 * SETTING.clip_norm * (1 + 1e-5)


def test_training_without_noise_lowers_the_loss_and_noise_moves_the_weights() -> None:
    patients = _patients(8)
    held_out = (torch.cat([p.z_SCDHW for p in patients]), torch.zeros(15, dtype=torch.int64))
    denoiser = _denoiser()
    outcome = train_privately(denoiser, patients, SETTING, held_out=held_out, evaluate_every=1)
    assert outcome.dimension == flatten(parameter_subset(denoiser, "conditioning")).size
    losses = [loss for _, loss in outcome.held_out_loss_rare]
    assert len(losses) == 3 and losses[2] < losses[0]
    other = _denoiser()
    train_privately(other, patients, replace(SETTING, noise_multiplier=5.0))
    again = _denoiser()
    train_privately(again, patients, replace(SETTING, noise_multiplier=5.0))
    vectors = [flatten(parameter_subset(d, "conditioning")) for d in (denoiser, other, again)]
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3) and np.array_equal(vectors[1], vectors[2])


def test_a_shift_is_found_where_there_is_one_and_only_there() -> None:
    """Deterministic seeds: a shift of one standard deviation at n = 200 is 10 standard errors."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200), rng.normal(size=200)
    none, some = property_shift(a, b), property_shift(a, b + 1.0)
    assert none.low < 0 < none.high
    assert 0.5 < some.low < some.difference < some.high < 1.5
