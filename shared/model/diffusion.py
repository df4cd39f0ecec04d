"""Diffusion on latents: the path to noise, what the network predicts on it, the loss, and the sampling step.

A timestep t in [0, 1] has a noise level, and a level has the weights of signal and noise:

    z_t = alpha z + sigma n,   from a latent z (t = 0) to Gaussian noise n (t = 1).

- :class:`RectifiedFlow` (Liu, Gong, Liu, ICLR 2023; Lipman et al., ICLR 2023): alpha = 1 - level,
  sigma = level; the target is the velocity v = n - z; a sampling step is Euler's.
- :class:`VPrediction` (Salimans and Ho, ICLR 2022, section 4 and appendix D): alpha = cos(pi level / 2),
  sigma = sin(pi level / 2), the cosine schedule; the target is v = alpha n - sigma z; a sampling step is
  DDIM's (Song, Meng, Ermon, ICLR 2021). At t = 1 the signal is exactly zero (Lin et al., WACV 2024).

The loss is the mean squared error over the latent's elements. ``shift`` s lowers the log signal-to-noise
ratio by 2 log s at each timestep: Esser et al., ICML 2024, equation 23, for the rectified flow; Hoogeboom,
Heek, Salimans, ICML 2023, section 3.1, for the cosine schedule.

Timesteps are logit-normal, t = sigmoid(g) with g ~ N(0, 1) (Esser et al., section 3.1): most draws fall where
the target is hardest. The functions here take t and noise as arguments. Where scans are private, the caller
draws them (and the choice of scan) from secret randomness; where they are public, from a seed; an auditor
passes the same t and noise to two networks and compares.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, ndtri
from torch import Tensor, nn

from shared.errors import UsageError
from shared.model.presets import ModelPreset


class VelocityField(Protocol):
    """What the loss and the sampler need of a network (also where Opacus has wrapped it)."""

    def __call__(self, z_BCDHW: Tensor, level_B: Tensor, condition_B: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Diffusion(ABC):
    """A path from latents to noise with its target, loss and sampling step.

    Attributes:
        sampler: Name of path and step, for provenance.
        shift: See the module's text; 1 changes nothing.
    """

    sampler: ClassVar[str]
    shift: float = 1.0

    @abstractmethod
    def level(self, t_B: Tensor) -> Tensor:
        """Noise level in [0, 1] of timesteps, which is what the network is told."""

    @abstractmethod
    def weights(self, level_B: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of noise levels: the weights of signal and noise."""

    @abstractmethod
    def target(self, z_BCDHW: Tensor, level_B: Tensor, noise_BCDHW: Tensor) -> Tensor:
        """What the network should predict."""

    @abstractmethod
    def noise_prediction(self, z_BCDHW: Tensor, v_BCDHW: Tensor, level_B: Tensor) -> Tensor:
        """The noise in z_t that a predicted v stands for."""

    @abstractmethod
    def move(self, z_BCDHW: Tensor, v_BCDHW: Tensor, level_B: Tensor, then_B: Tensor) -> Tensor:
        """From one noise level to another without fresh noise: predicted signal and noise, mixed anew."""

    @abstractmethod
    def step(self, z_BCDHW: Tensor, v_BCDHW: Tensor, index: int, steps: int) -> Tensor:
        """Sampling step ``index`` of ``steps``, from t = 1 - index / steps to the next lower timestep."""

    def noised(self, z_BCDHW: Tensor, level_B: Tensor, noise_BCDHW: Tensor) -> Tensor:
        """z_t on the path between latents and noise."""
        alpha, sigma = (_column(part) for part in self.weights(level_B))
        return alpha * z_BCDHW + sigma * noise_BCDHW

    def per_sample_loss(
        self,
        denoiser: VelocityField,
        z_BCDHW: Tensor,
        condition_B: Tensor,
        t_B: Tensor,
        noise_BCDHW: Tensor,
    ) -> Tensor:
        """Loss of each sample: shape [B], ndim 1, mean over the latent's elements.

        Sample i's loss depends on row i of the arguments alone.

        Raises:
            UsageError: the network was made for another diffusion, or the arguments are not one batch. (A
                loss of shape [B, 1] silently breaks the clipping of some Opacus modes; a broadcast would do
                the same here.)
        """
        b = z_BCDHW.shape[0]
        # Opacus' wrapper does not pass attributes on.
        if getattr(getattr(denoiser, "_module", denoiser), "diffusion", self) != self:
            raise UsageError(f"the network was not made for {self}: take the loss of its own diffusion")
        if z_BCDHW.ndim != 5 or noise_BCDHW.shape != z_BCDHW.shape:
            raise UsageError(
                f"latents {tuple(z_BCDHW.shape)} and noise {tuple(noise_BCDHW.shape)} must agree"
            )
        if t_B.shape != (b,) or condition_B.shape != (b,):
            raise UsageError(
                f"timesteps {tuple(t_B.shape)} and conditions {tuple(condition_B.shape)} must both be ({b},)"
            )
        level_B = self.level(t_B)
        v_BCDHW = denoiser(self.noised(z_BCDHW, level_B, noise_BCDHW), level_B, condition_B)
        return (v_BCDHW - self.target(z_BCDHW, level_B, noise_BCDHW)).square().flatten(1).mean(dim=1)

    def _levels(self, index: int, steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
        t_2 = torch.tensor([1.0 - index / steps, 1.0 - (index + 1) / steps], device=device)
        level_2 = self.level(t_2)
        return level_2[:1], level_2[1:]


@dataclass(frozen=True)
class RectifiedFlow(Diffusion):
    """Straight path, velocity n - z, Euler steps."""

    sampler = "rectified-flow-euler"

    def level(self, t_B: Tensor) -> Tensor:
        if self.shift == 1.0:
            return t_B
        return self.shift * t_B / (1.0 + (self.shift - 1.0) * t_B)

    def weights(self, level_B: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - level_B, level_B

    def target(self, z_BCDHW: Tensor, level_B: Tensor, noise_BCDHW: Tensor) -> Tensor:
        return noise_BCDHW - z_BCDHW

    def noise_prediction(self, z_BCDHW: Tensor, v_BCDHW: Tensor, level_B: Tensor) -> Tensor:
        return z_BCDHW + _column(1.0 - level_B) * v_BCDHW

    def move(self, z_BCDHW: Tensor, v_BCDHW: Tensor, level_B: Tensor, then_B: Tensor) -> Tensor:
        return z_BCDHW + _column(then_B - level_B) * v_BCDHW

    def step(self, z_BCDHW: Tensor, v_BCDHW: Tensor, index: int, steps: int) -> Tensor:
        if self.shift == 1.0:
            return z_BCDHW - v_BCDHW / steps
        return self.move(z_BCDHW, v_BCDHW, *self._levels(index, steps, z_BCDHW.device))


@dataclass(frozen=True)
class VPrediction(Diffusion):
    """Variance-preserving path on a (shifted) cosine schedule, v-prediction, DDIM steps."""

    sampler = "v-prediction-ddim"

    def level(self, t_B: Tensor) -> Tensor:
        if self.shift == 1.0:
            return t_B
        angle_B = t_B * (math.pi / 2.0)
        return torch.atan2(self.shift * angle_B.sin(), angle_B.cos().clamp_min(0.0)) * (2.0 / math.pi)

    def weights(self, level_B: Tensor) -> tuple[Tensor, Tensor]:
        angle_B = level_B * (math.pi / 2.0)
        # The cosine of the binary32 number next to pi/2 is not 0 but -4e-8.
        return angle_B.cos().clamp_min(0.0), angle_B.sin()

    def target(self, z_BCDHW: Tensor, level_B: Tensor, noise_BCDHW: Tensor) -> Tensor:
        alpha, sigma = (_column(part) for part in self.weights(level_B))
        return alpha * noise_BCDHW - sigma * z_BCDHW

    def noise_prediction(self, z_BCDHW: Tensor, v_BCDHW: Tensor, level_B: Tensor) -> Tensor:
        alpha, sigma = (_column(part) for part in self.weights(level_B))
        return sigma * z_BCDHW + alpha * v_BCDHW

    def move(self, z_BCDHW: Tensor, v_BCDHW: Tensor, level_B: Tensor, then_B: Tensor) -> Tensor:
        alpha, sigma = (_column(part) for part in self.weights(level_B))
        alpha_then, sigma_then = (_column(part) for part in self.weights(then_B))
        clean_BCDHW = alpha * z_BCDHW - sigma * v_BCDHW
        noise_BCDHW = sigma * z_BCDHW + alpha * v_BCDHW
        return alpha_then * clean_BCDHW + sigma_then * noise_BCDHW

    def step(self, z_BCDHW: Tensor, v_BCDHW: Tensor, index: int, steps: int) -> Tensor:
        return self.move(z_BCDHW, v_BCDHW, *self._levels(index, steps, z_BCDHW.device))


RECTIFIED_FLOW = RectifiedFlow()
"""The unshifted rectified flow of ``micro`` and ``tiny``."""

per_sample_loss = RECTIFIED_FLOW.per_sample_loss
"""The loss of those presets. Code that serves every preset takes ``denoiser.diffusion.per_sample_loss``."""


def diffusion_of(preset: ModelPreset) -> Diffusion:
    """The diffusion that a preset names."""
    match preset.diffusion:
        case "rectified_flow":
            return RectifiedFlow(preset.noise_shift)
        case "v_prediction":
            return VPrediction(preset.noise_shift)


def diffusion_of_network(network: nn.Module) -> Diffusion:
    """The diffusion that a network was made for; the rectified flow where it names none."""
    own = getattr(network, "diffusion", RECTIFIED_FLOW)
    return own if isinstance(own, Diffusion) else RECTIFIED_FLOW


def timesteps_from_normal(g_B: Tensor) -> Tensor:
    """Map standard normal draws to logit-normal timesteps in (0, 1)."""
    return torch.sigmoid(g_B)


def timesteps_from_uniform(uniform_B: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same law from uniform draws in [0, 1): its inverse distribution function."""
    # 2^-54 keeps a draw of exactly 0 finite; it moves no other draw by more than that.
    return np.asarray(expit(ndtri(np.maximum(uniform_B, 2.0**-54))), dtype=np.float64)


def drop_condition(condition_B: Tensor, dropped_B: Tensor, *, null_index: int) -> Tensor:
    """Replace the condition by the null class where ``dropped_B`` (bool) says so (Ho and Salimans 2022)."""
    return torch.where(dropped_B, torch.full_like(condition_B, null_index), condition_B)


def drop_covariates(
    class_B: Tensor, dropped_BK: Tensor, *, n_rows: int, covariate_sizes: Sequence[int]
) -> Tensor:
    """Make covariates unknown where ``dropped_BK`` (bool) says so, so that each can be left out later."""
    kept_B, stride = class_B, n_rows
    for k, size in enumerate(covariate_sizes):
        row_B = class_B // stride % (size + 1)
        kept_B = torch.where(dropped_BK[:, k], kept_B - row_B * stride, kept_B)
        stride *= size + 1
    return kept_B


def _column(values_B: Tensor) -> Tensor:
    return values_B.view(-1, 1, 1, 1, 1)
