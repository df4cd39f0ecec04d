"""A folder of DICOM series with the masks that belong to them.

Which patient has which condition is in no DICOM file, so a manifest says it (columns as for NIfTI:
``patient, scan, condition, mask``), or all scans are of one condition. In the manifest

- ``patient`` is the Patient ID of the files;
- ``scan`` is a Series Instance UID, or a file or folder relative to the manifest, or empty for every selected
  series of the patient;
- ``mask`` is a NIfTI or DICOM SEG file relative to the manifest, or the Series Instance UID of a SEG, or
  empty for the one SEG that was drawn on the series.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.ingest.dicom_index import DicomIndex, SeriesFiles, SeriesSelection, index_folder
from client.ingest.dicom_segmentation import SegmentationFile
from client.ingest.dicom_volume import DicomSeries
from client.ingest.manifest import ManifestError, ManifestRow, read_manifest_rows
from client.ingest.nifti_file import NiftiFile
from client.ingest.scan import Listing, Problem, ProblemKind, ScanEntry, VolumeSource
from shared.errors import UsageError
from shared.volumes.nifti import NIFTI_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class DicomPairing:
    """What turns series into scans: who has which condition, and what the segments are called.

    Attributes:
        labels: The plan's labels, in the plan's order.
        manifest: Table of patients; None where ``condition`` is of all.
        condition: Condition of every scan, in place of a manifest.
        selection: Which series are wanted.
        segment_names: Names of segments and the plan's label for each, where they differ.
        covariates: Names of covariates that the manifest may have as columns.
    """

    labels: tuple[str, ...]
    manifest: Path | None = None
    condition: str | None = None
    selection: SeriesSelection = field(default_factory=SeriesSelection)
    segment_names: Mapping[str, str] = field(default_factory=dict)
    covariates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.manifest is None) == (self.condition is None):
            raise UsageError("DICOM files do not say who has which condition: give a manifest or a condition")

    def rows(self, conditions: Sequence[str]) -> tuple[list[ManifestRow], list[Problem]]:
        """Rows that can be used, and what is wrong with the others. Raises ManifestError, UsageError."""
        if self.manifest is None:
            if self.condition not in conditions:
                raise UsageError(f"condition {self.condition!r}; the plan knows {', '.join(conditions)}")
            return [], []
        return read_manifest_rows(self.manifest, conditions, self.covariates)


@dataclass(frozen=True, kw_only=True)
class DicomFolder:
    """DICOM files under a folder, in whatever subfolders.

    Attributes:
        path: The folder.
        pairing: How its series become scans.
        from_archive: Whether series are named by their UIDs, as the archive knows them, and not by files.
    """

    path: Path
    pairing: DicomPairing
    from_archive: bool = False

    def listing(self, conditions: Sequence[str]) -> Listing:
        """Scans and problems; headers are read, pixels are not.

        Raises:
            ManifestError: there is no such folder, or the manifest as a whole is unusable.
            UsageError: the pairing's condition is not one of the plan.
        """
        if not self.path.is_dir():
            raise ManifestError(f"{self.path}: there is no such folder of DICOM files")
        rows, problems = self.pairing.rows(conditions)
        index = index_folder(self.path)
        names = _unique_names(index.images, None if self.from_archive else self.path)
        return _Pairing(self.path, self.pairing, index, names).listing(rows, problems)


class _Pairing:
    """Series of one folder, matched with rows and masks."""

    def __init__(
        self, root: Path, pairing: DicomPairing, index: DicomIndex, names: Mapping[str, str]
    ) -> None:
        self._root = root
        self._pairing = pairing
        self._index = index
        self._segmentations = list(index.segmentations)
        self._names = names

    def listing(self, rows: Sequence[ManifestRow], problems: Sequence[Problem]) -> Listing:
        found = [*problems, *self._index.problems]
        entries: list[ScanEntry] = []
        skipped: Counter[str] = Counter()
        used: set[int] = set()
        for series in self._index.images:
            reason = self._pairing.selection.rejects(
                modality=series.modality, body_part=series.body_part, description=series.description
            )
            if reason is not None:
                skipped[f"series not selected ({reason})"] += 1
                continue
            row = self._row(series, rows)
            if isinstance(row, str):
                skipped[row] += 1
            elif isinstance(row, Problem):
                found.append(row)
            else:
                used |= {number for number, other in enumerate(rows) if other is row}
                entry = self._entry(series, row)
                (entries if isinstance(entry, ScanEntry) else found).append(entry)  # type: ignore[arg-type]
        accused = {problem.file for problem in found}
        for number, row in enumerate(rows):
            if number not in used and not self._was_named(row, accused):
                detail = f"no selected series ({row.where})"
                name = row.scan or f"patient {row.patient}"
                found.append(Problem(file=name, kind=ProblemKind.MISSING_FILE, detail=detail))
        notes = [f"{count} {what}" for what, count in sorted(skipped.items())]
        return Listing(entries=tuple(entries), problems=tuple(found), skipped=(*notes, *self._index.skipped))

    def _was_named(self, row: ManifestRow, accused: set[str]) -> bool:
        return any(
            self._names[series.series_uid] in accused
            for series in self._index.images
            if self._points_at(row, series)
        )

    def _row(self, series: SeriesFiles, rows: Sequence[ManifestRow]) -> ManifestRow | Problem | str:
        """The row of a series; a text where nobody asked for it; a problem where it is not clear."""
        name = self._names[series.series_uid]

        def refuse(kind: ProblemKind, detail: str = "") -> Problem:
            return Problem(file=name, kind=kind, detail=detail)

        if not series.patient_id:
            return refuse(ProblemKind.NO_PATIENT, "its files have no Patient ID")
        if self._pairing.manifest is None:
            condition = self._pairing.condition or ""
            return ManifestRow(patient=series.patient_id, scan="", condition=condition, mask="", where="")
        pointing = [row for row in rows if row.scan and self._points_at(row, series)]
        others = sorted({row.where for row in pointing if row.patient != series.patient_id})
        if others:
            return refuse(ProblemKind.OTHER_PATIENT, ", ".join(others))
        own = [row for row in rows if row.patient == series.patient_id]
        matching = pointing or [row for row in own if not row.scan]
        if len(matching) > 1:
            return refuse(ProblemKind.DUPLICATE_NAME, ", ".join(row.where for row in matching))
        if matching:
            return matching[0]
        if own:
            return "series of listed patients that the manifest does not name"
        return refuse(ProblemKind.NO_PATIENT, "its patient is not in the manifest")

    def _points_at(self, row: ManifestRow, series: SeriesFiles) -> bool:
        if row.scan == series.series_uid or not row.scan or self._pairing.manifest is None:
            return row.scan == series.series_uid
        target = (self._pairing.manifest.parent / row.scan).resolve()
        return any(path.resolve() == target or target in path.resolve().parents for path in series.paths)

    def _entry(self, series: SeriesFiles, row: ManifestRow) -> ScanEntry | Problem:
        name = self._names[series.series_uid]
        mask = self._mask(series, row, name)
        if isinstance(mask, Problem):
            return mask
        return ScanEntry(
            patient_id=series.patient_id,
            name=name,
            image=DicomSeries(series_uid=series.series_uid, paths=series.paths),
            mask=mask,
            condition=row.condition,
            covariates=row.covariates,
        )

    def _mask(self, series: SeriesFiles, row: ManifestRow, name: str) -> VolumeSource | Problem:
        base = self._root if self._pairing.manifest is None else self._pairing.manifest.parent
        if row.mask.endswith(NIFTI_SUFFIXES):
            return NiftiFile(path=base / row.mask)
        if row.mask and not re.fullmatch(r"[0-9.]+", row.mask):
            return self._named_file(base / row.mask, series, name)
        fitting = [
            segmentation
            for segmentation in self._segmentations
            if segmentation.patient_id == series.patient_id
            and (
                segmentation.series_uid == row.mask
                if row.mask
                else series.series_uid in segmentation.referenced_series
            )
        ]
        if not fitting:
            detail = f"no SEG with UID {row.mask}" if row.mask else "no SEG was drawn on this series"
            return Problem(file=name, kind=ProblemKind.NO_MASK, detail=detail)
        if len(fitting) > 1:
            detail = f"{len(fitting)} SEG objects: name one in the manifest"
            return Problem(file=name, kind=ProblemKind.AMBIGUOUS_MASK, detail=detail)
        return self._segmentation(fitting[0].paths[0])

    def _named_file(self, path: Path, series: SeriesFiles, name: str) -> VolumeSource | Problem:
        """A SEG that the manifest names; if it can be read, it is of the same patient."""
        if path.is_file():
            others = [one.patient_id for one in index_folder(path).segmentations]
            if others and others != [series.patient_id]:
                return Problem(file=name, kind=ProblemKind.OTHER_PATIENT, detail=f"mask {path.name}")
        return self._segmentation(path)

    def _segmentation(self, path: Path) -> SegmentationFile:
        pairing = self._pairing
        return SegmentationFile(path=path, labels=pairing.labels, names=pairing.segment_names)


def _unique_names(images: Sequence[SeriesFiles], root: Path | None) -> dict[str, str]:
    """How problems and reports name a series: by its patient, number and description, and its files."""
    names = {series.series_uid: _name(series, root) for series in images}
    counts = Counter(names.values())
    return {uid: name if counts[name] == 1 else f"{name} {uid}" for uid, name in names.items()}


def _name(series: SeriesFiles, root: Path | None) -> str:
    if root is None:
        where = series.series_uid
    elif len(series.paths) == 1:
        where = str(series.paths[0].relative_to(root))
    else:
        folders = {path.parent for path in series.paths}
        common = folders.pop() if len(folders) == 1 else root
        inside = "" if common == root else f"{common.relative_to(root)}, "
        where = f"{inside}{len(series.paths)} files"
    number = f" series {series.number}" if series.number else ""
    description = f" {series.description!r}" if series.description else ""
    return f"{series.patient_id or 'no patient'}:{number}{description} ({where})"
