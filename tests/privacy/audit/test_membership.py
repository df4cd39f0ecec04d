"""The attack, its planted control and the copies, on a small network and latents made for the test."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from privacy.audit.bounds import auc
from privacy.audit.controls import PLANTED, member_coin, planted_leak
from privacy.audit.copies import CopySpace, calibrate_copy_distance, nearest_distances
from privacy.audit.membership import AttackLosses, AttackNoise, attack_losses
from privacy.audit.proposal import expected_power, propose_audit, propose_edges
from shared.errors import UsageError
from shared.model.diffusion import per_sample_loss
from shared.study_plan import StudyPlan

SHAPE = (2, 4, 4, 4)
DIGEST = b"d" * 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Scans:
    patient_key: str
    latents_SCDHW: Tensor
    conditions_S: Tensor


class Velocity(nn.Module):
    """A perceptron in the place of the denoiser: large enough to memorise a few latents."""

    def __init__(self) -> None:
        super().__init__()
        size = int(np.prod(SHAPE))
        self.layers = nn.Sequential(nn.Linear(size + 3, 192), nn.SiLU(), nn.Linear(192, size))

    def forward(self, z_BCDHW: Tensor, t_B: Tensor, condition_B: Tensor) -> Tensor:
        extra = torch.stack([t_B, t_B**2, condition_B.float()], dim=1)
        out: Tensor = self.layers(torch.cat([z_BCDHW.flatten(1), extra], dim=1))
        return out.view_as(z_BCDHW)


def _patients(n: int, *, seed: int) -> list[Scans]:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn((6, *SHAPE), generator=torch.Generator().manual_seed(99))
    patients = []
    for i in range(n):
        scans = 1 + i % 2
        own = torch.einsum("k,kcdhw->cdhw", torch.randn(6, generator=generator) * 0.4, basis)
        z = own + 0.3 * torch.randn((scans, *SHAPE), generator=generator)
        patients.append(
            Scans(patient_key=f"{seed}-{i}", latents_SCDHW=z, conditions_S=torch.full((scans,), i % 2))
        )
    return patients


def _train(network: nn.Module, patients: list[Scans], *, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat([p.latents_SCDHW for p in patients])
    c = torch.cat([p.conditions_S for p in patients])
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        i = torch.randint(len(z), (32,), generator=generator)
        t = torch.rand(32, generator=generator)
        noise = torch.randn((32, *SHAPE), generator=generator)
        optimizer.zero_grad()
        per_sample_loss(network, z[i], c[i], t, noise).mean().backward()
        optimizer.step()


def _noise() -> AttackNoise:
    return AttackNoise.from_plan_digest(
        DIGEST, timesteps=(0.2, 0.4, 0.6, 0.8), draws_per_timestep=2, latent_shape=SHAPE
    )


def _attack(public: nn.Module, candidate: nn.Module, patients: list[Scans]) -> AttackLosses:
    return attack_losses(public, candidate, patients, loss=per_sample_loss, noise=_noise())


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    """(public, overfitted on patients of seed 1)."""
    torch.manual_seed(0)
    public = Velocity()
    _train(public, _patients(60, seed=50), steps=400, seed=1)
    candidate = copy.deepcopy(public)
    _train(candidate, _patients(24, seed=1), steps=500, seed=2)
    return public, candidate


def test_an_overfitted_candidate_is_seen_and_the_sign_is_right(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    public, candidate = networks
    members, held_out = _patients(24, seed=1), _patients(24, seed=2)
    inside, outside = _attack(public, candidate, members), _attack(public, candidate, held_out)
    assert auc(inside.score_P, outside.score_P) > 0.9
    assert 0.25 < auc(-inside.public_P, -outside.public_P) < 0.75
    assert inside.score_P == pytest.approx(inside.public_P - inside.candidate_P)


def test_the_public_model_against_itself_scores_zero(networks: tuple[nn.Module, nn.Module]) -> None:
    assert (_attack(networks[0], networks[0], _patients(3, seed=4)).score_P == 0.0).all()


def test_a_patients_figures_depend_on_that_patient_alone_to_the_last_bit(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    patients = _patients(6, seed=3)
    together, alone = _attack(*networks, patients), _attack(*networks, patients[4:5])
    assert together.score_P[4] == alone.score_P[0]
    assert together.public_P[4] == alone.public_P[0]


def test_the_mean_is_over_scans_timesteps_and_noises(networks: tuple[nn.Module, nn.Module]) -> None:
    patient, noise = _patients(2, seed=3)[1], _noise()
    losses = [
        float(
            per_sample_loss(networks[1], z[None], c[None], noise.t_R[r : r + 1], noise.noise_RCDHW[r : r + 1])
        )
        for z, c in zip(patient.latents_SCDHW, patient.conditions_S, strict=True)
        for r in range(8)
    ]
    assert len(losses) == 16
    assert _attack(*networks, [patient]).candidate_P[0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_modes_of_the_networks_are_left_as_they_were(networks: tuple[nn.Module, nn.Module]) -> None:
    public, candidate = copy.deepcopy(networks[0]).train(), copy.deepcopy(networks[1]).eval()
    _attack(public, candidate, _patients(1, seed=3))
    assert public.training and not candidate.training


def test_noise_is_the_same_at_every_site_and_another_for_another_plan() -> None:
    other = AttackNoise.from_plan_digest(
        b"e" * 32, timesteps=(0.2, 0.4, 0.6, 0.8), draws_per_timestep=2, latent_shape=SHAPE
    )
    assert torch.equal(_noise().noise_RCDHW, _noise().noise_RCDHW)
    assert not torch.equal(_noise().noise_RCDHW, other.noise_RCDHW)
    with pytest.raises(UsageError):
        AttackNoise.from_plan_digest(DIGEST, timesteps=(1.5,), draws_per_timestep=1, latent_shape=SHAPE)


def test_losses_are_not_printed(networks: tuple[nn.Module, nn.Module]) -> None:
    assert repr(_attack(*networks, _patients(1, seed=3))) == "AttackLosses(<private>)"


def test_the_planted_leak_is_seen_and_the_candidate_is_left_alone(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    candidate = networks[0]
    before = [p.clone() for p in candidate.parameters()]
    samples = torch.cat([p.latents_SCDHW[:1] for p in _patients(2 * PLANTED, seed=8)])
    conditions = torch.arange(2 * PLANTED) % 2
    arguments = {"loss": per_sample_loss, "noise": _noise(), "seed": 1}
    seen = planted_leak(candidate, samples, conditions, **arguments)
    assert seen.p_value() < 0.003
    assert all(torch.equal(a, b) for a, b in zip(before, candidate.parameters(), strict=True))
    # A pipeline that cannot see: no training of the copy at all, so both groups score alike.
    blind = planted_leak(candidate, samples, conditions, steps=0, **arguments)
    assert blind.p_value() > 0.3
    with pytest.raises(UsageError):
        planted_leak(candidate, samples[:3], conditions[:3], **arguments)


def test_coins_are_fair_and_belong_to_patient_and_plan() -> None:
    """1,000 coins: outside 400..600 with probability below 1e-9."""
    heads = sum(member_coin(f"patient-{i}", DIGEST) for i in range(1000))
    assert 400 < heads < 600
    assert any(
        member_coin(f"patient-{i}", DIGEST) != member_coin(f"patient-{i}", b"e" * 32) for i in range(50)
    )


LATENTS = CopySpace(autoencoder=None)
"""Latents are compared as they are."""


def test_planted_copies_are_found_and_unrelated_patients_are_not() -> None:
    public, members = _patients(120, seed=60), _patients(30, seed=61)
    calibration = calibrate_copy_distance(LATENTS, public, false_copy_rate=0.02)
    assert calibration.false_copy_rate == pytest.approx(2 / 121)
    unrelated = torch.cat([p.latents_SCDHW for p in _patients(20, seed=62)])
    exact = members[3].latents_SCDHW[:1]
    noised = members[7].latents_SCDHW[:1] + 0.05 * torch.randn_like(members[7].latents_SCDHW[:1])
    distances = nearest_distances(LATENTS, members, LATENTS.of_samples(torch.cat([unrelated, exact, noised])))
    assert distances[3] == 0.0
    copied = set(np.flatnonzero(distances < calibration.distance))
    assert {3, 7} <= copied and len(copied) <= 5


def test_false_copies_stay_at_the_calibrated_rate() -> None:
    """Rate 5% on 100 public patients; 300 unrelated patients, each against as many others as in calibration.
    More than 45 (15%) have probability below 1e-9 at a rate of 5%; the seeds are fixed."""
    calibration = calibrate_copy_distance(LATENTS, _patients(100, seed=70), false_copy_rate=0.05)
    others = torch.cat([p.latents_SCDHW for p in _patients(99, seed=71)])
    distances = nearest_distances(LATENTS, _patients(300, seed=72), LATENTS.of_samples(others))
    assert (distances < calibration.distance).sum() <= 45


def test_few_public_patients_claim_no_more_than_they_carry() -> None:
    calibration = calibrate_copy_distance(LATENTS, _patients(10, seed=60), false_copy_rate=0.01)
    assert calibration.false_copy_rate == pytest.approx(1 / 11)
    with pytest.raises(UsageError):
        calibrate_copy_distance(LATENTS, _patients(2, seed=60))
    twice = _patients(4, seed=60)
    with pytest.raises(UsageError, match="distance 0"):
        calibrate_copy_distance(LATENTS, [*twice, *twice])


def test_the_proposed_clause_sees_an_overfit_and_has_power(
    networks: tuple[nn.Module, nn.Module], make_plan: Callable[..., StudyPlan]
) -> None:
    public_losses = _attack(networks[0], networks[0], _patients(30, seed=51)).public_P
    clause = propose_audit(public_losses, copy_distance=0.3, false_copy_rate=0.01, declared_patients=80)
    assert clause.holdout_share == pytest.approx(1 / 3)
    assert clause.max_copied_patients in (4, 5)
    arguments = {"audit_noise_multiplier": 2.0, "survivors_per_share": 1.5, "max_audit_attempts": 2}
    assert expected_power(clause, n_members=120, n_held_out=60, epsilon=8, delta=1e-5, **arguments) > 0.8
    assert expected_power(clause, n_members=81, n_held_out=39, epsilon=8, delta=1e-5, **arguments) > 0.5
    assert expected_power(clause, n_members=20, n_held_out=10, epsilon=8, delta=1e-5, **arguments) < 0.5
    with pytest.raises(UsageError):
        propose_edges([1.0, float("nan"), 2.0])
    with pytest.raises(UsageError):
        propose_edges([1.0, 1.0, 1.0])
