"""Rectified flow on latents (Liu, Gong, Liu, ICLR 2023; Lipman et al., ICLR 2023).

Path z_t = (1 - t) z + t n from a latent z (t = 0) to Gaussian noise n (t = 1); the target is the velocity
v = n - z, and the loss is the mean squared error over the latent's elements.

Timesteps are logit-normal, t = sigmoid(g) with g ~ N(0, 1) (Esser et al., ICML 2024, section 3.1): most draws
fall where the target is hardest. The functions here take t and noise as arguments. Where scans are private,
the caller draws them (and the choice of scan) from secret randomness; where they are public, from a seed; an
auditor passes the same t and noise to two networks and compares.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, ndtri
from torch import Tensor

from shared.errors import UsageError


class VelocityField(Protocol):
    """What the loss and the sampler need of a network (also where Opacus has wrapped it)."""

    def __call__(self, z_BCDHW: Tensor, t_B: Tensor, condition_B: Tensor, /) -> Tensor: ...


def timesteps_from_normal(g_B: Tensor) -> Tensor:
    """Map standard normal draws to logit-normal timesteps in (0, 1)."""
    return torch.sigmoid(g_B)


def timesteps_from_uniform(uniform_B: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same law from uniform draws in [0, 1): its inverse distribution function."""
    # 2^-54 keeps a draw of exactly 0 finite; it moves no other draw by more than that.
    return np.asarray(expit(ndtri(np.maximum(uniform_B, 2.0**-54))), dtype=np.float64)


def noised(z_BCDHW: Tensor, t_B: Tensor, noise_BCDHW: Tensor) -> Tensor:
    """z_t on the straight path between latents and noise."""
    t = t_B.view(-1, 1, 1, 1, 1)
    return (1.0 - t) * z_BCDHW + t * noise_BCDHW


def drop_condition(condition_B: Tensor, dropped_B: Tensor, *, null_index: int) -> Tensor:
    """Replace the condition by the null class where ``dropped_B`` (bool) says so (Ho and Salimans 2022)."""
    return torch.where(dropped_B, torch.full_like(condition_B, null_index), condition_B)


def per_sample_loss(
    denoiser: VelocityField, z_BCDHW: Tensor, condition_B: Tensor, t_B: Tensor, noise_BCDHW: Tensor
) -> Tensor:
    """Flow loss of each sample: shape [B], ndim 1, mean over the latent's elements.

    Sample i's loss depends on row i of the arguments alone.

    Raises:
        UsageError: the arguments are not one batch. (A loss of shape [B, 1] silently breaks the clipping of
            some Opacus modes; a broadcast would do the same here.)
    """
    b = z_BCDHW.shape[0]
    if z_BCDHW.ndim != 5 or noise_BCDHW.shape != z_BCDHW.shape:
        raise UsageError(f"latents {tuple(z_BCDHW.shape)} and noise {tuple(noise_BCDHW.shape)} must agree")
    if t_B.shape != (b,) or condition_B.shape != (b,):
        raise UsageError(
            f"timesteps {tuple(t_B.shape)} and conditions {tuple(condition_B.shape)} must both be ({b},)"
        )
    velocity_BCDHW = denoiser(noised(z_BCDHW, t_B, noise_BCDHW), t_B, condition_B)
    return (velocity_BCDHW - (noise_BCDHW - z_BCDHW)).square().flatten(1).mean(dim=1)
