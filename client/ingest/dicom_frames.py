"""The slices of DICOM files, one by one: where each lies, and what its stored values mean.

A slice is a file of its own or a frame of a multi-frame object (enhanced CT and MR; PS3.3, C.7.6.16); both
become a :class:`Frame`. Values are inverted for MONOCHROME1 and rescaled by each slice's own slope and
intercept (or look-up table), so that CT is in Hounsfield units.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels import apply_modality_lut

from client.ingest.pixel_decoder import stored_values
from client.ingest.scan import ProblemKind, UnusableScanError

QUANTITATIVE = frozenset({"CT", "PT", "NM"})
"""Modalities whose values have units, whatever their pictures look like on a screen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One slice before its pixels are read. Vectors in DICOM's LPS coordinates, in millimetres."""

    path: Path
    index: int | None
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing: tuple[float, float]
    shape: tuple[int, int]
    number: int | None
    header: Any
    rescale: tuple[float, float] | None


def frame_groups(header: Any) -> list[list[Any]]:
    """For each frame of a multi-frame object its own functional groups, then the shared ones."""
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])
    return [[item, *shared] for item in header.get("PerFrameFunctionalGroupsSequence") or []]


def group_item(groups: Sequence[Any], sequence: str) -> Any:
    """First item of a functional group; an empty data set where there is none."""
    for group in groups:
        if items := group.get(sequence):
            return items[0]
    return pydicom.Dataset()


def plane_geometry(
    position: Any, orientation: Any, spacing: Any, *, where: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[float, float]]:
    """Position [3], orientation [2, 3] (unit vectors along a row and along a column) and spacing in mm.

    Raises:
        UnusableScanError: something is not there, not finite, or not at right angles.
    """
    for value, count, name in (
        (position, 3, "Image Position (Patient)"),
        (orientation, 6, "Image Orientation (Patient)"),
        (spacing, 2, "Pixel Spacing"),
    ):
        if value is None or len(value) != count:
            raise UnusableScanError(ProblemKind.NO_GEOMETRY, f"{where} has no {name}")
    origin = np.array([float(number) for number in position])
    cosines = np.array([float(number) for number in orientation]).reshape(2, 3)
    steps = (float(spacing[0]), float(spacing[1]))
    lengths = np.linalg.norm(cosines, axis=1)
    if not np.isfinite(origin).all() or not np.isfinite(steps).all() or min(steps) <= 0:
        raise UnusableScanError(ProblemKind.NO_GEOMETRY, f"{where}: its position or spacing makes no sense")
    if (
        not np.isfinite(lengths).all()
        or np.abs(lengths - 1).max() > 0.01
        or abs(cosines[0] @ cosines[1]) > 0.01
    ):
        raise UnusableScanError(ProblemKind.NO_GEOMETRY, f"{where}: rows and columns are not at right angles")
    return origin, cosines / lengths[:, None], steps


def read_frames(path: Path) -> list[Frame]:
    """Headers of the slices of one file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever is odd and matters is checked below
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            return _frames_of(header, path)
    except UnusableScanError:
        raise
    except Exception as error:  # a parser of foreign bytes: whatever it raises, the file is unreadable
        detail = f"{path.name}: {type(error).__name__}: {error}".splitlines()[0][:200]
        raise UnusableScanError(ProblemKind.UNREADABLE_FILE, detail) from error


def _frames_of(header: Any, path: Path) -> list[Frame]:
    if lacking := [tag for tag in ("Rows", "Columns", "PhotometricInterpretation") if tag not in header]:
        detail = f"{path.name} has no {' and no '.join(lacking)}"
        raise UnusableScanError(ProblemKind.UNDECODABLE_PIXELS, detail)
    colour = str(header.PhotometricInterpretation)
    if int(header.get("SamplesPerPixel", 1)) != 1 or colour not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnusableScanError(ProblemKind.COLOUR_IMAGE, f"{path.name}: {colour}")
    if str(header.get("BurnedInAnnotation", "")).upper() == "YES":
        raise UnusableScanError(ProblemKind.BURNED_IN_TEXT, f"{path.name} says so; it may name the patient")
    if str(header.get("SyntheticData", "")).upper() == "YES":
        raise UnusableScanError(ProblemKind.SYNTHETIC_SCAN, f"{path.name}: no patient was scanned")
    if "MOSAIC" in (header.get("ImageType") or []):
        raise UnusableScanError(ProblemKind.MIXED_SERIES, f"{path.name}: slices tiled in one image (mosaic)")
    groups = frame_groups(header)
    n_frames = int(header.get("NumberOfFrames") or 1)
    if groups and len(groups) != n_frames:
        raise UnusableScanError(
            ProblemKind.UNREADABLE_FILE, f"{path.name}: {n_frames} frames, geometry of {len(groups)}"
        )
    if not groups and n_frames > 1:
        raise UnusableScanError(ProblemKind.NO_GEOMETRY, f"{path.name}: {n_frames} frames without positions")
    frames = []
    for index in range(n_frames):
        group = groups[index] if groups else [header]
        plane = group_item(group, "PlanePositionSequence") if groups else header
        turned = group_item(group, "PlaneOrientationSequence") if groups else header
        measures = group_item(group, "PixelMeasuresSequence") if groups else header
        position, orientation, spacing = plane_geometry(
            plane.get("ImagePositionPatient"),
            turned.get("ImageOrientationPatient"),
            measures.get("PixelSpacing"),
            where=f"{path.name} frame {index + 1}" if groups else path.name,
        )
        number = header.get("InstanceNumber")
        frames.append(
            Frame(
                path=path,
                index=index if groups else None,
                position=position,
                orientation=orientation,
                spacing=spacing,
                shape=(int(header.Rows), int(header.Columns)),
                number=index if groups else (None if number in (None, "") else int(number)),
                header=header,
                rescale=_frame_rescale(group) if groups else None,
            )
        )
    return frames


def _frame_rescale(groups: Sequence[Any]) -> tuple[float, float] | None:
    item = group_item(groups, "PixelValueTransformationSequence")
    if "RescaleSlope" not in item:
        return None
    return float(item.RescaleSlope), float(item.RescaleIntercept)


def stored_pixels(frame: Frame) -> NDArray[Any]:
    stored = stored_values(frame.path)
    return stored if frame.index is None or stored.ndim == 2 else stored[frame.index]


def rescaled_values(stored_HW: NDArray[Any], frame: Frame) -> NDArray[Any]:
    """Stored values, inverted where the series says so, after the slice's own rescale."""
    header = frame.header
    if stored_HW.shape != frame.shape:
        detail = f"{frame.path.name}: pixels {stored_HW.shape}, header {frame.shape}"
        raise UnusableScanError(ProblemKind.UNDECODABLE_PIXELS, detail)
    if is_inverted(header):
        signed = int(header.get("PixelRepresentation", 0)) == 1
        top = -1 if signed else (1 << int(header.BitsStored)) - 1
        stored_HW = top - stored_HW.astype(np.int64)
    if frame.rescale is not None:
        slope, intercept = frame.rescale
        return stored_HW * slope + intercept
    if "ModalityLUTSequence" in header or "RescaleSlope" in header:
        values: NDArray[Any] = apply_modality_lut(stored_HW, header)
        return values
    return stored_HW


def is_inverted(header: Any) -> bool:
    return (
        str(header.PhotometricInterpretation) == "MONOCHROME1" and header.get("Modality") not in QUANTITATIVE
    )
