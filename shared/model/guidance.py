"""Classifier-free guidance: the sampler's, and an attacker's who sees guided samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.errors import UsageError
from shared.model.diffusion import Diffusion, diffusion_of_network


class GuidedVelocity(nn.Module):
    """A velocity field under classifier-free guidance (Ho and Salimans 2022): v_0 + s (v_c - v_0).

    Args:
        denoiser: Takes (z_BCDHW, level_B, condition_B); ``denoiser.null_index`` is its null class, and
            ``denoiser.diffusion`` its diffusion (the rectified flow where it names none).
        scale: s. 1 is the conditional field itself (one pass), 0 the unconditional one.

    Raises:
        UsageError: a scale other than 1 for a network without a null class.
    """

    def __init__(self, denoiser: nn.Module, scale: float) -> None:
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        null_index = getattr(denoiser, "null_index", None)
        if scale != 1.0 and not isinstance(null_index, int):
            raise UsageError("guidance needs a denoiser with a null class (null_index)")
        self.diffusion: Diffusion = diffusion_of_network(denoiser)
        self._null_index = null_index if isinstance(null_index, int) else -1

    def forward(self, z_BCDHW: Tensor, level_B: Tensor, condition_B: Tensor) -> Tensor:
        """Velocity v_BCDHW."""
        velocity_BCDHW: Tensor = self.denoiser(z_BCDHW, level_B, condition_B)
        if self.scale == 1.0:
            return velocity_BCDHW
        null_B = torch.full_like(condition_B, self._null_index)
        null_BCDHW: Tensor = self.denoiser(z_BCDHW, level_B, null_B)
        return null_BCDHW + self.scale * (velocity_BCDHW - null_BCDHW)
