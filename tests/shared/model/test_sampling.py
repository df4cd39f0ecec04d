"""The sampler: reproducible bytes, noise bound to (seed, index), and the right integral."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from shared.errors import UsageError
from shared.model.autoencoder import build_autoencoder
from shared.model.denoiser import Denoiser, build_denoiser
from shared.model.diffusion import RECTIFIED_FLOW, Diffusion, RectifiedFlow, VPrediction
from shared.model.presets import preset_named
from shared.model.sampling import generate_volumes, initial_noise, sample_latents

MICRO = preset_named("micro")
SHAPE = MICRO.latent_shape(MICRO.grid_shape)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    built = build_denoiser(MICRO, n_conditions=2, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator))
    return built


class _PointFlow(nn.Module):
    """Velocity of the flow whose data are one point per condition: v = (z_t - x) / t."""

    null_index = 2
    diffusion: Diffusion = RECTIFIED_FLOW

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.tensor([-1.0, 2.0, 0.5]))

    def forward(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return (z - self.points[condition].view(-1, 1, 1, 1, 1)) / t.view(-1, 1, 1, 1, 1)


def test_euler_reaches_the_point_of_a_point_flow_and_guidance_extrapolates() -> None:
    flow = cast(Denoiser, _PointFlow())
    condition = torch.tensor([0, 1])
    z = sample_latents(flow, condition, steps=7, guidance_scale=1.0, seed=1, latent_shape=SHAPE)
    assert torch.allclose(z[0], torch.full(SHAPE, -1.0), atol=1e-4)
    assert torch.allclose(z[1], torch.full(SHAPE, 2.0), atol=1e-4)
    guided = sample_latents(flow, condition, steps=7, guidance_scale=3.0, seed=1, latent_shape=SHAPE)
    assert torch.allclose(guided[1], torch.full(SHAPE, 0.5 + 3.0 * 1.5), atol=1e-3)


class _PointPath(_PointFlow):
    """The same on any diffusion: the network that knows that the data are one point."""

    def __init__(self, diffusion: Diffusion) -> None:
        super().__init__()
        self.diffusion = diffusion

    def forward(self, z: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        point = self.points[condition].view(-1, 1, 1, 1, 1).expand_as(z)
        alpha, sigma = (part.view(-1, 1, 1, 1, 1) for part in self.diffusion.weights(level))
        return self.diffusion.target(point, level, (z - alpha * point) / sigma)


@pytest.mark.parametrize(
    "diffusion", [RectifiedFlow(), RectifiedFlow(2.0), VPrediction(), VPrediction(2.0)], ids=str
)
def test_every_diffusion_ends_at_the_point(diffusion: Diffusion) -> None:
    path = cast(Denoiser, _PointPath(diffusion))
    condition = torch.tensor([0, 1])
    z = sample_latents(path, condition, steps=7, guidance_scale=1.0, seed=1, latent_shape=SHAPE)
    assert torch.allclose(z[0], torch.full(SHAPE, -1.0), atol=1e-4)
    assert torch.allclose(z[1], torch.full(SHAPE, 2.0), atol=1e-4)
    guided = sample_latents(path, condition, steps=7, guidance_scale=3.0, seed=1, latent_shape=SHAPE)
    assert torch.allclose(guided[1], torch.full(SHAPE, 0.5 + 3.0 * 1.5), atol=1e-3)


def test_same_seed_same_bytes_and_another_seed_others(denoiser: Denoiser) -> None:
    def run(seed: int) -> bytes:
        z = sample_latents(
            denoiser, torch.tensor([0, 1, 1]), steps=3, guidance_scale=2.0, seed=seed, latent_shape=SHAPE
        )
        return bytes(z.numpy().tobytes())

    assert run(4) == run(4)
    assert run(4) != run(5)


def test_another_batch_size_gives_the_same_volumes(denoiser: Denoiser) -> None:
    autoencoder = build_autoencoder(MICRO, n_labels=2, seed=2)

    def run(batch_size: int) -> Tensor:
        pairs = generate_volumes(
            autoencoder,
            denoiser,
            condition=1,
            count=5,
            seed=3,
            grid_shape=MICRO.grid_shape,
            steps=3,
            guidance_scale=1.5,
            batch_size=batch_size,
        )
        return torch.stack([image for image, _ in pairs])

    whole = run(5)
    assert whole.shape == (5, *MICRO.grid_shape)
    assert (whole - run(2)).abs().max() <= 1e-4
    assert (whole - run(1)).abs().max() <= 1e-4
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def test_noise_depends_on_seed_and_index_alone() -> None:
    noise = initial_noise(seed=9, first_index=0, count=4, shape=SHAPE)
    assert torch.equal(noise[3:], initial_noise(seed=9, first_index=3, count=1, shape=SHAPE))
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1.0) < 0.1
    assert initial_noise(seed=9, first_index=0, count=0, shape=SHAPE).shape == (0, *SHAPE)


def test_arguments_out_of_range_are_refused(denoiser: Denoiser) -> None:
    condition = torch.tensor([0])
    for wrong in [
        {"steps": 0},
        {"steps": 1001},
        {"guidance_scale": -1.0},
        {"guidance_scale": float("nan")},
        {"seed": -1},
        {"first_index": -1},
    ]:
        arguments: dict[str, object] = {
            "steps": 1, "guidance_scale": 1.0, "seed": 0, "latent_shape": SHAPE, **wrong,
        }  # fmt: skip
        with pytest.raises(UsageError):
            sample_latents(denoiser, condition, **arguments)  # type: ignore[arg-type]
    empty = torch.zeros(0, dtype=torch.int64)
    assert sample_latents(denoiser, empty, steps=1, guidance_scale=1.0, seed=0, latent_shape=SHAPE).shape == (
        0,
        *SHAPE,
    )
