"""The members that generated samples come nearest to, side by side with those samples. Private.

Kept in the site's own audit record for the hospital's own people, who look at them (``lacuna site audit
--report``). What leaves of copies is the noised count alone (:mod:`privacy.audit.counts`).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy.audit.bounds import FloatArray
from privacy.audit.copies import Autoencoder, CopySpace
from privacy.audit.membership import ScansOfPatient
from shared.model.copy_embedding import MIRRORS

SHOWN = 8
"""Members whose nearest sample is kept as a picture."""

MAX_SIDE = 128
"""Longest side of a kept plane in pixels; larger volumes are thinned out."""

Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Neighbour:
    """One member and the sample nearest to it.

    Attributes:
        patient_key: Keyed hash of the patient.
        distance: In the public embedding, as in the audit.
        sample: Number of the sample among those that the audit checked, from 0.
        patient_picture, sample_picture: uint8 [H, W]: middle planes across the three axes in a row, as the
            public autoencoder gives both back; the patient's in the mirrored view that is nearest.
    """

    patient_key: str
    distance: float
    sample: int
    patient_picture: Picture
    sample_picture: Picture

    def __repr__(self) -> str:
        return "Neighbour(<private>)"

    def to_dict(self) -> dict[str, Any]:
        return {
            "patient_key": self.patient_key,
            "distance": self.distance,
            "sample": self.sample,
            "shape": list(self.patient_picture.shape),
            "patient_picture": base64.b64encode(self.patient_picture.tobytes()).decode(),
            "sample_picture": base64.b64encode(self.sample_picture.tobytes()).decode(),
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Neighbour:
        """Raises KeyError, TypeError or ValueError for anything else than :meth:`to_dict` gives."""
        height, width = (int(side) for side in value["shape"])
        pictures = {
            name: np.frombuffer(base64.b64decode(value[name], validate=True), np.uint8).reshape(height, width)
            for name in ("patient_picture", "sample_picture")
        }
        return cls(
            patient_key=str(value["patient_key"]),
            distance=float(value["distance"]),
            sample=int(value["sample"]),
            **pictures,
        )


@torch.no_grad()
def nearest_neighbours(
    space: CopySpace,
    autoencoder: Autoencoder,
    patients: Sequence[ScansOfPatient],
    distances: FloatArray,
    samples_NCDHW: Tensor,
    sample_embedding_NE: Tensor,
    *,
    device: str | torch.device = "cpu",
    shown: int = SHOWN,
) -> tuple[Neighbour, ...]:
    """The ``shown`` patients with the smallest distances, each with the scan and the sample that are nearest.

    Args:
        space: Where the distances were measured.
        autoencoder: Draws the pictures.
        distances: From :func:`privacy.audit.copies.nearest_distances`, float64 [P].
        samples_NCDHW: Samples that were checked, as latents; ``sample_embedding_NE`` is their embedding.
    """
    found = []
    for index in np.argsort(distances, kind="stable")[:shown]:
        if not math.isfinite(distances[index]):
            continue
        patient = patients[int(index)]
        apart = space.distances(space.of_patient(patient.latents_SCDHW.to(device)), sample_embedding_NE)
        row, sample = divmod(int(apart.argmin()), apart.shape[1])
        scan, view = divmod(row, space.views)
        both = torch.stack([patient.latents_SCDHW[scan].to(device), samples_NCDHW[sample].to(device)])
        images_B1DHW, _ = autoencoder.decode(both)
        own_DHW, sample_DHW = images_B1DHW[:, 0].to("cpu", torch.float32)
        pictures = [_planes(image.numpy()) for image in (own_DHW.flip(MIRRORS[view]), sample_DHW)]
        found.append(
            Neighbour(
                patient_key=patient.patient_key,
                distance=float(distances[index]),
                sample=sample,
                patient_picture=pictures[0],
                sample_picture=pictures[1],
            )
        )
    return tuple(found)


def _planes(image_DHW: NDArray[np.float32]) -> Picture:
    """Middle planes in a row, grey values 0 to 1 as 0 to 255, with a gap of two columns."""
    step = math.ceil(max(image_DHW.shape) / MAX_SIDE)
    thin = np.nan_to_num(image_DHW[::step, ::step, ::step])
    d, h, w = (side // 2 for side in thin.shape)
    planes = [np.rot90(plane) for plane in (thin[d], thin[:, h], thin[:, :, w])]
    height = max(plane.shape[0] for plane in planes)
    padded = [np.pad(plane, ((0, height - plane.shape[0]), (0, 2))) for plane in planes]
    picture: Picture = np.clip(np.concatenate(padded, axis=1)[:, :-2] * 255, 0, 255).astype(np.uint8)
    return picture
