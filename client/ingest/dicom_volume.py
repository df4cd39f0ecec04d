"""A DICOM series as one volume: slices by position, values by the rescale of each, faults by name.

Position and orientation come from Image Position (Patient) and Image Orientation (Patient) of every slice or
frame (PS3.3, C.7.6.2 and C.7.6.16), never from Slice Thickness, Instance Number or the order of files. What
would have to be invented, as a missing slice, is refused. What is only written in an unusual way is set right
and told: slices out of order, a slice twice, inverted grey values, a tilted gantry. The tilt stays in the
affine, which then is sheared, and the one interpolation to the canonical grid undoes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.ingest.dicom_frames import Frame, is_inverted, read_frames, rescaled_values, stored_pixels
from client.ingest.pixel_decoder import stored_values
from client.ingest.scan import LoadedVolume, ProblemKind, UnusableScanError
from shared.volumes.nifti import MAX_VOXELS, Affine, Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

COSINE_TOLERANCE = 1e-3
"""How far direction cosines of one series may differ."""

SPACING_TOLERANCE = 0.01
"""How far the distance of two neighbouring slices may be from the series' own, as a share of it."""

POSITION_TOLERANCE_MM = 0.01
"""Slices nearer than this are at one position; written positions are rounded by about this much."""

TILT_TOLERANCE_DEG = 0.05

_VOLUME_TAGS = ("EchoTime", "TemporalPositionIdentifier", "DiffusionBValue", "AcquisitionNumber", "ImageType",
                "TriggerTime", "ContentTime")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DicomSeries:
    """The image of a scan, in the files of one series.

    Attributes:
        series_uid: Series Instance UID.
        paths: The series' files.
    """

    series_uid: str
    paths: tuple[Path, ...]

    @property
    def identity(self) -> str:
        return self.series_uid

    @property
    def missing(self) -> str | None:
        return next((path.name for path in self.paths if not path.is_file()), None)

    def read(self, like: Volume | None = None) -> LoadedVolume:
        """The volume [slice, row, column], float32, after each slice's rescale.

        Raises:
            UnusableScanError: the series is no volume, or a file of it cannot be read or decoded.
        """
        frames = [frame for path in self.paths for frame in read_frames(path)]
        repairs: list[str] = []
        _check_alike(frames, repairs)
        ordered = _without_duplicates(_sorted_by_position(frames), repairs)
        _check_numbers(ordered, repairs)
        affine = _stack_affine(ordered, repairs)
        rows, columns = ordered[0].shape
        if len(ordered) * rows * columns > MAX_VOXELS:
            raise UnusableScanError(ProblemKind.UNREADABLE_FILE, f"more than {MAX_VOXELS} voxels")
        voxels_DHW = np.empty((len(ordered), rows, columns), dtype=np.float32)
        _fill(voxels_DHW, ordered)
        repairs.extend(_inversion(ordered[0].header))
        return LoadedVolume(
            volume=Volume(voxels_DHW=voxels_DHW, affine=LPS_TO_RAS @ affine), repairs=tuple(repairs)
        )


def _check_alike(frames: Sequence[Frame], repairs: list[str]) -> None:
    """All slices have one size, one spacing and one orientation."""
    first = frames[0]
    sizes = Counter(frame.shape for frame in frames)
    if len(sizes) > 1:
        found = ", ".join(f"{count} of {rows} x {columns}" for (rows, columns), count in sizes.items())
        raise UnusableScanError(ProblemKind.MIXED_SERIES, f"slices of several sizes: {found}")
    other = [f for f in frames if np.abs(f.orientation - first.orientation).max() > COSINE_TOLERANCE]
    if other:
        detail = f"several orientations: {first.path.name} and {other[0].path.name}"
        raise UnusableScanError(ProblemKind.MIXED_SERIES, detail)
    if any(not np.allclose(frame.spacing, first.spacing, rtol=1e-3) for frame in frames):
        raise UnusableScanError(ProblemKind.MIXED_SERIES, "several pixel spacings")
    if len({str(frame.header.PhotometricInterpretation) for frame in frames}) > 1:
        raise UnusableScanError(ProblemKind.MIXED_SERIES, "MONOCHROME1 and MONOCHROME2")
    if len({str(frame.header.get("FrameOfReferenceUID", "")) for frame in frames}) > 1:
        repairs.append("slices name several frames of reference; positions were taken as of one")


def _sorted_by_position(frames: Sequence[Frame]) -> list[Frame]:
    normal = _normal(frames[0])
    return sorted(frames, key=lambda frame: (float(frame.position @ normal), frame.number or 0))


def _check_numbers(ordered: Sequence[Frame], repairs: list[str]) -> None:
    numbers = [frame.number for frame in ordered if frame.number is not None]
    steps = np.diff(np.array(numbers))
    if len(numbers) == len(ordered) and not ((steps > 0).all() or (steps < 0).all()):
        repairs.append("slices were numbered out of order; sorted by position")


