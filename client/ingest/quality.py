"""Checks of one scan's voxels, and of scans against one another, before anything is stored."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.ingest.scan import LoadedVolume, Problem, ProblemKind, ScanEntry, UnusableScanError
from shared.volumes.nifti import Volume

AFFINE_TOLERANCE_MM = 1e-2
"""How far a corner of the mask may lie from the same corner of the image, in millimetres."""


Show = Callable[[str, Volume, Volume | None], None]
"""Called as (name of the scan, image, mask or None), to draw it for the import's report."""

Refuse = Callable[[ProblemKind, str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckedScan:
    """A scan without problems.

    Attributes:
        image: Finite and not constant.
        mask: Integer labels 0 to n_labels, not empty, same grid as the image.
        content_sha256: 32 bytes, of the image's shape and voxels (as float32, scaled): the same for the same
            image under another name, compression, data type or header.
        mask_sha256: The same for the mask.
        repairs: What was set right while reading, in words.
    """

    image: Volume
    mask: Volume
    content_sha256: bytes
    mask_sha256: bytes
    repairs: tuple[str, ...] = ()


def check_scan(entry: ScanEntry, *, n_labels: int, show: Show | None = None) -> CheckedScan | list[Problem]:
    """Open a scan and check it.

    Args:
        entry: What to open.
        n_labels: Labels of the plan, without background.
        show: Given the image of a scan that is refused, where it can be read at all.

    Returns:
        The scan, or all that is wrong with it (at least one problem).
    """
    problems: list[Problem] = []

    def refuse(kind: ProblemKind, detail: str) -> None:
        problems.append(Problem(file=entry.name, kind=kind, detail=detail))

    image, mask = _loaded(entry, refuse)
    if image is None or mask is None:
        if image is not None and show is not None:
            show(entry.name, image.volume, None)
        return problems
    _check_together(image.volume, mask.volume, n_labels, refuse)
    if problems:
        if show is not None:
            show(entry.name, image.volume, None)
        return problems
    return CheckedScan(
        image=image.volume,
        mask=mask.volume,
        content_sha256=voxel_sha256(image.volume.voxels_DHW),
        mask_sha256=voxel_sha256(mask.volume.voxels_DHW),
        repairs=(*image.repairs, *mask.repairs),
    )


def _loaded(entry: ScanEntry, refuse: Refuse) -> tuple[LoadedVolume | None, LoadedVolume | None]:
    """Image and mask; what cannot be read is refused."""
    try:
        image = entry.image.read()
    except UnusableScanError as error:
        refuse(error.kind, error.detail)
        if entry.mask.missing is not None:
            refuse(ProblemKind.MISSING_FILE, f"mask {entry.mask.missing}")
        return None, None
    try:
        return image, entry.mask.read(image.volume)
    except UnusableScanError as error:
        refuse(error.kind, f"mask {error.detail}")
        return image, None


def _check_together(image: Volume, mask: Volume, n_labels: int, refuse: Refuse) -> None:
    if image.shape != mask.shape:
        refuse(ProblemKind.SHAPE_MISMATCH, f"{image.shape} and {mask.shape}")
    elif (distance := _corner_distance_mm(image, mask)) > AFFINE_TOLERANCE_MM:
        refuse(ProblemKind.AFFINE_MISMATCH, f"corners up to {distance:.3g} mm apart")
    if image.voxels_DHW.dtype.kind not in "biuf":
        refuse(ProblemKind.UNREADABLE_FILE, f"voxels of type {image.voxels_DHW.dtype}")
    elif not np.isfinite(image.voxels_DHW).all():
        refuse(ProblemKind.NOT_FINITE, "")
    elif image.voxels_DHW.min() == image.voxels_DHW.max():
        refuse(ProblemKind.CONSTANT_IMAGE, "")
    _check_labels(mask.voxels_DHW, n_labels, refuse)


def _check_labels(labels_DHW: NDArray[np.generic], n_labels: int, refuse: Refuse) -> None:
    if labels_DHW.dtype.kind not in "biuf" or not np.isfinite(labels_DHW).all():
        refuse(ProblemKind.NOT_FINITE, "mask")
        return
    values = np.unique(labels_DHW)
    unknown = [value for value in values.tolist() if value not in range(n_labels + 1)]
    if unknown:
        shown = ", ".join(f"{value:g}" for value in unknown[:5])
        refuse(ProblemKind.UNKNOWN_LABEL, f"{shown}; the plan has labels 0 to {n_labels}")
    elif not values.any():
        refuse(ProblemKind.EMPTY_MASK, "")


def find_duplicates(scans: Iterable[tuple[ScanEntry, bytes, bytes]]) -> dict[str, Problem]:
    """Scans with the same voxels, by entry name.

    Where copies agree on patient, condition and mask, the first stays and the others are named. Where they
    do not, all are: one person's scan under two patients would break the unit of privacy.

    Args:
        scans: (entry, content_sha256, mask_sha256) in the order of the source.
    """
    groups: dict[bytes, list[tuple[ScanEntry, bytes]]] = defaultdict(list)
    for entry, content, mask in scans:
        groups[content].append((entry, mask))
    problems: dict[str, Problem] = {}
    for group in groups.values():
        agree = len({(entry.patient_id, entry.condition, mask) for entry, mask in group}) == 1
        for position, (entry, _) in enumerate(group):
            if len(group) == 1 or (agree and position == 0):
                continue
            other = group[0 if position else 1][0]
            detail = f"{other.name}" + ("" if agree else ", with another patient, condition or mask")
            problems[entry.name] = Problem(file=entry.name, kind=ProblemKind.DUPLICATE_CONTENT, detail=detail)
    return problems


def voxel_sha256(voxels_DHW: NDArray[np.generic]) -> bytes:
    """SHA-256 over shape and float32 voxels."""
    shape = np.asarray(voxels_DHW.shape, dtype="<i8").tobytes()
    return hashlib.sha256(shape + np.ascontiguousarray(voxels_DHW, dtype="<f4").tobytes()).digest()


def _corner_distance_mm(image: Volume, mask: Volume) -> float:
    corners = np.array([[x, y, z, 1.0] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float64)
    corners[:, :3] *= np.asarray(image.shape) - 1
    return float(np.linalg.norm(corners @ (image.affine - mask.affine).T, axis=1).max())
