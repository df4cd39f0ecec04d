"""Is a synthetic scan plausible: figures of image and mask, against ranges learned from public scans.

Some demands need no learning: voxels are finite and in [0, 1], the image is not constant, every structure
that public scans always show is there (one that is missing is a failure, never a pass). Everything else is a
figure of the volume that has to lie in the range of the public scans, widened by :data:`MARGIN` of its width
on both sides: brightness and texture of the image; volume, place, connectedness and intensity of each label,
contrast at its surface; and where labels lie to one another, which tells mirrored anatomy.

Where a study has a public segmenter (:mod:`shared.model.segmenter`), the mask must also agree with what that
network, which never saw the generator, finds in the image.

Public scans may lack a condition whose structures are larger than any seen, so volumes are allowed a further
factor of :data:`VOLUME_FACTOR`. Ranges are functions of public scans alone; nothing here may see a member's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy import ndimage

from shared.canonical import parse_json
from shared.errors import CoordinatorError, MalformedMessageError, UsageError
from shared.volumes.nifti import Spacing3

FORMAT = "lacuna/plausibility/v1"
MARGIN = 0.75
VOLUME_FACTOR = 4.0
AGREEMENT_FACTOR = 2.5
MIN_DISAGREEMENT = 0.05
MIN_SCANS = 8
MAX_FILE_BYTES = 1024 * 1024
_ALLOWANCE = {"volume": math.log(VOLUME_FACTOR), "compactness": 0.01, "piece": 0.02, "contrast": 0.01}
"""Beyond the margin, by the last word of the figure: a condition that no public scan shows changes sizes."""
_IMAGE_ALLOWANCE = {
    "image percentile 2": 0.02,
    "image percentile 98": 0.1,
    "image texture": 0.01,
    "mask border share": 0.02,
}
"""Scans are normalised, so that their percentiles hardly differ; a decoder's output is somewhat smoother."""
_EDGE_MM = 1.5
_CONNECTIVITY = ndimage.generate_binary_structure(3, 3)

ImageVolume = NDArray[np.float32]
MaskVolume = NDArray[np.uint8]


