"""Synthetic scans as DICOM: a classic MR or CT series and a Segmentation on it, marked as synthetic.

One object a slice (MR Image Storage or CT Image Storage, PS3.3 A.4 and A.3), axial, head last, columns to the
patient's left and rows to the back; the mask is one binary Segmentation (A.51), written by highdicom, with a
segment for each label that is present. Everywhere Synthetic Data (0008,001C) is YES, Image Type says DERIVED,
Derivation Description names bundle and seed, and the patient's name is SYNTHETIC.

Unique identifiers are derived from the run and the sample: the same run gives the same files. Without a root
of one's own they are UUID-derived (PS3.5 B.2: 2.25 and a number of 128 bits, here from SHA-256). Dates are
those of the bundle's release: a synthetic scan was never acquired.

Intensities are the generator's, 0 to 1, stored as 0 to 4095. CT has Rescale Slope 1/4095 and Rescale Type US
(unspecified): these are no Hounsfield units.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage

from shared.canonical import digest
from shared.errors import UsageError
from shared.volumes.nifti import Spacing3, VolumeFileError
from shared.volumes.synthetic import Provenance, SyntheticPair, lacuna_version, place

Modality = Literal["MR", "CT"]

FULL_SCALE = 4095
"""Stored value of intensity 1."""

MAX_ROOT_LENGTH = 24
SEGMENTATION_FILE = "segmentation.dcm"


@dataclass(frozen=True, kw_only=True)
class DicomSeries:
    """Writes each sample as a folder: ``image/00001.dcm`` and on, and ``segmentation.dcm``.

    Attributes:
        spacing_mm: Voxel size along R, A, S.
        modality: MR or CT.
        released: Time of the bundle's release, UTC.
        uid_root: One's own registered root, such as ``1.2.826.0.1.3680043.8.498``; None: UUID-derived.
    """

    spacing_mm: Spacing3
    modality: Modality
    released: datetime
    uid_root: str | None = None
    name: str = "dicom"

    def __post_init__(self) -> None:
        root = self.uid_root
        if root is not None and (
            len(root) > MAX_ROOT_LENGTH or re.fullmatch(pydicom.uid.RE_VALID_UID, root) is None
        ):
            raise UsageError(
                f"{root!r} is no root of unique identifiers",
                remedy=f"numbers joined by dots, at most {MAX_ROOT_LENGTH} characters, none with a leading 0",
            )

    def pair(self, folder: Path, stem: str) -> SyntheticPair:
        return SyntheticPair(
            image=folder / stem / "image",
            mask=folder / stem / SEGMENTATION_FILE,
            sidecar=folder / f"{stem}.json",
        )

    def write(
        self,
        folder: Path,
        provenance: Provenance,
        index: int,
        *,
        image_DHW: NDArray[np.float32],
        mask_DHW: NDArray[np.uint8],
    ) -> list[Path]:
        pair = self.pair(folder, provenance.stem(index))
        pair.image.mkdir(parents=True, exist_ok=True)
        slices = self._slices(provenance, index, image_DHW)
        paths = [pair.image / f"{dataset.InstanceNumber:05d}.dcm" for dataset in slices]
        for path, dataset in zip(paths, slices, strict=True):
            place(path, lambda partial, dataset=dataset: _save(partial, dataset))  # type: ignore[misc]
        if not mask_DHW.any():
            return paths
        segmentation = self._segmentation(provenance, index, slices, mask_DHW)
        place(pair.mask, lambda partial: _save(partial, segmentation))
        return [*paths, pair.mask]

    def read(self, pair: SyntheticPair) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        try:
            slices = [pydicom.dcmread(path) for path in sorted(pair.image.glob("*.dcm"))]
            slices.sort(key=lambda dataset: float(dataset.ImagePositionPatient[2]))
            image = np.stack([dataset.pixel_array for dataset in slices])
            mask = np.zeros(image.shape, dtype=np.uint8)
            if pair.mask.exists():
                position = {dataset.SOPInstanceUID: z for z, dataset in enumerate(slices)}
                _read_segments(pydicom.dcmread(pair.mask), position, mask)
        except (OSError, InvalidDicomError, ValueError, AttributeError, KeyError) as error:
            raise VolumeFileError(f"{pair.image}: not the series that was written ({error})") from error
        return (_from_axial(image) / FULL_SCALE).astype(np.float32), _from_axial(mask).astype(np.uint8)

    def _uid(self, provenance: Provenance, *parts: str) -> str:
        facts = [provenance.bundle_files_sha256, repr(provenance), self.modality, *parts]
        number = digest("lacuna/dicom-uid/v1", *(fact.encode() for fact in facts))
        if self.uid_root is None:
            return f"2.25.{int.from_bytes(number[:16], 'big')}"
        room = min(38, 64 - len(self.uid_root) - 1)
        return f"{self.uid_root}.{int.from_bytes(number[:16], 'big') % 10**room}"

    def _common(self, provenance: Provenance, index: int) -> Dataset:
        """Patient, study, frame of reference, equipment, and what marks an object as synthetic."""
        stem = provenance.stem(index)
        dataset = Dataset()
        dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.SyntheticData = "YES"
        dataset.PatientName = f"SYNTHETIC^{stem}"[:64]
        dataset.PatientID = (
            f"SYNTHETIC-{hashlib.sha256(self._uid(provenance, stem).encode()).hexdigest()[:16]}"
        )
        dataset.PatientBirthDate = ""
        dataset.PatientSex = ""
        dataset.PatientIdentityRemoved = "YES"
        dataset.DeidentificationMethod = "Synthetic: shows no patient"
        dataset.StudyInstanceUID = self._uid(provenance, stem, "study")
        dataset.StudyDate = f"{self.released:%Y%m%d}"
        dataset.StudyTime = f"{self.released:%H%M%S}"
        dataset.ReferringPhysicianName = ""
        dataset.StudyID = "SYNTHETIC"
        dataset.AccessionNumber = ""
        dataset.StudyDescription = f"SYNTHETIC {provenance.study_id}: {provenance.condition}"[:64]
        dataset.FrameOfReferenceUID = self._uid(provenance, stem, "frame")
        dataset.PositionReferenceIndicator = ""
        dataset.Manufacturer = "Lacuna"
        dataset.ManufacturerModelName = "Lacuna generator"
        dataset.DeviceSerialNumber = provenance.bundle_sha256[:64]
        dataset.SoftwareVersions = lacuna_version()
        dataset.DerivationDescription = derivation(provenance, index)
        dataset.BurnedInAnnotation = "NO"
        return dataset

    def _slices(self, provenance: Provenance, index: int, image_DHW: NDArray[np.float32]) -> list[Dataset]:
        stem = provenance.stem(index)
        step_r, step_a, step_s = self.spacing_mm
        stored_SHW = np.rint(_to_axial(image_DHW) * FULL_SCALE).clip(0, FULL_SCALE).astype("<u2")
        n_slices, rows, columns = stored_SHW.shape
        datasets = []
        for z in range(n_slices):
            dataset = self._common(provenance, index)
            dataset.SOPClassUID = MRImageStorage if self.modality == "MR" else CTImageStorage
            dataset.SOPInstanceUID = self._uid(provenance, stem, "image", str(z))
            dataset.Modality = self.modality
            dataset.SeriesInstanceUID = self._uid(provenance, stem, "series")
            dataset.SeriesNumber = 1
            dataset.SeriesDescription = f"SYNTHETIC {self.modality} volume"
            dataset.SeriesDate = dataset.ContentDate = f"{self.released:%Y%m%d}"
            dataset.SeriesTime = dataset.ContentTime = f"{self.released:%H%M%S}"
            dataset.PatientPosition = "HFS"
            dataset.Laterality = ""
            dataset.InstanceNumber = z + 1
            dataset.AcquisitionNumber = 1
            dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER" if self.modality == "MR" else "AXIAL"]
            dataset.ImageComments = "Synthetic image, shows no patient. Not for diagnosis."
            dataset.ImagePositionPatient = [
                _decimal(-(columns - 1) / 2 * step_r),
                _decimal(-(rows - 1) / 2 * step_a),
                _decimal((z - (n_slices - 1) / 2) * step_s),
            ]
            dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            dataset.PixelSpacing = [_decimal(step_a), _decimal(step_r)]
            dataset.SliceThickness = _decimal(step_s)
            dataset.SpacingBetweenSlices = _decimal(step_s)
            dataset.SliceLocation = dataset.ImagePositionPatient[2]
            dataset.SamplesPerPixel = 1
            dataset.PhotometricInterpretation = "MONOCHROME2"
            dataset.Rows, dataset.Columns = rows, columns
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
            dataset.PixelRepresentation = 0
            dataset.WindowCenter, dataset.WindowWidth = _window(self.modality)
            _acquisition(dataset, self.modality)
            dataset.PixelData = stored_SHW[z].tobytes()
            dataset["PixelData"].VR = "OW"
            dataset.file_meta = self._meta(provenance, dataset)
            datasets.append(dataset)
        return datasets

    def _segmentation(
        self, provenance: Provenance, index: int, slices: Sequence[Dataset], mask_DHW: NDArray[np.uint8]
    ) -> Dataset:
        from highdicom import AlgorithmIdentificationSequence
        from highdicom.seg import Segmentation, SegmentDescription
        from pydicom.sr.codedict import codes
        from pydicom.sr.coding import Code

        stem = provenance.stem(index)
        axial_SHW = _to_axial(mask_DHW)
        present = [value for value in range(1, len(provenance.labels) + 1) if (axial_SHW == value).any()]
        onehot_SHWK = np.stack([axial_SHW == value for value in present], axis=-1).astype(np.uint8)
        algorithm = AlgorithmIdentificationSequence(
            name="Lacuna generator", family=codes.DCM.ArtificialIntelligence, version=lacuna_version()
        )
        segmentation = Segmentation(
            source_images=list(slices),
            pixel_array=onehot_SHWK,
            segmentation_type="BINARY",
            segment_descriptions=[
                SegmentDescription(
                    segment_number=number,
                    segment_label=provenance.labels[value - 1],
                    segmented_property_category=codes.SCT.AnatomicalStructure,
                    segmented_property_type=Code(
                        provenance.labels[value - 1][:16], "99LACUNA", provenance.labels[value - 1]
                    ),
                    algorithm_type="AUTOMATIC",
                    algorithm_identification=algorithm,
                    tracking_uid=self._uid(provenance, stem, "segment", str(value)),
                    tracking_id=f"{stem}-{value}"[:64],
                )
                for number, value in enumerate(present, start=1)
            ],
            series_instance_uid=self._uid(provenance, stem, "segmentation series"),
            series_number=2,
            sop_instance_uid=self._uid(provenance, stem, "segmentation"),
            instance_number=1,
            manufacturer="Lacuna",
            manufacturer_model_name="Lacuna generator",
            software_versions=lacuna_version(),
            device_serial_number=provenance.bundle_sha256[:64],
            content_label="SYNTHETIC",
            content_description="Mask of a synthetic scan",
        )
        marks = self._common(provenance, index)
        for keyword in (
            "SyntheticData",
            "DerivationDescription",
            "PatientIdentityRemoved",
            "DeidentificationMethod",
        ):
            setattr(segmentation, keyword, getattr(marks, keyword))
        segmentation.SeriesDescription = "SYNTHETIC segmentation"
        # highdicom takes the clock's time and draws an identifier; the same run gives the same bytes.
        for keyword in ("ContentDate", "SeriesDate", "InstanceCreationDate"):
            setattr(segmentation, keyword, f"{self.released:%Y%m%d}")
        for keyword in ("ContentTime", "SeriesTime", "InstanceCreationTime"):
            setattr(segmentation, keyword, f"{self.released:%H%M%S}")
        for equipment in segmentation.get("ContributingEquipmentSequence", ()):
            equipment.ContributionDateTime = f"{self.released:%Y%m%d%H%M%S}"
        dimensions = self._uid(provenance, stem, "dimensions")
        for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
            item.DimensionOrganizationUID = dimensions
        segmentation.file_meta = self._meta(provenance, segmentation)
        return segmentation

    def _meta(self, provenance: Provenance, dataset: Dataset) -> FileMetaDataset:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.ImplementationClassUID = pydicom.uid.PYDICOM_IMPLEMENTATION_UID
        return meta


def derivation(provenance: Provenance, index: int) -> str:
    """Derivation Description: what made this, in one paragraph of at most 1024 characters."""
    return (
        f"Synthetic: drawn from the generator released by study {provenance.study_id}, condition "
        f"{provenance.condition}, seed {provenance.seed}, sample {index}, {provenance.sampler} in "
        f"{provenance.steps} steps, guidance {provenance.guidance_scale:g}, bundle SHA-256 "
        f"{provenance.bundle_sha256}. Shows no patient."
    )[:1024]


def _acquisition(dataset: Dataset, modality: Modality) -> None:
    """Attributes that the IOD asks for; nothing was acquired, so they are empty wherever that is allowed."""
    if modality == "MR":
        dataset.ScanningSequence = "RM"
        dataset.SequenceVariant = "NONE"
        dataset.ScanOptions = ""
        dataset.MRAcquisitionType = "3D"
        dataset.RepetitionTime = None
        dataset.EchoTime = None
        dataset.EchoTrainLength = None
        return
    dataset.KVP = None
    dataset.RescaleIntercept = 0
    dataset.RescaleSlope = _decimal(1 / FULL_SCALE)
    dataset.RescaleType = "US"


def _window(modality: Modality) -> tuple[str, str]:
    return ("0.5", "1") if modality == "CT" else (str(FULL_SCALE / 2), str(FULL_SCALE))


def _decimal(value: float) -> str:
    """A DICOM decimal string, at most 16 characters."""
    for digits in range(12, 4, -1):
        text = f"{value:.{digits}g}"
        if len(text) <= 16:
            return text
    raise UsageError(f"{value} does not fit a decimal string")


def _to_axial(voxels_DHW: NDArray[Any]) -> NDArray[Any]:
    """[R, A, S] to [slice, row, column]: slices to the head, rows to the back, columns to the left."""
    return np.ascontiguousarray(voxels_DHW[::-1, ::-1].transpose(2, 1, 0))


def _from_axial(voxels_SHW: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(voxels_SHW.transpose(2, 1, 0)[::-1, ::-1])


def _read_segments(segmentation: Dataset, position: dict[str, int], mask_SHW: NDArray[np.uint8]) -> None:
    """Paint the segments, in the order of the labels that their codes' tracking identifiers end with."""
    values = {
        int(segment.SegmentNumber): int(str(segment.TrackingID).rsplit("-", 1)[1])
        for segment in segmentation.SegmentSequence
    }
    frames = np.atleast_3d(segmentation.pixel_array)
    if segmentation.NumberOfFrames == 1:
        frames = segmentation.pixel_array[None]
    for frame_HW, groups in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        number = int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        mask_SHW[position[source]][frame_HW > 0] = values[number]


def _save(path: Path, dataset: Dataset) -> None:
    dataset.save_as(path, enforce_file_format=True)
