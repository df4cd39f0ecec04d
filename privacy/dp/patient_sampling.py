"""Who takes part in a step, and which scan, timestep and noise stand for a patient: all secret coins.

Poisson sampling: each patient joins independently with the plan's rate, whoever the others are (Abadi et al.,
CCS 2016; amplification as accounted in :mod:`privacy.dp.accounting` needs exactly this, and needs the coins
to stay secret). Batches of a fixed size, shuffled epochs or q = 1/len(loader) are other mechanisms.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.secret_random import SecretRandom
from shared.errors import UsageError

TimestepDraw = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Maps uniform numbers in [0, 1) to timesteps in [0, 1]: the inverse distribution function of the
timesteps."""


def uniform_timesteps(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Timesteps uniform in [0, 1)."""
    return uniform


def sample_patients(secret: SecretRandom, *, sampling_rate: float, n_patients: int) -> NDArray[np.int64]:
    """Indices of the patients that take part in a step, ascending; possibly none.

    Formal guarantee: each patient takes part independently, with probability floor(2^64 q) / 2^64 <= q; with
    q = 1, everybody does.
    """
    if not isinstance(secret, SecretRandom):
        raise UsageError("Poisson coins are drawn from SecretRandom alone, never from a seeded generator")
    if not 0 < sampling_rate <= 1:
        raise UsageError(f"sampling rate {sampling_rate:g} is not in (0, 1]")
    if sampling_rate == 1:
        return np.arange(n_patients, dtype=np.int64)
    threshold = np.uint64(int(sampling_rate * 2.0**64))
    return np.flatnonzero(secret.uint64(n_patients) < threshold).astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class PatientDraws:
    """The K draws that stand for one patient in one step: scan index [K], timestep [K], noise [K, C, D, H,
    W]."""

    scan_K: NDArray[np.int64]
    t_K: NDArray[np.float64]
    noise_KCDHW: NDArray[np.float64]


def draw_for_patient(
    secret: SecretRandom,
    *,
    n_scans: int,
    latent_shape: tuple[int, ...],
    draws: int,
    draw_timesteps: TimestepDraw = uniform_timesteps,
) -> PatientDraws:
    """``draws`` independent draws of (uniformly chosen scan, timestep, standard normal noise)."""
    scan_K = secret.below(n_scans, draws)
    t_K = np.asarray(draw_timesteps(secret.uniform(draws)), dtype=np.float64)
    if t_K.shape != (draws,) or not ((t_K >= 0) & (t_K <= 1)).all():
        raise UsageError(f"draw_timesteps must give {draws} timesteps in [0, 1]")
    noise = secret.normal(draws * int(np.prod(latent_shape)))
    return PatientDraws(scan_K=scan_K, t_K=t_K, noise_KCDHW=noise.reshape(draws, *latent_shape))
