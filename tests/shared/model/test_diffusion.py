"""The flow loss: one number per sample, from that sample alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor

from shared.errors import UsageError
from shared.model.conditioning import ConditionTable
from shared.model.denoiser import build_denoiser
from shared.model.diffusion import (
    RECTIFIED_FLOW,
    Diffusion,
    RectifiedFlow,
    VPrediction,
    diffusion_of,
    drop_condition,
    per_sample_loss,
    timesteps_from_normal,
)
from shared.model.presets import PRESETS, preset_named

MICRO = preset_named("micro")
SHAPE = MICRO.latent_shape(MICRO.grid_shape)
EVERY = pytest.mark.parametrize(
    "diffusion", [RectifiedFlow(), RectifiedFlow(2.0), VPrediction(), VPrediction(2.0)], ids=str
)


def _batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn((n, *SHAPE), generator=g),
        torch.randint(0, 2, (n,), generator=g),
        torch.rand(n, generator=g),
        torch.randn((n, *SHAPE), generator=g),
    )


def test_the_true_velocity_has_loss_zero_and_zero_has_its_mean_square() -> None:
    z, condition, t, noise = _batch(5)
    perfect = per_sample_loss(lambda *_: noise - z, z, condition, t, noise)
    assert torch.equal(perfect, torch.zeros(5))
    zero = per_sample_loss(lambda z_t, *_: torch.zeros_like(z_t), z, condition, t, noise)
    assert torch.allclose(zero, (noise - z).square().mean(dim=(1, 2, 3, 4)))


def test_one_loss_per_sample_from_its_row_alone() -> None:
    denoiser = build_denoiser(MICRO, n_conditions=2, seed=1)
    for p in denoiser.unet.out.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z, condition, t, noise = _batch(4)
    with torch.no_grad():
        loss = per_sample_loss(denoiser, z, condition, t, noise)
        assert loss.shape == (4,)
        alone = per_sample_loss(denoiser, z[2:3], condition[2:3], t[2:3], noise[2:3])
        assert torch.allclose(loss[2:3], alone, atol=1e-5)
        z[0], noise[1] = 9.0, -9.0
        changed = per_sample_loss(denoiser, z, condition, t, noise)
    assert torch.allclose(changed[2:], loss[2:], atol=1e-5) and not torch.isclose(changed[0], loss[0])


def test_fixed_timesteps_and_noise_compare_two_networks() -> None:
    """What the membership audit does: the same draw for the public and the candidate network."""
    a, b = build_denoiser(MICRO, n_conditions=2, seed=1), build_denoiser(MICRO, n_conditions=2, seed=1)
    for p in b.unet.out.parameters():
        torch.nn.init.normal_(p, std=0.1)
    batch = _batch(3)
    with torch.no_grad():
        same = per_sample_loss(a, *batch) - per_sample_loss(a, *batch)
        different = per_sample_loss(a, *batch) - per_sample_loss(b, *batch)
    assert torch.equal(same, torch.zeros(3)) and (different != 0).all()


def test_arguments_that_would_broadcast_are_refused() -> None:
    z, condition, t, noise = _batch(3)
    for wrong in [
        (z, condition, t[:, None], noise),
        (z, condition, t[:1], noise),
        (z, condition[:1], t, noise),
        (z, condition, t, noise[:1]),
        (z[0], condition, t, noise[0]),
    ]:
        with pytest.raises(UsageError):
            per_sample_loss(lambda z_t, *_: z_t, *wrong)


@EVERY
def test_the_true_target_has_loss_zero_and_path_ends_at_latent_and_noise(diffusion: Diffusion) -> None:
    z, condition, t, noise = _batch(5)
    target = diffusion.target(z, diffusion.level(t), noise)
    assert torch.equal(diffusion.per_sample_loss(lambda *_: target, z, condition, t, noise), torch.zeros(5))
    assert (diffusion.per_sample_loss(lambda *_: -target, z, condition, t, noise) > 1.0).all()
    start, end = diffusion.level(torch.zeros(5)), diffusion.level(torch.ones(5))
    assert torch.allclose(diffusion.noised(z, start, noise), z)
    assert torch.equal(diffusion.noised(z, end, noise), noise)


@EVERY
def test_the_shift_lowers_the_log_signal_to_noise_ratio_by_its_two_logarithms(diffusion: Diffusion) -> None:
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)

    def log_snr(of: Diffusion) -> Tensor:
        alpha, sigma = of.weights(of.level(t))
        return 2.0 * (alpha / sigma).log()

    expected = log_snr(type(diffusion)()) - 2.0 * math.log(diffusion.shift)
    assert torch.allclose(log_snr(diffusion), expected, atol=1e-9)
    assert (log_snr(diffusion).diff() < 0).all()


def test_v_prediction_is_the_derivative_of_its_path_by_the_angle() -> None:
    """Salimans and Ho 2022, appendix D: v = d z / d phi, with alpha = cos phi and sigma = sin phi."""
    z, _, _, noise = (part.double() for part in _batch(3))
    angle = torch.tensor([0.2, 0.8, 1.4], dtype=torch.float64)
    path = VPrediction()
    h = 1e-5
    ahead, behind = (path.noised(z, (angle + d) * 2 / math.pi, noise) for d in (h, -h))
    assert torch.allclose((ahead - behind) / (2 * h), path.target(z, angle * 2 / math.pi, noise), atol=1e-8)


def test_a_network_takes_the_loss_of_its_own_diffusion_alone() -> None:
    """Also where Opacus has wrapped it: another preset's loss would train and audit the wrong thing."""
    curved = replace(MICRO, diffusion="v_prediction")
    denoiser = build_denoiser(curved, n_conditions=2, seed=1)
    batch = _batch(2)
    for network in (denoiser, GradSampleModule(denoiser, loss_reduction="sum")):
        with pytest.raises(UsageError, match="not made for RectifiedFlow"):
            per_sample_loss(network, *batch)
        assert denoiser.diffusion.per_sample_loss(network, *batch).shape == (2,)


def test_presets_name_both_diffusions_and_the_shipped_ones_keep_theirs() -> None:
    assert {type(diffusion_of(preset)) for preset in PRESETS.values()} == {RectifiedFlow, VPrediction}
    assert diffusion_of(MICRO) == diffusion_of(preset_named("tiny")) == RECTIFIED_FLOW


def test_timesteps_are_logit_normal() -> None:
    t = timesteps_from_normal(torch.tensor([-1.0, 0.0, 1.0]))
    assert torch.allclose(t, torch.tensor([0.26894142, 0.5, 0.73105858]))


def test_dropped_conditions_become_the_null_row() -> None:
    table = ConditionTable(("common", "rare"))
    dropped = drop_condition(
        torch.tensor([0, 1, 1]), torch.tensor([True, False, True]), null_index=table.null_index
    )
    assert dropped.tolist() == [2, 1, 2]


def test_condition_table_maps_names_both_ways_and_refuses_others() -> None:
    table = ConditionTable(("common", "rare"))
    assert [table.index_of(table.name_of(i)) for i in range(len(table))] == [0, 1]
    with pytest.raises(UsageError, match="other"):
        table.index_of("other")
    for index in (-1, 2):
        with pytest.raises(UsageError):
            table.name_of(index)
    for names in [(), ("",), ("a", "a")]:
        with pytest.raises(UsageError):
            ConditionTable(names)
