"""Copies: generated samples that lie too near to a member's scan. Patients are counted, not samples.

What copies are looked for in is public (:class:`CopySpace`): latents are decoded by the public autoencoder,
as a receiver sees them, and mapped to unit vectors by a network that was trained on public volumes alone
(:mod:`shared.model.copy_embedding`); each scan of a patient is compared in its eight mirrored views. The
threshold is calibrated on public patients before training. Distances stay inside the hospital; only the
number of patients nearer than the threshold leaves, noised. No sample is ever left out because of a patient:
a candidate with copies is refused whole.

A plan without an embedding (``audit.copy_embedding_sha256``) compares decoded and encoded latents, pooled to
half their grid, by root mean square. That finds copies up to small shifts; mirrored, intensity-scaled or
blended ones may pass it.
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
from shared.model.copy_embedding import mirrored


class Autoencoder(Protocol):
    """The public autoencoder's two directions (:class:`shared.model.autoencoder.LatentAutoencoder`)."""

    def decode(self, z_BCDHW: Tensor) -> tuple[Tensor, Tensor]: ...
    def encode(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> Tensor: ...


class VolumeEmbedding(Protocol):
    """Unit vectors of volumes (:class:`shared.model.copy_embedding.CopyEmbedding`)."""

    def __call__(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class CopySpace:
    """Where nearness is measured. Public.

    Attributes:
        autoencoder: The plan's; None compares latents as they are.
        embedding: The plan's, in evaluation mode; None compares decoded and encoded latents. It needs the
            autoencoder.
        batch_size: Latents of one forward pass.
    """

    autoencoder: Autoencoder | None
    embedding: VolumeEmbedding | None = None
    batch_size: int = 32

    @torch.no_grad()
    def of_samples(self, z_BCDHW: Tensor) -> Tensor:
        """Embedding of latents, float32 [B, E] on the CPU."""
        return self._embed(z_BCDHW, views=False)

    @torch.no_grad()
    def of_patient(self, z_SCDHW: Tensor) -> Tensor:
        """The same of a patient's scans in all views, [S * V, E]; views of one scan follow each other."""
        return self._embed(z_SCDHW, views=True)

    @property
    def views(self) -> int:
        """Rows of :meth:`of_patient` for each scan."""
        return 8 if self._volumes is not None else 1

    def distances(self, own_SE: Tensor, others_NE: Tensor) -> Tensor:
        """[S, N], by differences and not products: exact zeros stay zero."""
        apart = torch.cdist(own_SE, others_NE, compute_mode="donot_use_mm_for_euclid_dist")
        return apart if self._volumes is not None else apart / math.sqrt(own_SE.shape[1])

    @property
    def _volumes(self) -> tuple[Autoencoder, VolumeEmbedding] | None:
        if self.autoencoder is None or self.embedding is None:
            return None
        return self.autoencoder, self.embedding

    def _embed(self, z_BCDHW: Tensor, *, views: bool) -> Tensor:
        if z_BCDHW.shape[0] == 0:
            raise UsageError("there is nothing to embed")
        parts = [self._embed_batch(z, views) for z in torch.split(z_BCDHW, self.batch_size)]
        return torch.cat([part.to("cpu", torch.float32) for part in parts])

    def _embed_batch(self, z_BCDHW: Tensor, views: bool) -> Tensor:
        if self._volumes is not None:
            autoencoder, embedding = self._volumes
            volumes = autoencoder.decode(z_BCDHW)
            return embedding(*(mirrored(*volumes) if views else volumes))
        seen = z_BCDHW
        if self.autoencoder is not None:
            seen = self.autoencoder.encode(*self.autoencoder.decode(z_BCDHW))
        d, h, w = (math.ceil(side / 2) for side in seen.shape[2:])
        return F.adaptive_avg_pool3d(seen, (d, h, w)).flatten(1)


def nearest_distances(
    space: CopySpace,
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
            own_SE = space.of_patient(patient.latents_SCDHW.to(device))
            nearest[index] = float(space.distances(own_SE, sample_embedding_NE).min())
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
        n_samples: Unrelated samples that each of them was compared with. An audit of more samples has more
            false copies than ``false_copy_rate`` says.
    """

    distance: float
    false_copy_rate: float
    highest_rate: float
    n_patients: int
    n_samples: int


def calibrate_copy_distance(
    space: CopySpace,
    public_patients: Sequence[ScansOfPatient],
    *,
    false_copy_rate: float = 0.02,
    unrelated_NCDHW: Tensor | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
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
    scans = [patient.latents_SCDHW.to(device) for patient in public_patients]
    others = [space.of_samples(z) for z in scans]
    unrelated = [] if unrelated_NCDHW is None else [space.of_samples(unrelated_NCDHW.to(device))]
    nearest = np.zeros(len(scans))
    for i, z in enumerate(scans):
        elsewhere = torch.cat([*others[:i], *others[i + 1 :], *unrelated])
        nearest[i] = float(space.distances(space.of_patient(z), elsewhere).min())
        if progress is not None:
            progress("copy distance", i + 1, len(scans))
    nearest.sort()
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
        n_samples=0 if unrelated_NCDHW is None else int(unrelated_NCDHW.shape[0]),
    )
