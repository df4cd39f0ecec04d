"""DICOM series that tests write themselves, with all that identifies a patient. (No tests of its own.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from pydicom import Dataset, FileMetaDataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

Edit = Callable[[Dataset, int], None]


@dataclass(kw_only=True)
class Series:
    """What to write; :meth:`write` writes one file for each slice.

    Attributes:
        voxels: int16 [slice, row, column].
        row, column, step: Direction of a row, of a column, and the vector from slice to slice in mm (LPS).
        spacing: Pixel spacing in mm, (between rows, between columns).
    """

    voxels: np.ndarray
    patient_id: str = "MRN-0815"
    description: str = "T1 sag"
    modality: str = "MR"
    body_part: str = "BRAIN"
    row: Sequence[float] = (1.0, 0.0, 0.0)
    column: Sequence[float] = (0.0, 1.0, 0.0)
    step: Sequence[float] = (0.0, 0.0, 2.0)
    origin: Sequence[float] = (-31.5, 20.25, -17.0)
    spacing: Sequence[float] = (1.5, 1.25)
    number: int = 3
    uid: str = field(default_factory=generate_uid)
    study: str = field(default_factory=generate_uid)
    frame_of_reference: str = field(default_factory=generate_uid)

    def write(self, folder: Path, edit: Edit | None = None) -> list[Path]:
        """Files in slice order. ``edit`` changes a slice's data set before it is written."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for index in range(len(self.voxels)):
            dataset = self.slice(index)
            if edit is not None:
                edit(dataset, index)
            paths.append(folder / f"slice{index:03d}.dcm")
            dataset.save_as(paths[-1], enforce_file_format=True)
        return paths

    def slice(self, index: int) -> Dataset:
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
        dataset.SOPClassUID = MRImageStorage
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = self.study, self.uid
        dataset.FrameOfReferenceUID = self.frame_of_reference
        dataset.PatientName, dataset.PatientID = "Mustermann^Erika", self.patient_id
        dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientAge = "19640812", "F", "061Y"
        dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = dataset.AcquisitionDate = "20240229"
        dataset.StudyTime = dataset.SeriesTime = dataset.ContentTime = dataset.AcquisitionTime = "131415.678"
        dataset.AccessionNumber, dataset.StudyID = "ACC-77-1", "ST4711"
        dataset.ReferringPhysicianName, dataset.InstitutionName = "Sauerbruch^F", "Charite Test"
        dataset.Manufacturer, dataset.StationName = "Acme", "MR-ROOM-9"
        dataset.Modality, dataset.BodyPartExamined = self.modality, self.body_part
        dataset.SeriesDescription, dataset.ProtocolName = self.description, self.description
        dataset.SeriesNumber, dataset.InstanceNumber = self.number, index + 1
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "M"]
        dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "GR", "SP", ""
        dataset.MRAcquisitionType, dataset.EchoTime, dataset.RepetitionTime = "3D", 4.6, 1900.0
        dataset.EchoTrainLength = 1
        dataset.ImageOrientationPatient = [*map(float, self.row), *map(float, self.column)]
        position = np.asarray(self.origin) + index * np.asarray(self.step)
        dataset.ImagePositionPatient = [round(float(part), 6) for part in position]
        dataset.PixelSpacing = list(self.spacing)
        dataset.SliceThickness = 0.7  # not the distance of slices, on purpose
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows, dataset.Columns = self.voxels.shape[1:]
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = (
            16,
            16,
            15,
            1,
        )
        dataset.PixelData = np.ascontiguousarray(self.voxels[index], dtype="<i2").tobytes()
        return dataset


def identifying_values(paths: Sequence[Path]) -> set[str]:
    """Values by which somebody could be found: names, numbers, dates, times and unique identifiers."""
    values: set[str] = set()
    for path in paths:
        for element in dcmread(path).iterall():
            own_uid = element.VR == "UI" and not str(element.value).startswith("1.2.840.10008.")
            if own_uid or element.VR in ("PN", "DA", "TM", "DT", "AS", "LO", "SH", "LT", "ST"):
                values.add(str(element.value))
    return {value for value in values if len(value) > 3}


def blob(shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An int16 picture without symmetry, and a mask with the labels 1 and 2."""
    rng = np.random.default_rng(seed)
    d, h, w = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    voxels = (40 * d + 9 * h + 3 * w + rng.integers(0, 60, shape)).astype(np.int16)
    mask = np.zeros(shape, np.uint8)
    mask[2 : shape[0] - 2, 4 : shape[1] - 4, 5 : shape[2] - 3] = 1
    mask[3 : shape[0] - 3, 6 : shape[1] - 7, 6 : shape[2] - 6] = 2
    return voxels, mask


def write_segmentation(
    path: Path,
    sources: Sequence[Path],
    mask: np.ndarray,
    labels: Sequence[str] = ("organ", "lesion"),
    *,
    kind: str = "BINARY",
) -> Path:
    """A DICOM SEG on the slices (or the one multi-frame object) of a series, in the order of the mask."""
    images = [dcmread(source) for source in sources]
    arguments: dict[str, Any] = {
        "source_images": images,
        "segmentation_type": kind,
        "segment_descriptions": [
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=label,
                segmented_property_category=codes.SCT.Organ,
                segmented_property_type=codes.SCT.Brain,
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
            )
            for number, label in enumerate(labels, start=1)
        ],
        "series_instance_uid": generate_uid(),
        "series_number": 90,
        "sop_instance_uid": generate_uid(),
        "instance_number": 1,
        "manufacturer": "Acme",
        "manufacturer_model_name": "Hand",
        "software_versions": "1",
        "device_serial_number": "1",
    }
    pixels = mask
    if kind == "FRACTIONAL":
        pixels = np.stack([mask == number for number in range(1, len(labels) + 1)], axis=-1).astype(float)
    highdicom.seg.Segmentation(pixel_array=pixels, **arguments).save_as(path)
    return path


def write_multiframe(path: Path, sources: Sequence[Path]) -> Path:
    """The slices as one Legacy Converted Enhanced MR object."""
    enhanced = highdicom.legacy.LegacyConvertedEnhancedMRImage(
        legacy_datasets=[dcmread(source) for source in sources],
        series_instance_uid=generate_uid(),
        series_number=44,
        sop_instance_uid=generate_uid(),
        instance_number=1,
    )
    enhanced.save_as(path, enforce_file_format=True)
    return path
