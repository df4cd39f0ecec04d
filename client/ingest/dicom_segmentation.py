"""A DICOM SEG object as the mask of a scan (PS3.3, A.51; read by highdicom).

Frames are laid onto the image's slices by their positions in the patient, so it does not matter which slices
the object leaves out, in which order it has them, or whether the stack is tilted. Segments become the plan's
labels by their names; a segment whose name the plan does not know is refused rather than guessed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.ingest.dicom_frames import frame_groups, group_item, plane_geometry
from client.ingest.dicom_volume import LPS_TO_RAS
from client.ingest.pixel_decoder import stored_values
from client.ingest.scan import LoadedVolume, ProblemKind, SingleFile, UnusableScanError
from client.ingest.segment_names import values_by_name
from shared.volumes.nifti import Affine, Volume

POSITION_TOLERANCE_VOXELS = 0.05
"""How far a frame of the mask may lie from the image's own grid, in voxels."""


@dataclass(frozen=True, kw_only=True)
class SegmentationFile(SingleFile):
    """A mask in a DICOM SEG file.

    Attributes:
        labels: The plan's labels; label k becomes value k + 1.
        names: Names of segments and the label that each stands for, where they differ; an empty label means
            that the segment is left out.
    """

    labels: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)

    def read(self, like: Volume | None = None) -> LoadedVolume:
        """The mask on the grid of ``like``, which is needed: a SEG alone has no slices but its own.

        Raises:
            UnusableScanError: the file is no SEG, has unknown segments, lies on another grid, or gives two
                labels to one voxel.
        """
        if like is None:
            raise UnusableScanError(ProblemKind.NO_GEOMETRY, f"{self.path.name}: a SEG needs its image")
        import highdicom  # seconds to import; not needed where there is no SEG

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                segmentation = highdicom.seg.segread(self.path)
                stored_FHW = _frames(segmentation, stored_values(self.path))
                values = self._values(segmentation)
                mask = _laid_onto(segmentation, stored_FHW, values, like, self.path.name)
        except UnusableScanError:
            raise
        except Exception as error:  # a parser of foreign bytes: whatever it raises, there is no mask
            reason = f"{self.path.name}: {type(error).__name__}: {error}".splitlines()[0][:200]
            raise UnusableScanError(ProblemKind.UNREADABLE_FILE, reason) from error
        return LoadedVolume(volume=Volume(voxels_DHW=mask, affine=like.affine))

    def _values(self, segmentation: Any) -> dict[int, int]:
        """Mask value by segment number; 0 for segments that are left out."""
        named = {
            int(number): str(segmentation.get_segment_description(number).segment_label)
            for number in segmentation.segment_numbers
        }
        return values_by_name(named, self.labels, self.names, what=self.path.name)


def _frames(segmentation: Any, stored: NDArray[Any]) -> NDArray[Any]:
    """Stored frames [F, H, W]; fractional ones as 0 or 1, at half of their maximum."""
    stored = stored[None] if stored.ndim == 2 else stored
    if str(segmentation.SegmentationType) == "FRACTIONAL":
        return stored >= int(segmentation.MaximumFractionalValue) / 2
    return stored


def _laid_onto(
    segmentation: Any, stored_FHW: NDArray[Any], values: Mapping[int, int], image: Volume, name: str
) -> NDArray[np.uint8]:
    mask_DHW = np.zeros(image.shape, dtype=np.uint8)
    to_image = np.linalg.inv(image.affine) @ LPS_TO_RAS
    is_labelmap = str(segmentation.SegmentationType) == "LABELMAP"
    for index, groups in enumerate(frame_groups(segmentation)):
        labels_HW = _labels(stored_FHW[index], groups, values, is_labelmap)
        if not labels_HW.any():
            continue
        where = f"{name} frame {index + 1}"
        plane = _plane_affine(groups, where)
        slice_HW = _own_slice(mask_DHW, to_image @ plane, labels_HW.shape, where)
        taken = labels_HW > 0
        if (slice_HW[taken] != 0).any() and (slice_HW[taken] != labels_HW[taken]).any():
            raise UnusableScanError(ProblemKind.UNKNOWN_LABEL, f"{where}: two labels at one voxel")
        slice_HW[taken] = labels_HW[taken]
    return mask_DHW


def _labels(
    stored_HW: NDArray[Any], groups: Sequence[Any], values: Mapping[int, int], is_labelmap: bool
) -> NDArray[np.uint8]:
    """Mask values of one frame."""
    if is_labelmap:
        table = np.zeros(max([*values, int(stored_HW.max())]) + 1, dtype=np.uint8)
        for number, value in values.items():
            table[number] = value
        labels_HW: NDArray[np.uint8] = table[stored_HW]
        return labels_HW
    number = int(group_item(groups, "SegmentIdentificationSequence").ReferencedSegmentNumber)
    return (stored_HW > 0).astype(np.uint8) * np.uint8(values[number])


def _plane_affine(groups: Sequence[Any], where: str) -> Affine:
    """[4, 3], (row, column, 1) of a frame to LPS."""
    position, orientation, spacing = plane_geometry(
        group_item(groups, "PlanePositionSequence").get("ImagePositionPatient"),
        group_item(groups, "PlaneOrientationSequence").get("ImageOrientationPatient"),
        group_item(groups, "PixelMeasuresSequence").get("PixelSpacing"),
        where=where,
    )
    affine = np.zeros((4, 3))
    affine[:3, 0] = orientation[1] * spacing[0]
    affine[:3, 1] = orientation[0] * spacing[1]
    affine[:, 2] = [*position, 1.0]
    return affine


def _own_slice(
    mask_DHW: NDArray[np.uint8], to_voxels: Affine, shape: tuple[int, ...], where: str
) -> NDArray[np.uint8]:
    """The view of the mask that a frame covers, with the frame's own rows and columns.

    Args:
        to_voxels: [4, 3], (row, column, 1) of the frame to the mask's voxels.
    """
    row, column, origin = to_voxels[:3, 0], to_voxels[:3, 1], to_voxels[:3, 2]
    last = origin + row * (shape[0] - 1) + column * (shape[1] - 1)
    first, last = np.rint(origin).astype(int), np.rint(last).astype(int)
    far = origin + row * (shape[0] - 1)
    exact = max(np.abs(origin - np.rint(origin)).max(), np.abs(far - np.rint(far)).max())
    upright = abs(abs(row[1]) - 1) < 1e-2 and abs(abs(column[2]) - 1) < 1e-2
    inside = (np.minimum(first, last) >= 0).all() and (np.maximum(first, last) < mask_DHW.shape).all()
    if exact > POSITION_TOLERANCE_VOXELS or not upright or first[0] != last[0]:
        raise UnusableScanError(ProblemKind.AFFINE_MISMATCH, f"{where} does not lie on a slice of the image")
    if not inside:
        raise UnusableScanError(ProblemKind.AFFINE_MISMATCH, f"{where} lies outside the image")
    area = mask_DHW[first[0], min(first[1], last[1]) : max(first[1], last[1]) + 1]
    area = area[:, min(first[2], last[2]) : max(first[2], last[2]) + 1]
    return area[:: 1 if row[1] > 0 else -1, :: 1 if column[2] > 0 else -1]