def _without_duplicates(ordered: Sequence[Frame], repairs: list[str]) -> list[Frame]:
    """Leave out slices that stand twice, pixel for pixel; refuse other slices at one position."""
    kept: list[Frame] = []
    dropped = 0
    for frame in ordered:
        if kept and np.linalg.norm(frame.position - kept[-1].position) < POSITION_TOLERANCE_MM:
            if not _same_pixels(kept[-1], frame):
                raise _conflict(ordered, kept[-1], frame)
            dropped += 1
            continue
        kept.append(frame)
    if dropped:
        repairs.append(f"{dropped} of {len(ordered)} slices stood twice; each was taken once")
    return kept


def _same_pixels(first: Frame, second: Frame) -> bool:
    return bool(np.array_equal(stored_pixels(first), stored_pixels(second)))


def _conflict(ordered: Sequence[Frame], first: Frame, second: Frame) -> UnusableScanError:
    """Several volumes in one series where a tag tells them apart; a contradiction where none does."""
    for tag in _VOLUME_TAGS:
        values = Counter(str(frame.header.get(tag, "")) for frame in ordered)
        if len(values) > 1 and len(set(values.values())) == 1 and 1 not in values.values():
            shown = "; ".join(list(values)[:4])
            return UnusableScanError(ProblemKind.MIXED_SERIES, f"{len(values)} volumes by {tag}: {shown}")
    names = f"{first.path.name} and {second.path.name}"
    if first.path == second.path:
        names = f"frames {(first.index or 0) + 1} and {(second.index or 0) + 1} of {first.path.name}"
    return UnusableScanError(ProblemKind.CONFLICTING_SLICES, names)


def _stack_affine(ordered: Sequence[Frame], repairs: list[str]) -> Affine:
    """[4, 4], indices (slice, row, column) to LPS, after checking that slices are evenly spaced on a line."""
    if len(ordered) < 2:
        raise UnusableScanError(ProblemKind.SINGLE_SLICE, ordered[0].path.name)
    first = ordered[0]
    normal = _normal(first)
    positions = np.stack([frame.position for frame in ordered])
    _check_spacing(ordered, positions @ normal)
    step = (positions[-1] - positions[0]) / (len(ordered) - 1)
    expected = positions[0] + np.arange(len(ordered))[:, None] * step
    off = float(np.linalg.norm(positions - expected, axis=1).max())
    if off > max(POSITION_TOLERANCE_MM, 0.05 * float(np.linalg.norm(step))):
        raise UnusableScanError(ProblemKind.UNEVEN_SPACING, f"slices lie up to {off:.3g} mm beside one line")
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > TILT_TOLERANCE_DEG:
        repairs.append(f"slices are tilted by {tilt:.1f} degrees against their stack; kept in the geometry")
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = first.orientation[1] * first.spacing[0]
    affine[:3, 2] = first.orientation[0] * first.spacing[1]
    affine[:3, 3] = positions[0]
    return affine


def _check_spacing(ordered: Sequence[Frame], heights_mm: NDArray[np.float64]) -> None:
    steps = np.diff(heights_mm)
    typical = float(np.median(steps))
    tolerance = max(SPACING_TOLERANCE * typical, POSITION_TOLERANCE_MM)
    if np.abs(steps - typical).max() <= tolerance:
        return
    smallest = float(steps.min())
    multiples = np.rint(steps / smallest) if smallest > POSITION_TOLERANCE_MM else np.zeros_like(steps)
    tolerance = max(SPACING_TOLERANCE * smallest, 2 * POSITION_TOLERANCE_MM)
    if (multiples >= 1).all() and np.abs(steps - multiples * smallest).max() <= tolerance:
        gaps = np.flatnonzero(multiples > 1)
        shown = "; ".join(
            f"{int(multiples[gap]) - 1} between {_called(ordered[gap])} and {_called(ordered[gap + 1])}"
            for gap in gaps[:3]
        )
        raise UnusableScanError(ProblemKind.MISSING_SLICES, shown + ("; ..." if gaps.size > 3 else ""))
    detail = f"{steps.min():.4g} to {steps.max():.4g} mm from slice to slice"
    raise UnusableScanError(ProblemKind.UNEVEN_SPACING, detail)


def _called(frame: Frame) -> str:
    return frame.path.name if frame.index is None else f"frame {frame.index + 1}"


def _normal(frame: Frame) -> NDArray[np.float64]:
    return np.cross(frame.orientation[0], frame.orientation[1])


def _fill(voxels_DHW: NDArray[np.float32], ordered: Sequence[Frame]) -> None:
    decoded: dict[Path, NDArray[Any]] = {}
    for place, frame in enumerate(ordered):
        if frame.index is None:
            voxels_DHW[place] = rescaled_values(stored_pixels(frame), frame)
            continue
        if frame.path not in decoded:
            decoded = {frame.path: stored_values(frame.path)}
        stack = decoded[frame.path]
        voxels_DHW[place] = rescaled_values(stack[frame.index] if stack.ndim == 3 else stack, frame)


def _inversion(header: Any) -> list[str]:
    return ["low values meant white (MONOCHROME1); inverted"] if is_inverted(header) else []
