"""Primary attack: reference-calibrated loss, one figure for each patient.

For a patient, the score is the mean over the patient's scans, the plan's timesteps and a few fixed noises
of L_public(x) - L_candidate(x), both networks on the same timestep and noise (calibration by difficulty:
Watson et al., ICLR 2022; loss of diffusion models: Matsumoto et al., SPW 2023). A higher score speaks for
membership: the sign is fixed here, thresholds are fixed in the plan.

Timesteps and noises are public and the same for every scan. Every patient is a batch of its own, so that a
patient's figures depend on that patient alone, to the last bit: what :mod:`privacy.audit.counts` says about
sensitivity rests on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from privacy.audit.bounds import FloatArray
from shared.canonical import digest
from shared.errors import UsageError

LossPerSample = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(denoiser, z_BCDHW, condition_B, t_B, noise_BCDHW) -> loss_B."""

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total)."""


class ScansOfPatient(Protocol):
    """What the audit needs of a patient (:class:`privacy.dp.patients.PatientScans` has it)."""

    @property
    def patient_key(self) -> str: ...
    @property
    def latents_SCDHW(self) -> Tensor: ...  # noqa: N802
    @property
    def conditions_S(self) -> Tensor: ...  # noqa: N802


@dataclass(frozen=True, kw_only=True, eq=False)
class AttackNoise:
    """Public timesteps and noises; row r is one (timestep, draw).

    Attributes:
        t_R: Timesteps in [0, 1].
        noise_RCDHW: Standard normal.
    """

    t_R: Tensor
    noise_RCDHW: Tensor

    @classmethod
    def from_plan_digest(
        cls,
        plan_digest: bytes,
        *,
        timesteps: Sequence[float],
        draws_per_timestep: int,
        latent_shape: tuple[int, ...],
    ) -> AttackNoise:
        """The same bytes at every site. This randomness is public: it hides nothing.

        Raises:
            UsageError: no timesteps, or one outside [0, 1].
        """
        if not timesteps or draws_per_timestep < 1 or not all(0.0 <= t <= 1.0 for t in timesteps):
            raise UsageError("the attack needs timesteps between 0 and 1, and at least one draw of each")
        rows = [(t, draw) for t in timesteps for draw in range(draws_per_timestep)]
        noise = [
            np.random.Generator(
                np.random.Philox(
                    int.from_bytes(
                        digest("lacuna/audit-noise/v1", plan_digest, row.to_bytes(4, "big"))[:16], "big"
                    )
                )
            ).standard_normal(latent_shape, dtype=np.float32)
            for row in range(len(rows))
        ]
        return cls(
            t_R=torch.tensor([t for t, _ in rows], dtype=torch.float32),
            noise_RCDHW=torch.from_numpy(np.stack(noise)),
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttackLosses:
    """Mean loss of each patient on both networks, float64 [P]. Private; the repr hides them."""

    public_P: FloatArray
    candidate_P: FloatArray

    @property
    def score_P(self) -> FloatArray:  # noqa: N802
        """L_public - L_candidate; higher speaks for membership."""
        return self.public_P - self.candidate_P

    def __repr__(self) -> str:
        return "AttackLosses(<private>)"


def attack_losses(
    public_denoiser: nn.Module,
    candidate_denoiser: nn.Module,
    patients: Sequence[ScansOfPatient],
    *,
    loss: LossPerSample,
    noise: AttackNoise,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    stage: str = "attack",
    progress: Progress | None = None,
) -> AttackLosses:
    """Both losses of each patient, in the order given. Networks are left in the mode they came in.

    A loss that is not finite stays as it is; such a patient is counted nowhere.
    """
    figures: FloatArray = np.zeros((2, len(patients)))
    modes = [(network, network.training) for network in (public_denoiser, candidate_denoiser)]
    try:
        for network, _ in modes:
            network.eval()
        for index, patient in enumerate(patients):
            z_SCDHW, condition_S = patient.latents_SCDHW.to(device), patient.conditions_S.to(device)
            for row, (network, _) in enumerate(modes):
                figures[row, index] = mean_loss(
                    network, z_SCDHW, condition_S, noise, loss=loss, batch_size=batch_size
                )
            if progress is not None:
                progress(stage, index + 1, len(patients))
    finally:
        for network, training in modes:
            network.train(training)
    return AttackLosses(public_P=figures[0], candidate_P=figures[1])


@torch.no_grad()
def mean_loss(
    network: nn.Module,
    z_SCDHW: Tensor,
    condition_S: Tensor,
    noise: AttackNoise,
    *,
    loss: LossPerSample,
    batch_size: int = 256,
) -> float:
    """Mean loss of one patient over scans, timesteps and noises; NaN for a patient without scans."""
    t_R, noise_RCDHW = noise.t_R.to(z_SCDHW.device), noise.noise_RCDHW.to(z_SCDHW.device)
    scans, rows = z_SCDHW.shape[0], t_R.shape[0]
    if scans == 0:
        return float("nan")
    total = 0.0
    for start in range(0, scans * rows, batch_size):
        index_B = torch.arange(start, min(start + batch_size, scans * rows), device=z_SCDHW.device)
        scan_B, row_B = index_B // rows, index_B % rows
        loss_B = loss(network, z_SCDHW[scan_B], condition_S[scan_B], t_R[row_B], noise_RCDHW[row_B])
        total += float(loss_B.to(torch.float64).sum())
    return total / (scans * rows)
