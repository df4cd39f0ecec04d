"""Secondary membership attacks: one score for each patient, every choice taken from the plan.

:func:`secondary_scores` runs one ``SecondaryAttackClause``; :func:`usual_attacks` is what a new plan gets. A
higher score speaks for membership: the side is fixed in the plan before training, never from the data that it
is judged on. (A side chosen afterwards turns an AUC of 0.45 into 0.55 and counts noise as a finding.)

As in the primary attack (:mod:`privacy.audit.membership`) a patient's score is the mean over the patient's
scans, and each patient is a batch of its own, so that it depends on that patient alone to the last bit. The
latents may be cached latents or, for a network that works on voxels, the images themselves; images that have
to be encoded first go through :func:`encode_patients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from privacy.audit.bounds import FloatArray
from privacy.audit.gradient_norm import gradient_norm
from privacy.audit.membership import AttackNoise, LossPerSample, Progress, ScansOfPatient, mean_loss
from privacy.audit.proposal import usual_attacks
from privacy.audit.trajectory_attacks import TRAJECTORY_ATTACKS
from shared.model.diffusion import diffusion_of_network
from shared.model.guidance import GuidedVelocity
from shared.study_plan import SecondaryAttackClause

__all__ = [
    "EncodedPatient",
    "ImageEncoder",
    "PatientImages",
    "encode_patients",
    "secondary_scores",
    "usual_attacks",
]


def secondary_scores(
    attack: SecondaryAttackClause,
    candidate_denoiser: nn.Module,
    patients: Sequence[ScansOfPatient],
    *,
    public_denoiser: nn.Module,
    plan_digest: bytes,
    loss: LossPerSample | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    stage: str | None = None,
    progress: Progress | None = None,
) -> FloatArray:
    """Score of each patient, float64 [P], in the order given; higher speaks for membership.

    Args:
        attack: What is done.
        candidate_denoiser: Takes (z_BCDHW, t_B, condition_B) and returns a velocity; for guidance it has a
            ``null_index``. Left in the mode it came in.
        public_denoiser: The prior; queried where the attack is calibrated.
        plan_digest: Fixes the public noises of ``loss`` and ``gradient_norm``.
        loss: None is the loss of the candidate's own diffusion.
        batch_size: Rows of one forward pass; a patient's scans are never batched with another's.
        stage, progress: ``progress(stage, done, total)`` after each patient.

    A figure that is not finite stays so; such a patient is counted nowhere.

    Raises:
        UsageError: guidance was asked for of a network without a null class.
    """
    networks = [candidate_denoiser, *([public_denoiser] if attack.calibrated else [])]
    fields = [GuidedVelocity(network, attack.guidance_scale) for network in networks]
    modes = [(network, network.training) for network in networks]
    noise = _noise(attack, patients, plan_digest)
    loss = loss or diffusion_of_network(candidate_denoiser).per_sample_loss
    sign = 1.0 if attack.member_side == "high" else -1.0
    scores = np.zeros(len(patients))
    try:
        for network, _ in modes:
            network.eval()
        for index, patient in enumerate(patients):
            z_SCDHW, condition_S = patient.latents_SCDHW.to(device), patient.conditions_S.to(device)
            figures = [
                _figure(attack, field, z_SCDHW, condition_S, noise, loss, batch_size) for field in fields
            ]
            scores[index] = sign * (figures[0] - (figures[1] if attack.calibrated else 0.0))
            if progress is not None:
                progress(attack.attack_id if stage is None else stage, index + 1, len(patients))
    finally:
        for network, training in modes:
            network.train(training)
    return scores


def _noise(
    attack: SecondaryAttackClause, patients: Sequence[ScansOfPatient], plan_digest: bytes
) -> AttackNoise | None:
    if attack.attack in TRAJECTORY_ATTACKS or not patients:
        return None
    return AttackNoise.from_plan_digest(
        plan_digest,
        timesteps=attack.timesteps,
        draws_per_timestep=attack.draws_per_timestep,
        latent_shape=tuple(patients[0].latents_SCDHW.shape[1:]),
    )


def _figure(
    attack: SecondaryAttackClause,
    field: GuidedVelocity,
    z_SCDHW: Tensor,
    condition_S: Tensor,
    noise: AttackNoise | None,
    loss: LossPerSample,
    batch_size: int,
) -> float:
    """One network's figure of one patient: the mean over the patient's scans."""
    if z_SCDHW.shape[0] == 0:
        return float("nan")
    if noise is None:
        run, total = TRAJECTORY_ATTACKS[attack.attack], 0.0
        with torch.no_grad():
            for start in range(0, z_SCDHW.shape[0], batch_size):
                part = slice(start, start + batch_size)
                figure_B = run(field, z_SCDHW[part], condition_S[part], attack.timesteps, attack.norm)
                total += float(figure_B.to(torch.float64).sum())
        return total / z_SCDHW.shape[0]
    if attack.attack == "loss":
        return mean_loss(field, z_SCDHW, condition_S, noise, loss=loss, batch_size=batch_size)
    return gradient_norm(
        field, z_SCDHW, condition_S, noise=noise, loss=loss, norm=attack.norm, batch_size=batch_size
    )


class ImageEncoder(Protocol):
    """What :func:`encode_patients` needs of an autoencoder."""

    def encode(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PatientImages:
    """One patient's scans as images: image_S1DHW (float32 in [0, 1]), mask_SDHW (labels), conditions_S."""

    patient_key: str
    image_S1DHW: Tensor
    mask_SDHW: Tensor
    conditions_S: Tensor

    def __repr__(self) -> str:
        return "PatientImages(<private>)"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EncodedPatient:
    """The same as latents; a :class:`privacy.audit.membership.ScansOfPatient`."""

    patient_key: str
    latents_SCDHW: Tensor
    conditions_S: Tensor

    def __repr__(self) -> str:
        return "EncodedPatient(<private>)"


@torch.no_grad()
def encode_patients(
    autoencoder: ImageEncoder,
    patients: Sequence[PatientImages],
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> list[EncodedPatient]:
    """Latents of images, each scan encoded alone, so that no patient's depends on another's."""
    encoded = []
    for done, patient in enumerate(patients, start=1):
        latents = [
            autoencoder.encode(image_1DHW[None].to(device), mask_DHW[None].to(device))[0].float().cpu()
            for image_1DHW, mask_DHW in zip(patient.image_S1DHW, patient.mask_SDHW, strict=True)
        ]
        encoded.append(
            EncodedPatient(
                patient_key=patient.patient_key,
                latents_SCDHW=torch.stack(latents),
                conditions_S=patient.conditions_S,
            )
        )
        if progress is not None:
            progress("encoding", done, len(patients))
    return encoded
