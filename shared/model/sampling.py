"""Few-step sampler of the denoiser's diffusion, with classifier-free guidance (Ho and Salimans 2022).

The same seed, batch and number of threads give the same bytes. The noise of sample i depends on (seed, i)
alone, so another batch size gives the same volumes up to rounding (1e-4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from shared.errors import UsageError
from shared.model.autoencoder import LatentAutoencoder
from shared.model.denoiser import Denoiser
from shared.model.guidance import GuidedVelocity

_NOISE_STREAM = 0x4C61_6375


def initial_noise(*, seed: int, first_index: int, count: int, shape: tuple[int, int, int, int]) -> Tensor:
    """Standard normal noise_BCDHW of samples first_index to first_index + count - 1 (public randomness)."""
    if seed < 0 or first_index < 0 or count < 0:
        raise UsageError(f"seed {seed}, first index {first_index} and count {count} must not be negative")
    rows = [
        np.random.Generator(
            np.random.Philox(np.random.SeedSequence([_NOISE_STREAM, seed, index]))
        ).standard_normal(shape, dtype=np.float32)
        for index in range(first_index, first_index + count)
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros((0, *shape))


def interpolated_noise(
    *, seed: int, to_seed: int, positions: Sequence[float], shape: tuple[int, int, int, int]
) -> Tensor:
    """noise_BCDHW on the great circle between two seeds' first noises (Shoemake 1985; Song et al. 2021).

    Each step has the norm of Gaussian noise, which a straight line between two noises would lose.
    """
    start, end = (
        initial_noise(seed=s, first_index=0, count=1, shape=shape).double() for s in (seed, to_seed)
    )
    cosine = float((start * end).sum() / (start.norm() * end.norm()))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if angle < 1e-6:
        return start.float().repeat(len(positions), 1, 1, 1, 1)
    steps = [
        (math.sin((1.0 - x) * angle) * start + math.sin(x * angle) * end) / math.sin(angle) for x in positions
    ]
    return torch.cat(steps).float()


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    condition_B: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    latent_shape: tuple[int, int, int, int],
    first_index: int = 0,
    noise_BCDHW: Tensor | None = None,
) -> Tensor:
    """Integrate from noise (t = 1) to latents (t = 0) in steps that are equal in t.

    Args:
        denoiser: Its mode (train or eval) does not matter: it has no dropout.
        condition_B: Rows of the embedding, int64 [B].
        steps: Number of steps, 1 to 1000.
        guidance_scale: 1 is none (and saves half the work), above 1 exaggerates the condition.
        seed: Public seed, not negative.
        latent_shape: (C, D, H, W).
        first_index: Index of the batch's first sample; the noise depends on (seed, index).
        noise_BCDHW: The noise itself, in place of the one of seed and index.

    Returns:
        Normalised latents z_BCDHW.

    Raises:
        UsageError: an argument out of range.
    """
    if not 1 <= steps <= 1000 or not 0.0 <= guidance_scale <= 100.0:
        raise UsageError(f"{steps} steps with guidance {guidance_scale}: 1 to 1000 steps, guidance 0 to 100")
    device = next(denoiser.parameters()).device
    condition_B = condition_B.to(device)
    b = condition_B.shape[0]
    if noise_BCDHW is None:
        noise_BCDHW = initial_noise(seed=seed, first_index=first_index, count=b, shape=latent_shape)
    z_BCDHW = noise_BCDHW.to(device)
    if b == 0:
        return z_BCDHW
    guided, diffusion = GuidedVelocity(denoiser, guidance_scale), denoiser.diffusion
    for step in range(steps):
        level_B = diffusion.level(torch.full((b,), 1.0 - step / steps, device=device))
        z_BCDHW = diffusion.step(z_BCDHW, guided(z_BCDHW, level_B, condition_B), step, steps)
    return z_BCDHW


def generate_volumes(
    autoencoder: LatentAutoencoder,
    denoiser: Denoiser,
    *,
    condition: int,
    count: int,
    seed: int,
    grid_shape: tuple[int, int, int],
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield image_DHW (float32 in [0, 1]) and mask_DHW (uint8), one sample after the other.

    ``steps`` and ``guidance_scale`` default to the preset's.
    """
    preset = denoiser.preset
    latent_shape = preset.latent_shape(grid_shape)
    for first in range(0, count, batch_size):
        condition_B = torch.full((min(batch_size, count - first),), condition, dtype=torch.int64)
        z_BCDHW = sample_latents(
            denoiser,
            condition_B,
            steps=preset.sampling_steps if steps is None else steps,
            guidance_scale=preset.guidance_scale if guidance_scale is None else guidance_scale,
            seed=seed,
            latent_shape=latent_shape,
            first_index=first,
        )
        with torch.no_grad():
            image_B1DHW, mask_BDHW = autoencoder.decode(z_BCDHW)
        for image_1DHW, mask_DHW in zip(image_B1DHW.cpu(), mask_BDHW.cpu(), strict=True):
            yield image_1DHW[0], mask_DHW
