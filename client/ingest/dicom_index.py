"""What is in a folder of DICOM files: series of images, segmentations, and files that are broken.

Headers alone are read. Files are recognised by content, not by name; a file without the 128-byte preamble is
tried all the same, as scanners of the ACR-NEMA age and careless exports write such files.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pydicom
from pydicom.uid import UID

from client.ingest.scan import Problem, ProblemKind

SEGMENTATION_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
"""Segmentation Storage and Label Map Segmentation Storage."""

_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "PatientID", "Modality", "BodyPartExamined", "SeriesDescription", "SeriesNumber",
    "ReferencedSeriesSequence", "ImageType",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SeriesSelection:
    """Which series are wanted. Empty fields select everything; case does not matter.

    Attributes:
        modalities: DICOM modalities (``MR``, ``CT``).
        body_parts: Values of Body Part Examined.
        description: Pattern for the series description, with ``*`` and ``?``.
    """

    modalities: frozenset[str] = frozenset()
    body_parts: frozenset[str] = frozenset()
    description: str | None = None

    def rejects(self, *, modality: str | None, body_part: str | None, description: str | None) -> str | None:
        """Which criterion a series fails; None if it is wanted. A value that is None is not known (yet)."""
        if self.modalities and modality is not None and modality.upper() not in _upper(self.modalities):
            return "modality"
        if self.body_parts and body_part is not None and body_part.upper() not in _upper(self.body_parts):
            return "body part"
        pattern = self.description
        if pattern is not None and description is not None:
            return None if fnmatchcase(description.casefold(), pattern.casefold()) else "description"
        return None


@dataclass(frozen=True, kw_only=True)
class SeriesFiles:
    """Files of one series, from their headers.

    Attributes:
        series_uid, study_uid, patient_id, modality, body_part, description, number: As in the header; empty
            where it says nothing.
        frame_of_reference: UID of the coordinate system.
        referenced_series: Series that a segmentation was drawn on.
        paths: Files, sorted by name.
        is_segmentation: Whether it is a DICOM SEG.
    """

    series_uid: str
    study_uid: str
    patient_id: str
    modality: str
    body_part: str
    description: str
    number: str
    frame_of_reference: str
    referenced_series: frozenset[str]
    paths: tuple[Path, ...]
    is_segmentation: bool


@dataclass(frozen=True, kw_only=True)
class DicomIndex:
    """Series of a folder.

    Attributes:
        images: Series of images, by patient and number.
        segmentations: One entry for each SEG object, so each has one path.
        problems: Files that cannot be used, by name.
        skipped: Files that are sound and no image, in words, with counts.
    """

    images: tuple[SeriesFiles, ...]
    segmentations: tuple[SeriesFiles, ...]
    problems: tuple[Problem, ...]
    skipped: tuple[str, ...]


def index_folder(root: Path) -> DicomIndex:
    """Read the headers of all files under a folder, or of one file."""
    if not root.is_dir():
        return index_files([root], root=root.parent)
    return index_files(sorted(path for path in root.rglob("*") if path.is_file()), root=root)


def index_files(paths: Iterable[Path], *, root: Path) -> DicomIndex:
    """Sort files into series; ``root`` is what file names in problems are relative to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters is checked where it is used
        return _sorted_into_series(paths, root)


def _sorted_into_series(paths: Iterable[Path], root: Path) -> DicomIndex:
    groups: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    segmentations: list[SeriesFiles] = []
    problems: list[Problem] = []
    skipped: Counter[str] = Counter()
    for path in paths:
        header = _read_header(path)
        name = str(path.relative_to(root))
        if isinstance(header, str):
            problems.append(Problem(file=name, kind=ProblemKind.UNREADABLE_FILE, detail=header))
        elif header is None:
            skipped["not DICOM"] += 1
        elif (class_uid := str(header.get("SOPClassUID", ""))) == _DIRECTORY_CLASS:
            skipped["DICOM directories"] += 1
        elif class_uid in SEGMENTATION_CLASSES:
            segmentations.append(_describe([(path, header)]))
        elif class_uid and "Image Storage" not in UID(class_uid).name:
            skipped[f"{UID(class_uid).name}, not images"] += 1
        elif lacking := [tag for tag in ("SOPClassUID", "SeriesInstanceUID") if not header.get(tag)]:
            detail = f"DICOM without {' and '.join(lacking)}"
            problems.append(Problem(file=name, kind=ProblemKind.UNREADABLE_FILE, detail=detail))
        else:
            groups[str(header.SeriesInstanceUID)].append((path, header))
    images = []
    for files in groups.values():
        patients = sorted({_text(header, "PatientID") for _, header in files})
        if len(patients) == 1:
            images.append(_describe(files))
            continue
        detail = f"its series has files of {len(patients)} patients"
        problems.extend(
            Problem(file=str(path.relative_to(root)), kind=ProblemKind.OTHER_PATIENT, detail=detail)
            for path, _ in files
        )
    return DicomIndex(
        images=tuple(sorted(images, key=lambda one: (one.patient_id, one.number.zfill(9), one.series_uid))),
        segmentations=tuple(segmentations),
        problems=tuple(problems),
        skipped=tuple(f"{count} {what}" for what, count in sorted(skipped.items())),
    )


def _read_header(path: Path) -> Any:
    """The header; None for a file that is not DICOM; a text that says why it cannot be read."""
    try:
        with path.open("rb") as file:
            magic = file.read(132)[128:] == b"DICM"
        header = pydicom.dcmread(path, stop_before_pixels=True, force=not magic, specific_tags=_TAGS)
        if header.file_meta.get("MediaStorageSOPClassUID") == _DIRECTORY_CLASS:
            header.SOPClassUID = _DIRECTORY_CLASS
        for tag in _TAGS:
            header.get(tag)  # values are parsed when they are asked for
    except Exception as error:  # a parser of foreign bytes: whatever it raises, the file is unreadable
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    if magic or header.get("SOPClassUID"):
        return header
    return "no DICOM header" if path.suffix.lower() in _DICOM_SUFFIXES else None


def _describe(files: list[tuple[Path, Any]]) -> SeriesFiles:
    header = files[0][1]
    referenced = [
        str(item.SeriesInstanceUID)
        for item in header.get("ReferencedSeriesSequence") or []
        if "SeriesInstanceUID" in item
    ]
    class_uid = str(header.get("SOPClassUID", ""))
    return SeriesFiles(
        series_uid=_text(header, "SeriesInstanceUID"),
        study_uid=_text(header, "StudyInstanceUID"),
        patient_id=_text(header, "PatientID"),
        modality=_text(header, "Modality"),
        body_part=_text(header, "BodyPartExamined"),
        description=_text(header, "SeriesDescription"),
        number=_text(header, "SeriesNumber"),
        frame_of_reference=_text(header, "FrameOfReferenceUID"),
        referenced_series=frozenset(referenced),
        paths=tuple(sorted(path for path, _ in files)),
        is_segmentation=class_uid in SEGMENTATION_CLASSES,
    )


def _text(header: Any, tag: str) -> str:
    value = header.get(tag)
    return "" if value is None else str(value).strip()


def _upper(values: frozenset[str]) -> set[str]:
    return {value.upper() for value in values}
