"""Simulated 3D scans with masks: public, offline, cheap, and honest about being simulated.

A scan shows a head-like outline with a bright shell, one deformed organ with texture, and one lesion
inside the organ. Two conditions are simulated. A ``rare`` lesion is larger, and somewhat brighter, than a
``common`` one; the distributions overlap, as they do in the clinic. Some patients have two or three scans:
the same anatomy in another pose, with other noise, gain and bias field.

Everything here is a function of a public seed. Nothing of this module may be used where randomness has to
be secret.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shared.errors import UsageError

FloatVolume = NDArray[np.float32]
MaskVolume = NDArray[np.uint8]

BACKGROUND, ORGAN, LESION = 0, 1, 2
LABELS: tuple[str, ...] = ("organ", "lesion")
"""Names of the mask labels 1 and 2; 0 is background."""

COMMON, RARE = "common", "rare"
CONDITIONS: tuple[str, ...] = (COMMON, RARE)

MICRO_GRID_SHAPE: tuple[int, int, int] = (24, 24, 24)
MICRO_SPACING_MM: tuple[float, float, float] = (4.0, 4.0, 4.0)

_REFERENCE_FIELD_MM = 96.0
_SCANS_PER_PATIENT = (0.55, 0.30, 0.15)


@dataclass(frozen=True, kw_only=True)
class LesionLaw:
    """Distribution of one condition's lesions, for a field of view of 96 mm.

    Attributes:
        median_radius_mm: Median of the volume-equivalent radius (log-normal).
        log_radius_std: Standard deviation of its logarithm.
        contrast_mean: Mean intensity of the lesion above the organ's (image range [0, 1]).
        contrast_std: Its standard deviation.
    """

    median_radius_mm: float
    log_radius_std: float
    contrast_mean: float
    contrast_std: float


LESION_LAWS: Mapping[str, LesionLaw] = {
    COMMON: LesionLaw(median_radius_mm=9.0, log_radius_std=0.20, contrast_mean=0.24, contrast_std=0.05),
    RARE: LesionLaw(median_radius_mm=14.0, log_radius_std=0.16, contrast_mean=0.30, contrast_std=0.05),
}


@dataclass(frozen=True, kw_only=True)
class PhantomScan:
    """One simulated scan.

    Attributes:
        patient_id: ``P00000``; scans of one patient share anatomy and condition.
        scan_id: ``P00000-1``; unique in its cohort.
        condition: One of :data:`CONDITIONS`.
        image: float32 [D, H, W], arbitrary scanner units (roughly 0 to 1.3), as a scanner would give it.
        mask: uint8 [D, H, W], 0 is background, 1 organ, 2 lesion.
    """

    patient_id: str
    scan_id: str
    condition: str
    image: FloatVolume
    mask: MaskVolume


@dataclass(frozen=True, kw_only=True)
class _Ellipsoid:
    """An ellipsoid with a smooth bumpy surface; lengths in millimetres."""

    centre_mm: NDArray[np.float64]
    semi_axes_mm: NDArray[np.float64]
    bumps: NDArray[np.float64]
    """[n, 5]: direction (3), phase, amplitude (relative to the radius)."""

    def level(self, points_3DHW: NDArray[np.float64]) -> NDArray[np.float64]:
        """Relative radius at each point: below 1 inside, 1 on the surface. Shape [D, H, W]."""
        offset = (points_3DHW - self.centre_mm[:, None, None, None]) / self.semi_axes_mm[:, None, None, None]
        radius = np.sqrt((offset**2).sum(axis=0)) + 1e-6
        unit = offset / radius
        surface = np.ones_like(radius)
        for bump in self.bumps:
            surface += bump[4] * np.sin(3.0 * np.tensordot(bump[:3], unit, axes=1) + bump[3])
        level: NDArray[np.float64] = radius / surface
        return level


@dataclass(frozen=True, kw_only=True)
class _Anatomy:
    """What the scans of one patient have in common."""

    head: _Ellipsoid
    organ: _Ellipsoid
    lesion: _Ellipsoid
    organ_intensity: float
    lesion_contrast: float
    texture: NDArray[np.float64]


def simulate_cohort(
    *,
    n_patients: int,
    conditions_fractions: Mapping[str, float],
    seed: int,
    grid_shape: tuple[int, int, int] = MICRO_GRID_SHAPE,
    spacing_mm: tuple[float, float, float] = MICRO_SPACING_MM,
) -> list[PhantomScan]:
    """Simulate a cohort, one to three scans a patient; the same arguments give the same bytes.

    Args:
        n_patients: Number of patients.
        conditions_fractions: Share of patients for each condition; the shares sum to 1. Each patient's
            condition is drawn with these probabilities.
        seed: Public seed. Patient i depends on (seed, i) alone, so a larger cohort begins with a smaller one
            (given the same fractions).
        grid_shape: Voxels (D, H, W), each at least 16.
        spacing_mm: Voxel size (D, H, W) in millimetres. Anatomy scales with the smallest field of view.

    Raises:
        UsageError: an unknown condition, fractions that do not sum to 1, or a grid that is too small.
    """
    unknown = sorted(set(conditions_fractions) - set(CONDITIONS))
    if unknown:
        raise UsageError(f"no such simulated condition: {', '.join(unknown)}", remedy=f"use {CONDITIONS}")
    names = [name for name in CONDITIONS if name in conditions_fractions]
    shares = np.array([conditions_fractions[name] for name in names], dtype=np.float64)
    if n_patients < 0 or not names or (shares < 0).any() or abs(shares.sum() - 1.0) > 1e-6:
        raise UsageError(f"condition fractions {dict(conditions_fractions)} must be a distribution (sum 1)")
    if min(grid_shape) < 16 or min(spacing_mm) <= 0:
        raise UsageError(f"grid {grid_shape} with spacing {spacing_mm}: at least 16 voxels of positive size")
    scans: list[PhantomScan] = []
    for index in range(n_patients):
        rng = np.random.default_rng([seed, index])
        condition = names[int(rng.choice(len(names), p=shares / shares.sum()))]
        anatomy = _draw_anatomy(rng, LESION_LAWS[condition], grid_shape, spacing_mm)
        for number in range(1 + int(rng.choice(3, p=_SCANS_PER_PATIENT))):
            image, mask = _acquire(rng, anatomy, grid_shape, spacing_mm)
            patient_id = f"P{index:05d}"
            scans.append(
                PhantomScan(
                    patient_id=patient_id,
                    scan_id=f"{patient_id}-{number + 1}",
                    condition=condition,
                    image=image,
                    mask=mask,
                )
            )
    return scans


def lesion_volume_mm3(mask: MaskVolume, spacing_mm: tuple[float, float, float]) -> float:
    """Volume of the label lesion in cubic millimetres; 0 where there is none."""
    return float((mask == LESION).sum()) * math.prod(spacing_mm)


def lesion_contrast(image: FloatVolume, mask: MaskVolume) -> float:
    """Mean intensity of the lesion minus that of the organ; NaN where either label is absent."""
    if not (mask == LESION).any() or not (mask == ORGAN).any():
        return float("nan")
    return float(image[mask == LESION].mean() - image[mask == ORGAN].mean())


def _bumps(rng: np.random.Generator, n: int, amplitude: float) -> NDArray[np.float64]:
    direction = rng.normal(size=(n, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    phase = rng.uniform(0.0, 2.0 * math.pi, size=(n, 1))
    return np.concatenate([direction, phase, amplitude * rng.normal(size=(n, 1))], axis=1)


def _draw_anatomy(
    rng: np.random.Generator,
    law: LesionLaw,
    grid_shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
) -> _Anatomy:
    scale = min(n * s for n, s in zip(grid_shape, spacing_mm, strict=True)) / _REFERENCE_FIELD_MM
    head_axes = np.array([42.0, 44.0, 41.0]) * rng.normal(1.0, 0.03, size=3) * scale
    organ_axes = np.array([29.0, 32.0, 27.0]) * rng.normal(1.0, 0.05, size=3) * scale
    organ_centre = rng.normal(0.0, 2.0, size=3) * scale
    radius = scale * law.median_radius_mm * math.exp(law.log_radius_std * rng.normal())
    aspect = np.exp(0.12 * rng.normal(size=3))
    lesion_axes = radius * aspect / np.prod(aspect) ** (1.0 / 3.0)
    # The lesion's centre is uniform in the part of the organ that leaves room for most of it.
    direction = rng.normal(size=3)
    direction *= rng.uniform() ** (1.0 / 3.0) / np.linalg.norm(direction)
    room = np.maximum(0.9 * organ_axes - lesion_axes, 0.12 * organ_axes)
    texture = ndimage.gaussian_filter(rng.normal(size=grid_shape), 0.9, mode="wrap")
    return _Anatomy(
        head=_Ellipsoid(centre_mm=np.zeros(3), semi_axes_mm=head_axes, bumps=_bumps(rng, 2, 0.015)),
        organ=_Ellipsoid(centre_mm=organ_centre, semi_axes_mm=organ_axes, bumps=_bumps(rng, 4, 0.035)),
        lesion=_Ellipsoid(
            centre_mm=organ_centre + room * direction, semi_axes_mm=lesion_axes, bumps=_bumps(rng, 4, 0.06)
        ),
        organ_intensity=float(rng.normal(0.50, 0.02)),
        lesion_contrast=float(max(0.1, rng.normal(law.contrast_mean, law.contrast_std))),
        texture=texture / texture.std(),
    )


def _acquire(
    rng: np.random.Generator,
    anatomy: _Anatomy,
    grid_shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
) -> tuple[FloatVolume, MaskVolume]:
    """One scan: a rigid pose, intensities with partial volumes, bias field, gain and Rician noise."""
    points = _posed_points(rng, grid_shape, spacing_mm)
    head, organ, lesion = (part.level(points) for part in (anatomy.head, anatomy.organ, anatomy.lesion))
    in_organ = organ < 1.0
    in_lesion = (lesion < 1.0) & in_organ
    if not in_lesion.any():
        in_lesion.flat[np.argmin(np.where(in_organ, lesion, np.inf))] = True
    mask = np.zeros(grid_shape, dtype=np.uint8)
    mask[in_organ] = ORGAN
    mask[in_lesion] = LESION
    tissue = _partial_volume(head - 0.82, anatomy.head, spacing_mm)
    image = 0.62 * _partial_volume(head - 1.0, anatomy.head, spacing_mm) * (1.0 - tissue)
    image += tissue * (0.28 + 0.035 * anatomy.texture)
    organ_part = _partial_volume(organ - 1.0, anatomy.organ, spacing_mm)
    image += organ_part * (anatomy.organ_intensity - 0.28)
    image += np.minimum(_partial_volume(lesion - 1.0, anatomy.lesion, spacing_mm), organ_part) * (
        anatomy.lesion_contrast
    )
    field = ndimage.zoom(rng.normal(0.0, 0.04, size=(3, 3, 3)), [n / 3 for n in grid_shape], order=2)
    image *= rng.uniform(0.9, 1.1) * (1.0 + field)
    real, imaginary = rng.normal(0.0, 0.02, size=(2, *grid_shape))
    return np.sqrt((image + real) ** 2 + imaginary**2).astype(np.float32), mask


def _partial_volume(
    depth: NDArray[np.float64], part: _Ellipsoid, spacing_mm: tuple[float, float, float]
) -> NDArray[np.float64]:
    """Share of each voxel inside a surface, from the relative distance to it (negative inside)."""
    distance_mm = depth * float(part.semi_axes_mm.mean())
    share: NDArray[np.float64] = np.clip(0.5 - distance_mm / (1.2 * min(spacing_mm)), 0.0, 1.0)
    return share


def _posed_points(
    rng: np.random.Generator, grid_shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> NDArray[np.float64]:
    """Voxel centres in the patient's frame, [3, D, H, W] in mm: up to a few degrees and millimetres off."""
    axes = [(np.arange(n) - (n - 1) / 2.0) * s for n, s in zip(grid_shape, spacing_mm, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    skew = np.zeros((3, 3))
    a, b, c = rng.normal(0.0, math.radians(4.0), size=3)
    skew[0, 1], skew[0, 2], skew[1, 2] = -c, b, -a
    q, r = np.linalg.qr(np.eye(3) + skew - skew.T)
    rotation = q * np.sign(np.diag(r))
    shift = rng.normal(0.0, 1.0, size=3) * min(spacing_mm) * 0.4
    return np.tensordot(rotation, grid, axes=1) + shift[:, None, None, None]
