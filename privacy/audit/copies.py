"""Copies: generated samples that lie too near to a member's scan. Patients are counted, not samples.

The embedding is public: a latent is decoded and encoded again by the public autoencoder (what a receiver of
the volume would see), pooled to half its grid, and compared by root mean square. Latents are normalised by
public constants of the autoencoder. The threshold is calibrated on public patients before training.
Distances stay inside the hospital; only the number of patients nearer than the threshold leaves, noised.

This finds copies up to small shifts. Mirrored, intensity-scaled or blended copies may pass it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from privacy.audit.bounds import FloatArray, clopper_pearson
from privacy.audit.membership import Progress, ScansOfPatient
from shared.errors import UsageError


class Autoencoder(Protocol):
    """The public autoencoder's two directions (:class:`shared.model.autoencoder.LatentAutoencoder`)."""

    def decode(self, z_BCDHW: Tensor) -> tuple[Tensor, Tensor]: ...
    def encode(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> Tensor: ...


@torch.no_grad()
def embed(autoencoder: Autoencoder | None, z_BCDHW: Tensor, *, batch_size: int = 16) -> Tensor:
    """Embedding of latents, float32 [B, E] on the CPU; without an autoencoder, of the latents as they are."""
    parts = []
    for z in torch.split(z_BCDHW, batch_size):
        seen = z if autoencoder is None else autoencoder.encode(*autoencoder.decode(z))
        d, h, w = (math.ceil(side / 2) for side in seen.shape[2:])
        parts.append(F.adaptive_avg_pool3d(seen, (d, h, w)).flatten(1).to("cpu", torch.float32))
    if not parts:
        raise UsageError("there is nothing to embed")
    return torch.cat(parts)


def nearest_distances(
    autoencoder: Autoencoder | None,
    patients: Sequence[ScansOfPatient],
    sample_embedding_NE: Tensor,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> FloatArray:
    """Distance of each patient's nearest scan to its nearest sample, float64 [P]. Private.

    Each patient is embedded alone, so that the figure depends on that patient and the samples only.
    """
    nearest: FloatArray = np.full(len(patients), np.inf)
    for index, patient in enumerate(patients):
        if patient.latents_SCDHW.shape[0]:
            own_SE = embed(autoencoder, patient.latents_SCDHW.to(device))
            nearest[index] = float(_distances(own_SE, sample_embedding_NE).min())
        if progress is not None:
            progress("copies", index + 1, len(patients))
    return nearest


@dataclass(frozen=True, kw_only=True)
class CopyCalibration:
    """A threshold from public patients.

    Attributes:
        distance: For ``plan.audit.copy_distance``.
        false_copy_rate: Probability that a new patient, like the public ones, counts as copied without being
            (expected over calibrations: split-conformal, exchangeable patients).
        highest_rate: 95% upper bound of the rate on the public patients themselves.
        n_patients: Public patients it rests on.
    """

    distance: float
    false_copy_rate: float
    highest_rate: float
    n_patients: int


def calibrate_copy_distance(
    autoencoder: Autoencoder | None,
    public_patients: Sequence[ScansOfPatient],
    *,
    false_copy_rate: float = 0.01,
    unrelated_NCDHW: Tensor | None = None,
    device: str | torch.device = "cpu",
) -> CopyCalibration:
    """Threshold under which public patients come near something that cannot be a copy of them.

    For each public patient: the distance to the nearest scan of any other public patient, or to the nearest
    of ``unrelated_NCDHW`` (samples of a prior that has not seen these patients: give as many as the audit
    checks). The threshold is the order statistic that ``false_copy_rate`` asks for; with too few patients
    for that rate it is 0.8 times the smallest distance seen, and the rate that can be claimed is 1 / (n +
    1).

    Raises:
        UsageError: fewer than 3 public patients, or distances that are zero (the same scan twice).
    """
    if len(public_patients) < 3:
        raise UsageError(f"{len(public_patients)} public patients cannot calibrate a distance; 3 at least")
    embedded = [embed(autoencoder, patient.latents_SCDHW.to(device)) for patient in public_patients]
    unrelated = [] if unrelated_NCDHW is None else [embed(autoencoder, unrelated_NCDHW.to(device))]
    nearest = np.sort(
        [
            float(_distances(own, torch.cat([*embedded[:i], *embedded[i + 1 :], *unrelated])).min())
            for i, own in enumerate(embedded)
        ]
    )
    n = len(nearest)
    rank = math.floor(false_copy_rate * (n + 1))
    distance = float(nearest[rank - 1]) if rank >= 1 else 0.8 * float(nearest[0])
    if not distance > 0:
        raise UsageError(
            "public patients are at distance 0 of one another", remedy="remove duplicate public scans"
        )
    below = int((nearest < distance).sum())
    return CopyCalibration(
        distance=distance,
        false_copy_rate=max(rank, 1) / (n + 1),
        highest_rate=clopper_pearson(below, n, error=0.05).high,
        n_patients=n,
    )


def _distances(own_SE: Tensor, others_NE: Tensor) -> Tensor:
    """Root mean square differences [S, N], by differences and not products: exact zeros stay zero."""
    return torch.cdist(own_SE, others_NE, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(
        own_SE.shape[1]
    )
