"""Membership figures from a few queries without noise: SimA, PIA and SecMI, on the network's own diffusion.

Written out for the rectified flow; :mod:`shared.model.diffusion` has the same for v-prediction. On the path
z_t = (1 - t) z + t n a velocity field v gives, at any point x and time t,

    noise prediction  n(x, t) = x + (1 - t) v(x, t)      data prediction  x - t v(x, t)

and the score of the law of z_t is -n(x, t) / t. One step of DDIM without noise, from t to t' (data and noise
prediction mixed anew), is x + (t' - t) v(x, t): an Euler step. With these three the published attacks carry
over as they are:

- SimA [1]: the norm of the predicted noise at one point, |n(x_t, t)|, at x_t = (1 - t) z, where the noise on
  the path is zero. The denoiser points to a local mean of training data; for a member that is the point
  itself. (The paper queries z, which differs from (1 - t) z by nothing much at its small timesteps.)
- PIA [2]: the noise n_0 predicted at the latent itself and a small timestep stands for the unknown noise;
  |n((1 - t) z + t n_0, t) - n_0| at later timesteps.
- SecMI [3], t-error: the deterministic path from z up to the last but one timestep, then one step on and
  back: the distance from where it started, here |t' - t| |v(x_t, t) - v(x_t', t')|.

Every figure is the mean over elements of the p-th power of the absolute difference (the paper's p: 4 for
SimA's and PIA's code, 2 for SecMI), so that it does not depend on the latent's size. Small figures speak for
membership in the papers; which side counts in a study is in its plan (``member_side``).

    [1] Rao, Qu, Moyer, Score-based Membership Inference on Diffusion Models, arXiv 2509.25003.
    [2] Kong et al., An Efficient Membership Inference Attack for the Diffusion Model by Proximal
        Initialization, ICLR 2024.
    [3] Duan et al., Are Diffusion Models Vulnerable to Membership Inference Attacks?, ICML 2023, section 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from shared.model.diffusion import diffusion_of_network

TrajectoryAttack = Callable[[nn.Module, Tensor, Tensor, Sequence[float], int], Tensor]
"""(velocity field, z_BCDHW, condition_B, timesteps, norm) -> figure_B, float32."""


def noise_prediction(field: nn.Module, x_BCDHW: Tensor, t: float, condition_B: Tensor) -> Tensor:
    """n(x, t): the noise that the network sees in x."""
    level_B = _level(field, x_BCDHW, t)
    return diffusion_of_network(field).noise_prediction(
        x_BCDHW, field(x_BCDHW, level_B, condition_B), level_B
    )


def sima(
    field: nn.Module, z_BCDHW: Tensor, condition_B: Tensor, timesteps: Sequence[float], norm: int
) -> Tensor:
    """Mean over ``timesteps`` of the predicted noise's size where there is none."""
    figures = []
    for t in timesteps:
        x_BCDHW = _noised(field, z_BCDHW, t, torch.zeros_like(z_BCDHW))
        figures.append(_size(noise_prediction(field, x_BCDHW, t, condition_B), norm))
    return torch.stack(figures).mean(dim=0)


def pia(
    field: nn.Module, z_BCDHW: Tensor, condition_B: Tensor, timesteps: Sequence[float], norm: int
) -> Tensor:
    """Mean over ``timesteps[1:]`` of how far the noise predicted at ``timesteps[0]`` moves."""
    first, *later = timesteps
    noise_BCDHW = noise_prediction(field, z_BCDHW, first, condition_B)
    figures = []
    for t in later:
        x_BCDHW = _noised(field, z_BCDHW, t, noise_BCDHW)
        found_BCDHW = noise_prediction(field, x_BCDHW, t, condition_B)
        figures.append(_size(found_BCDHW - noise_BCDHW, norm))
    return torch.stack(figures).mean(dim=0)


def secmi(
    field: nn.Module, z_BCDHW: Tensor, condition_B: Tensor, timesteps: Sequence[float], norm: int
) -> Tensor:
    """t-error of the step from ``timesteps[-2]`` to ``timesteps[-1]`` and back, on the path from the latent.

    The path starts at time ``timesteps[0]`` in the latent itself.
    """
    x_BCDHW = z_BCDHW
    for t, t_next in itertools.pairwise(timesteps[:-1]):
        x_BCDHW = _move(field, x_BCDHW, t, t_next, condition_B)
    t, t_next = timesteps[-2:]
    there_BCDHW = _move(field, x_BCDHW, t, t_next, condition_B)
    back_BCDHW = _move(field, there_BCDHW, t_next, t, condition_B)
    return _size(back_BCDHW - x_BCDHW, norm)


TRAJECTORY_ATTACKS: dict[str, TrajectoryAttack] = {"sima": sima, "pia": pia, "secmi": secmi}


def _level(field: nn.Module, x_BCDHW: Tensor, t: float) -> Tensor:
    t_B = torch.full((x_BCDHW.shape[0],), t, dtype=x_BCDHW.dtype, device=x_BCDHW.device)
    return diffusion_of_network(field).level(t_B)


def _noised(field: nn.Module, z_BCDHW: Tensor, t: float, noise_BCDHW: Tensor) -> Tensor:
    return diffusion_of_network(field).noised(z_BCDHW, _level(field, z_BCDHW, t), noise_BCDHW)


def _move(field: nn.Module, x_BCDHW: Tensor, t: float, t_next: float, condition_B: Tensor) -> Tensor:
    level_B, then_B = (_level(field, x_BCDHW, time) for time in (t, t_next))
    velocity_BCDHW = field(x_BCDHW, level_B, condition_B)
    return diffusion_of_network(field).move(x_BCDHW, velocity_BCDHW, level_B, then_B)


def _size(x_BCDHW: Tensor, norm: int) -> Tensor:
    return x_BCDHW.abs().pow(norm).flatten(1).mean(dim=1)
