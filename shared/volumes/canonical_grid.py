"""The canonical grid: one orientation, one spacing, one shape and one intensity range for every scan.

Axes of a canonical array [D, H, W] run along R, A and S (to the patient's right, front and head: nibabel's
"RAS+"). Image and mask are interpolated once, straight from the scanner's grid, by nibabel's ``processing``
on top of scipy: linear for images (after a Gaussian that keeps a coarser grid free of aliases), nearest
neighbour for masks.

The window is centred on the scan. Along an axis where it would cut the mask, it moves by the smallest
amount that keeps the mask whole; where the mask is larger than the window, the window is centred on the
mask, and what is cut off is counted: see :class:`CanonicalScan`. Voxels outside the scan are 0, the value of
the volume's lower percentile.
"""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from nibabel.spaces import vox2out_vox
from numpy.typing import NDArray
from scipy import ndimage

from shared.canonical import digest_json
from shared.study_plan import DataClause
from shared.volumes.intensity import PERCENTILES, normalise_intensity
from shared.volumes.nifti import Affine, Shape3, Spacing3, Volume, VolumeFileError


@dataclass(frozen=True, kw_only=True)
class CanonicalGrid:
    """What a scan looks like for the networks. Public; part of the plan.

    Attributes:
        shape: Voxels (D, H, W), along R, A, S.
        spacing_mm: Voxel size along the same axes.
        percentiles: Percentiles of a volume's own voxels that become 0 and 1.
    """

    shape: Shape3
    spacing_mm: Spacing3
    percentiles: tuple[float, float] = PERCENTILES

    @classmethod
    def from_clause(cls, clause: DataClause) -> CanonicalGrid:
        return cls(
            shape=clause.grid_shape, spacing_mm=clause.spacing_mm, percentiles=clause.intensity_percentiles
        )

    def digest(self) -> bytes:
        """32 bytes that stand for exactly this grid."""
        return digest_json(
            "lacuna/canonical-grid/v1",
            {
                "shape": list(self.shape),
                "spacing_mm": [float(step) for step in self.spacing_mm],
                "percentiles": [float(share) for share in self.percentiles],
            },
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CanonicalScan:
    """A scan on the canonical grid.

    Attributes:
        image_DHW: float32 in [0, 1].
        mask_DHW: uint8 labels.
        affine: [4, 4], canonical voxels to the scan's own world coordinates.
        label_voxels: Labelled canonical voxels of the whole scan, before the window cuts.
        lost_label_voxels: How many of them lie outside the window.
        lost_labels: Labels that the scan has and its canonical form has not (cut off, or too small for the
            grid's spacing).
    """

    image_DHW: NDArray[np.float32]
    mask_DHW: NDArray[np.uint8]
    affine: Affine
    label_voxels: int
    lost_label_voxels: int
    lost_labels: tuple[int, ...]

    @property
    def lost_share(self) -> float:
        """Share of the labelled voxels that the window cuts off; 0 for an empty mask."""
        return self.lost_label_voxels / self.label_voxels if self.label_voxels else 0.0


def to_canonical(image: Volume, mask: Volume, grid: CanonicalGrid) -> CanonicalScan:
    """Bring a scan and its mask to the grid.

    Args:
        image: Finite voxels.
        mask: Labels 0 to 255 on the same grid as the image.

    Raises:
        SiteError: the image is empty or not finite.
        VolumeFileError: image and mask have different shapes.
    """
    if image.shape != mask.shape:
        raise VolumeFileError(f"image {image.shape} and mask {mask.shape} have different shapes")
    labels_DHW = mask.voxels_DHW.astype(np.uint8)
    box_shape, box_affine = vox2out_vox((image.shape, image.affine), grid.spacing_mm)
    box_mask = _resample(labels_DHW, mask.affine, box_shape, box_affine, order=0).astype(np.uint8)
    start = _window_start(box_mask, grid.shape)
    affine = np.array(box_affine, dtype=np.float64)
    affine[:3, 3] += affine[:3, :3] @ start
    mask_DHW = _cut(box_mask, start, grid.shape)
    normalised_DHW = normalise_intensity(image.voxels_DHW, grid.percentiles)
    smooth_DHW = _band_limited(normalised_DHW, image.affine, grid.spacing_mm)
    image_DHW = _resample(smooth_DHW, image.affine, grid.shape, affine, order=1)
    in_box = int(np.count_nonzero(box_mask))
    labels = set(np.unique(labels_DHW).tolist()) - set(np.unique(mask_DHW).tolist()) - {0}
    return CanonicalScan(
        image_DHW=np.clip(image_DHW, 0.0, 1.0).astype(np.float32),
        mask_DHW=mask_DHW,
        affine=affine,
        label_voxels=in_box,
        lost_label_voxels=in_box - int(np.count_nonzero(mask_DHW)),
        lost_labels=tuple(sorted(int(label) for label in labels)),
    )


def _resample(
    voxels: NDArray[np.generic], affine: Affine, shape: Shape3, target: Affine, *, order: int
) -> NDArray[np.generic]:
    result = resample_from_to(nib.Nifti1Image(voxels, affine), (shape, target), order=order, cval=0.0)
    return np.asarray(result.dataobj)


def _band_limited(
    voxels_DHW: NDArray[np.float32], affine: Affine, spacing_mm: Spacing3
) -> NDArray[np.float32]:
    """Smooth along array axes that become coarser by a factor f, with sigma (f - 1)/2 source voxels."""
    axes = affine[:3, :3]
    source_mm = np.linalg.norm(axes, axis=0)
    # The target's spacing along a source axis: the grid's spacing in the world direction of that axis.
    target_mm = (np.abs(axes) / source_mm * np.asarray(spacing_mm)[:, None]).sum(axis=0) / (
        np.abs(axes) / source_mm
    ).sum(axis=0)
    sigma = np.maximum(0.0, (target_mm / source_mm - 1.0) / 2.0)
    if not (sigma > 1e-3).any():
        return voxels_DHW
    smooth: NDArray[np.float32] = ndimage.gaussian_filter(voxels_DHW, sigma, mode="nearest")
    return smooth


def _window_start(mask: NDArray[np.uint8], shape: Shape3) -> NDArray[np.int64]:
    """First voxel of the window along each axis; may be negative (padding)."""
    start = np.array([(side - n) // 2 for side, n in zip(mask.shape, shape, strict=True)], dtype=np.int64)
    for axis, n in enumerate(shape):
        others = tuple(other for other in range(3) if other != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        if occupied.size == 0:
            continue
        first, last = int(occupied[0]), int(occupied[-1])
        if last - first + 1 > n:
            start[axis] = (first + last + 1 - n) // 2
        else:
            start[axis] = min(max(int(start[axis]), last + 1 - n), first)
    return start


def _cut(mask: NDArray[np.uint8], start: NDArray[np.int64], shape: Shape3) -> NDArray[np.uint8]:
    window = np.zeros(shape, dtype=np.uint8)
    source = tuple(
        slice(max(0, int(s)), max(0, min(side, int(s) + n)))
        for s, n, side in zip(start, shape, mask.shape, strict=True)
    )
    target = tuple(
        slice(part.start - int(s), part.stop - int(s)) for part, s in zip(source, start, strict=True)
    )
    window[target] = mask[source]
    return window