class Agreement(BaseModel):
    """How far a public segmenter must agree with a scan's mask. Public.

    Attributes:
        segmenter_sha256: File of the segmenter's weights.
        scans: Scans of held-out public patients, each as it is and as the autoencoder shows it.
        low: Least Dice overlap of each label.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    segmenter_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scans: int = Field(ge=1)
    low: dict[str, Annotated[float, Field(ge=0, le=1)]]


class PlausibilityRanges(BaseModel):
    """What a synthetic scan of a study must look like. Public.

    Attributes:
        labels: Names of mask values 1, 2, ...
        required: Labels that every scan shows.
        scans: How many public scans the ranges were learned from.
        low, high: Ends of the range of each figure; figures are named as in :func:`figures`.
        agreement: Of mask and segmenter; None where the study has no segmenter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: str = Field(pattern=f"^{FORMAT}$", default=FORMAT)
    labels: tuple[str, ...] = Field(min_length=1, max_length=64)
    required: tuple[str, ...]
    scans: int = Field(ge=1)
    low: dict[str, float]
    high: dict[str, float]
    agreement: Agreement | None = None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why a scan is refused: which figure, its value, and the range that it should lie in."""

    figure: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.figure} is {self.value:.4g}, plausible is {self.low:.4g} to {self.high:.4g}"


def figures(
    image_DHW: ImageVolume, mask_DHW: MaskVolume, *, labels: Sequence[str], spacing_mm: Spacing3
) -> dict[str, float]:
    """Figures of one scan, by name; those of an absent label are left out, all but ``NAME present`` (0).

    Args:
        image_DHW: In [0, 1], axes along R, A, S.
        mask_DHW: Labels 0 to ``len(labels)``.
    """
    voxel_mm3, step = math.prod(spacing_mm), np.asarray(spacing_mm)
    smooth = ndimage.uniform_filter(image_DHW, 3)
    found = {
        "image mean": float(image_DHW.mean()),
        "image deviation": float(image_DHW.std()),
        "image texture": float((image_DHW - smooth).std()),
        "image percentile 2": float(np.percentile(image_DHW, 2)),
        "image percentile 98": float(np.percentile(image_DHW, 98)),
        "mask border share": _border_share(mask_DHW),
    }
    extent = np.asarray(image_DHW.shape) * step
    centres: dict[str, NDArray[np.float64]] = {}
    for value, name in enumerate(labels, start=1):
        inside = mask_DHW == value
        found[f"{name} present"] = float(inside.any())
        if not inside.any():
            continue
        centres[name] = np.argwhere(inside).mean(axis=0) * step / extent
        found |= {
            f"{name} {figure}": number for figure, number in _label_figures(image_DHW, inside, step).items()
        }
        found[f"{name} log volume"] = math.log(float(inside.sum()) * voxel_mm3)
        found |= {f"{name} place {axis}": float(x) for axis, x in zip("RAS", centres[name], strict=True)}
    names = list(centres)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            offset = centres[other] - centres[one]
            found |= {f"{one} to {other} {axis}": float(x) for axis, x in zip("RAS", offset, strict=True)}
    return found


def learn_ranges(
    scans: Iterable[tuple[ImageVolume, MaskVolume]], *, labels: Sequence[str], spacing_mm: Spacing3
) -> PlausibilityRanges:
    """Ranges from PUBLIC scans on the canonical grid.

    Raises:
        CoordinatorError: fewer than :data:`MIN_SCANS` scans.
    """
    table = [figures(image, mask, labels=labels, spacing_mm=spacing_mm) for image, mask in scans]
    if len(table) < MIN_SCANS:
        raise CoordinatorError(
            f"{len(table)} public scans are too few to say what is plausible", remedy=f"{MIN_SCANS} or more"
        )
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for name in sorted({name for row in table for name in row}):
        if name.endswith(" present"):
            continue
        values = [row[name] for row in table if name in row]
        a, b = min(values), max(values)
        wider = (
            MARGIN * (b - a) + _ALLOWANCE.get(name.rsplit(" ", 1)[-1], 0.0) + _IMAGE_ALLOWANCE.get(name, 0.0)
        )
        low[name], high[name] = a - wider, b + wider
    return PlausibilityRanges(
        labels=tuple(labels),
        required=tuple(name for name in labels if all(row[f"{name} present"] for row in table)),
        scans=len(table),
        low={name: round(value, 6) for name, value in low.items()},
        high={name: round(value, 6) for name, value in high.items()},
    )


def label_dice(one_DHW: NDArray[Any], other_DHW: NDArray[Any], labels: Sequence[str]) -> dict[str, float]:
    """Dice overlap of two masks by label, (2 |A and B| + 1) / (|A| + |B| + 1): 1 where both lack a label."""
    found = {}
    for value, name in enumerate(labels, start=1):
        a, b = one_DHW == value, other_DHW == value
        found[name] = (2 * int((a & b).sum()) + 1) / (int(a.sum()) + int(b.sum()) + 1)
    return found


def learn_agreement(
    masks: Iterable[tuple[MaskVolume, MaskVolume]], *, labels: Sequence[str], segmenter_sha256: str
) -> Agreement:
    """Least overlap of mask and segmentation from PUBLIC scans whose patients the segmenter never saw.

    The least of few scans is not yet the least of many, and only its middle is well known. So a mask may
    disagree (1 - Dice) by :data:`AGREEMENT_FACTOR` times what the median scan does, which is taken as at
    least :data:`MIN_DISAGREEMENT`, and by as much as the worst scan.

    Args:
        masks: (mask, what the segmenter finds in its image) of each scan.
    """
    table = [label_dice(mask, found, labels) for mask, found in masks]
    low = {}
    for name in labels:
        values = [row[name] for row in table]
        usual = max(MIN_DISAGREEMENT, 1.0 - statistics.median(values))
        low[name] = round(max(0.0, min([*values, 1.0 - AGREEMENT_FACTOR * usual])), 6)
    return Agreement(segmenter_sha256=segmenter_sha256, scans=len(table), low=low)


def disagreements(
    mask_DHW: NDArray[Any], segmented_DHW: NDArray[Any], labels: Sequence[str], agreement: Agreement
) -> list[Fault]:
    """Labels whose mask is not what the segmenter finds in the image."""
    return [
        Fault(figure=f"{name} agreement", value=value, low=agreement.low.get(name, 0.0), high=1.0)
        for name, value in label_dice(mask_DHW, segmented_DHW, labels).items()
        if value < agreement.low.get(name, 0.0)
    ]


def faults(
    image_DHW: NDArray[Any],
    mask_DHW: NDArray[Any],
    ranges: PlausibilityRanges,
    *,
    spacing_mm: Spacing3,
    segmented_DHW: NDArray[Any] | None = None,
) -> list[Fault]:
    """Everything that is implausible about a scan; empty if nothing is.

    Args:
        segmented_DHW: What the segmenter that the ranges name finds in the image.

    Raises:
        UsageError: the ranges ask for agreement with a segmenter, and there is no segmentation.
    """
    if ranges.agreement is not None and segmented_DHW is None:
        raise UsageError("these ranges ask for agreement with a segmenter, which is not at hand")
    if image_DHW.shape != mask_DHW.shape or image_DHW.ndim != 3:
        return [Fault(figure="image and mask of one 3D shape", value=0, low=1, high=1)]
    finite = float(np.isfinite(image_DHW).mean())
    if finite < 1.0:
        return [Fault(figure="share of finite voxels", value=finite, low=1, high=1)]
    lowest, highest = float(image_DHW.min()), float(image_DHW.max())
    if lowest < 0.0 or highest > 1.0:
        return [Fault(figure="intensity", value=lowest if lowest < 0.0 else highest, low=0, high=1)]
    if highest == lowest:
        return [Fault(figure="spread of intensities", value=0, low=1e-6, high=1)]
    if int(mask_DHW.max()) > len(ranges.labels):
        return [Fault(figure="largest label", value=float(mask_DHW.max()), low=0, high=len(ranges.labels))]
    found = figures(
        image_DHW.astype(np.float32), mask_DHW.astype(np.uint8), labels=ranges.labels, spacing_mm=spacing_mm
    )
    wrong = [
        Fault(figure=f"{name} present", value=0, low=1, high=1)
        for name in ranges.required
        if not found[f"{name} present"]
    ]
    for name, value in found.items():
        if name in ranges.low and not ranges.low[name] <= value <= ranges.high[name]:
            wrong.append(Fault(figure=name, value=value, low=ranges.low[name], high=ranges.high[name]))
    if ranges.agreement is not None and segmented_DHW is not None:
        wrong += disagreements(mask_DHW, segmented_DHW, ranges.labels, ranges.agreement)
    return wrong


def write_ranges(path: Path, ranges: PlausibilityRanges) -> None:
    """Write ranges as readable JSON."""
    path.write_text(ranges.model_dump_json(indent=1, exclude_none=True) + "\n", encoding="utf-8")


def read_ranges(path: Path) -> PlausibilityRanges:
    """Read ranges.

    Raises:
        MalformedMessageError: the file is not what :func:`write_ranges` writes.
    """
    try:
        data = parse_json(path.read_bytes(), what=str(path), max_bytes=MAX_FILE_BYTES)
        ranges = PlausibilityRanges.model_validate(data)
    except OSError as error:
        raise MalformedMessageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise MalformedMessageError(
            f"{path}: not ranges of plausibility ({error.error_count()} faults)"
        ) from error
    if set(ranges.low) != set(ranges.high):
        raise MalformedMessageError(f"{path}: a range has one end alone")
    if ranges.agreement is not None and set(ranges.agreement.low) != set(ranges.labels):
        raise MalformedMessageError(f"{path}: agreement is about other labels")
    return ranges


def _label_figures(
    image_DHW: ImageVolume, inside: NDArray[np.bool_], step: NDArray[np.float64]
) -> dict[str, float]:
    pieces, count = ndimage.label(inside, structure=_CONNECTIVITY)
    sizes = np.bincount(pieces.ravel())[1:]
    inner, where = image_DHW[inside], np.argwhere(inside)
    extent_mm = float(np.linalg.norm(np.asarray(inside.shape) * step))
    reach = np.maximum(1, np.rint(_EDGE_MM / step)).astype(int)
    box = np.ones(2 * reach + 1, dtype=bool)
    shell = ndimage.binary_dilation(inside, structure=box) & ~inside
    outer = image_DHW[shell] if shell.any() else inner
    volume, surface = float(inside.sum()), float(_faces(inside))
    return {
        "reach": float(np.linalg.norm((where - where.mean(axis=0)) * step, axis=1).max() / extent_mm),
        "largest piece": float(sizes.max() / sizes.sum()) if count else 0.0,
        "compactness": volume ** (2.0 / 3.0) / surface if surface else 0.0,
        "mean": float(inner.mean()),
        "deviation": float(inner.std()),
        "contrast": float(inner.mean() - outer.mean()),
    }


def _faces(inside: NDArray[np.bool_]) -> int:
    """Voxel faces of the surface."""
    padded = np.pad(inside, 1)
    return sum(int((np.diff(padded, axis=axis)).sum()) for axis in range(3))


def _border_share(mask_DHW: MaskVolume) -> float:
    """Share of the grid's outermost voxels that are labelled."""
    core = np.zeros(mask_DHW.shape, dtype=bool)
    core[1:-1, 1:-1, 1:-1] = True
    return float((mask_DHW[~core] > 0).mean())
